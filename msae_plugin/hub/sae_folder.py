"""The files of one SAE in a repository: what goes in, under which name, and what is kept out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)

from msae_plugin.common.files import file_sha256
from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILENAME
from msae_plugin.hub.card_data import FIGURES_FOLDER
from msae_plugin.hub.measured import Measured
from msae_plugin.saes.clean_config import clean_run_config, private_traces
from msae_plugin.saes.export import REPORT_FILENAME, TWIN_FOLDER
from msae_plugin.saes.local_sae import LocalSAE
from msae_plugin.saes.run_record import METRICS_FILE

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".csv")


@dataclass(frozen=True)
class SAEFolder:
    """One SAE as it will stand in a repository.

    Args:
        path: Folder in the repository.
        sae: The SAE on disk.
        files: Contents, or the file that holds them, by path relative to the folder.
        measured: What was measured of it.
    """

    path: str
    sae: LocalSAE
    files: dict[str, bytes | Path]
    measured: Measured | None

    def uploads(self) -> Iterator[tuple[str, bytes | Path]]:
        """Path in the repository and contents of every file."""
        for name, content in self.files.items():
            yield f"{self.path}/{name}", content

    def json_file(self, name: str) -> dict[str, Any] | None:
        """Contents of one of its JSON files; None when it has none of that name."""
        content = self.files.get(name)
        if content is None:
            return None
        return json.loads(content if isinstance(content, bytes) else content.read_bytes())


def default_path(sae: LocalSAE) -> str:
    """`<model>/<hook>/<width>_l0-<n>_seed<k>`, without the parts that the SAE does not record."""
    metadata = sae.metadata
    model = str(metadata.get("model_name") or "unknown-model").rstrip("/")
    words = [str(sae.config["d_sae"])]
    if sae.l0 is not None:
        words.append(f"l0-{sae.l0:.0f}")
    if metadata.get("seed") is not None:
        words.append(f"seed{metadata['seed']}")
    parts = (
        re.split(r"[/\\]", model)[-1],
        str(metadata.get("hook_name") or "unknown-hook"),
        "_".join(words),
    )
    return "/".join(_NOT_IN_NAMES.sub("-", part).strip(".") or "unnamed" for part in parts)


def default_paths(saes: list[LocalSAE]) -> list[str]:
    """Distinct folders for the SAEs of a run: where two would share one, their names are added."""
    paths = [default_path(sae) for sae in saes]
    return [
        path if paths.count(path) == 1 else f"{path}_{_NOT_IN_NAMES.sub('-', sae.name)}"
        for path, sae in zip(paths, saes, strict=True)
    ]


def build_folder(
    path: str, sae: LocalSAE, measured: Measured | None, pictures: Sequence[Path] = ()
) -> SAEFolder:
    """Collect the files of one SAE.

    Args:
        path: Folder in the repository.
        sae: The SAE on disk.
        measured: What was measured of it.
        pictures: Folders whose figures go with this SAE beside those of its own.
    """
    files: dict[str, bytes | Path] = {SAE_CFG_FILENAME: _cleaned(sae.export / SAE_CFG_FILENAME)}
    files[SAE_WEIGHTS_FILENAME] = sae.export / SAE_WEIGHTS_FILENAME
    if (sae.export / SPARSITY_FILENAME).is_file():
        files[SPARSITY_FILENAME] = sae.export / SPARSITY_FILENAME
    if (sae.export / RUNNER_CFG_FILENAME).is_file():
        files[RUNNER_CFG_FILENAME] = _cleaned(sae.export / RUNNER_CFG_FILENAME)
    if sae.twin is not None:
        files[f"{TWIN_FOLDER}/{SAE_CFG_FILENAME}"] = _cleaned(sae.twin / SAE_CFG_FILENAME)
        files[f"{TWIN_FOLDER}/{SAE_WEIGHTS_FILENAME}"] = sae.twin / SAE_WEIGHTS_FILENAME
    for name in (REPORT_FILENAME, METRICS_FILE):
        if (sae.root / name).is_file():
            files[name] = sae.root / name
    if measured is not None:
        files[SUMMARY_FILENAME] = _as_json(measured.summary)
        files.update(measured.files)
    for figure in _figures([*pictures, sae.root]):
        files[f"{FIGURES_FOLDER}/{figure.name}"] = figure
    return SAEFolder(path, sae, files, measured)


def _figures(places: Sequence[Path]) -> Iterator[Path]:
    for place in dict.fromkeys(places):
        yield from sorted(place.glob("*.png"))
        yield from sorted((place / FIGURES_FOLDER).glob("*.png"))


def _cleaned(path: Path) -> bytes:
    return _as_json(clean_run_config(json.loads(path.read_text(encoding="utf-8"))))


def _as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def content_sha256(content: bytes | Path) -> str:
    """Hash of what a file of the repository will hold."""
    if isinstance(content, Path):
        return file_sha256(content)
    return hashlib.sha256(content).hexdigest()


def content_size(content: bytes | Path) -> int:
    """Bytes of what a file of the repository will hold."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


def private_content(folder: SAEFolder) -> list[str]:
    """What a folder would tell about the machine that made it, one line per file.

    Files of other hosts are published unmodified, so nothing is removed here.
    """
    found: list[str] = []
    for path, content in folder.uploads():
        if path.endswith(_TEXT_SUFFIXES):
            raw = content if isinstance(content, bytes) else content.read_bytes()
            traces = private_traces(raw.decode("utf-8", errors="replace"))
            if traces:
                found.append(f"{path} names {', '.join(traces[:3])}")
    return found
