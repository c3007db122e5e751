"""The folders a report is made of, and the SAEs in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import file_sha256
from msae_plugin.comparison.ladder import ladder_variants
from msae_plugin.evaluation.summary import FORMAT as SUMMARY_FORMAT
from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILE
from msae_plugin.saes.export import ACTIVATIONS_FILENAME, REPORT_FILENAME, SAE_FOLDER, TWIN_FOLDER
from msae_plugin.saes.run_record import METRICS_FILE, RUN_FILE, read_run_record
from msae_plugin.training.log import REVIVALS_FILE

COMPARISON_FILE = "comparison.json"
COMPARISON_FORMAT = 1
DEMO_FILE = "demo.json"
KNOWN_FILES = (COMPARISON_FILE, SUMMARY_FILE, RUN_FILE)
KINDS = ("language_model", "ground_truth")


@dataclass(frozen=True)
class Source:
    """One known file of a folder."""

    label: str  # name of the folder, unique in the report
    folder: Path  # where it is
    content: Mapping[str, Any]  # what the file holds


@dataclass(frozen=True)
class RunSource(Source):
    """A run folder."""

    demo: Mapping[str, Any] | None  # content of `demo.json`; None without it


@dataclass(frozen=True)
class Sources:
    """Everything that a report reads, in the order in which it was named."""

    comparisons: tuple[Source, ...]  # folders with `comparison.json`
    evaluations: tuple[Source, ...]  # folders with `summary.json`
    runs: tuple[RunSource, ...]  # folders with `run.json`

    @property
    def all(self) -> tuple[Source, ...]:
        """Every source."""
        return (*self.comparisons, *self.evaluations, *self.runs)


def read_sources(folders: Sequence[Path]) -> Sources:
    """Recognise and read the folders.

    Raises:
        InputError: No folder, a folder without a known file, a broken file, or another format.
    """
    if not folders:
        raise InputError("give at least one folder: a run, an evaluation or a comparison")
    unique = list({folder.resolve(): folder for folder in folders}.values())
    labels = dict(zip(unique, _labels(unique), strict=True))
    comparisons: list[Source] = []
    evaluations: list[Source] = []
    runs: list[RunSource] = []
    for folder, label in labels.items():
        if not folder.is_dir():
            raise InputError(
                f"{str(folder)!r} is not a folder: give a run, an evaluation or a comparison"
            )
        present = [name for name in KNOWN_FILES if (folder / name).is_file()]
        if not present:
            raise InputError(
                f"{str(folder)!r} holds none of {', '.join(KNOWN_FILES)}: give the --output folder "
                "of msae train, eval or compare"
            )
        if COMPARISON_FILE in present:
            comparisons.append(Source(label, folder, read_comparison(folder / COMPARISON_FILE)))
        if SUMMARY_FILE in present:
            evaluations.append(Source(label, folder, _read_summary(folder / SUMMARY_FILE)))
        if RUN_FILE in present:
            demo = read_json(folder / DEMO_FILE) if (folder / DEMO_FILE).is_file() else None
            runs.append(RunSource(label, folder, _read_run(folder / RUN_FILE), demo))
    return Sources(tuple(comparisons), tuple(evaluations), tuple(runs))


def _labels(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    labels = [path[-1] for path in parts]
    depth = 1
    while len(set(labels)) < len(labels) and depth < max(map(len, parts)):
        depth += 1
        repeated = {label for label, n in Counter(labels).items() if n > 1}
        labels = [
            "/".join(path[-depth:]) if label in repeated else label
            for path, label in zip(parts, labels, strict=True)
        ]
    return labels


def read_comparison(path: Path) -> Mapping[str, Any]:
    """A checked `comparison.json`.

    Raises:
        InputError: It cannot be read, is of another format, or a row lacks what every row has.
    """
    content = _of_format(path, COMPARISON_FORMAT)
    if content.get("kind") not in KINDS:
        raise InputError(
            f"{str(path)!r}: kind must be one of {', '.join(KINDS)}; got {content.get('kind')!r}"
        )
    rows = content.get("rows")
    if not isinstance(rows, list) or not isinstance(content.get("definitions"), dict):
        raise InputError(f"{str(path)!r}: needs a list 'rows' and an object 'definitions'")
    for place, row in enumerate(cast("list[object]", rows)):
        entries = row if isinstance(row, dict) else {}
        for key in ("name", "method", "metrics"):
            if key not in entries:
                raise InputError(f"{str(path)!r}: row {place} has no {key!r}")
        if not isinstance(entries["metrics"], dict):
            raise InputError(f"{str(path)!r}: 'metrics' of row {place} is not an object")
    return content


def _read_summary(path: Path) -> Mapping[str, Any]:
    content = _of_format(path, SUMMARY_FORMAT)
    for key, kind in (("saes", dict), ("results", list), ("metrics", dict)):
        if not isinstance(content.get(key), kind):
            raise InputError(f"{str(path)!r}: needs {key!r}: evaluate again with this version")
    return content


def _read_run(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    if not isinstance(content.get("saes"), dict):
        raise InputError(f"{str(path)!r} is no record of msae train: it names no 'saes'")
    # Its status as it is: the run's process may have died without a word.
    return read_run_record(path.parent) or content


def _of_format(path: Path, expected: int) -> Mapping[str, Any]:
    content = read_json(path)
    if content.get("format") != expected:
        raise InputError(
            f"{str(path)!r} is of format {content.get('format')!r} and this version reads "
            f"{expected}: make it again with this version of msae_plugin"
        )
    return content


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        InputError: The file cannot be read or holds something else.
    """
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} does not hold a JSON object")
    return content


def read_json_lines(path: Path) -> list[Mapping[str, Any]]:
    """Objects of a JSON-lines file; none when there is no file.

    A last line that a kill cut short is left out, as a resumed run does.

    Raises:
        InputError: Another line is broken.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value: object = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"{str(path)!r}, line {number}, is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f"{str(path)!r}, line {number}, is not a JSON object")
        found.append(value)
    return found


def flat_facts(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as names and texts, in their order."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat_facts(value, f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(str(item) for item in cast("list[object]", value))
        elif value is not None:
            yield name, str(value)


CONTEXTS_FILE = "contexts.json"


@dataclass(frozen=True)
class TrainedSAE:
    """One SAE's folder."""

    name: str  # unique in the report
    method: str  # what it is an instance of
    l0_target: float | None  # the L0 that was asked for; None when not recorded
    seed: int | None  # of the training; None when not recorded
    folder: Path  # holds the logs
    export: Path | None  # holds the weights; None when nothing was exported
    rows: list[Mapping[str, Any]]
    events: list[Mapping[str, Any]]
    config: Mapping[str, Any]  # `cfg.json` of the export; empty without one
    report: Mapping[str, Any]  # `export.json`; empty without one
    # Which SAEs it is shown with: the comparison it is of, and the hook where that has
    # several; empty for those of training runs.
    place: str = ""
    # What a comparison measured of it, by `evaluation/metric`.
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def training(self) -> Mapping[str, Any]:
        """The training configuration that SAELens' metadata keeps; empty when there is none."""
        metadata = self.config.get("metadata") or {}
        details = metadata.get("training_architecture_details")
        return details or {}

    @property
    def steps(self) -> int:
        """Training steps, from the log or the metadata; 0 when neither says."""
        logged = [int(row["step"]) for row in self.rows if "step" in row]
        metadata = self.config.get("metadata") or {}
        return max(logged, default=int(metadata.get("training_steps") or 0))

    def decoder(self) -> torch.Tensor | None:
        """W_dec (d_sae, d_in); None without weights.

        Raises:
            InputError: The weights cannot be read.
        """
        if self.export is None:
            return None
        path = self.export / SAE_WEIGHTS_FILENAME
        try:
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_tensor("W_dec").float()
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{str(path)!r} holds no decoder that can be read ({error}): export it again"
            ) from error

    def frequencies(self) -> torch.Tensor | None:
        """(d_sae,) share of tokens on which latents fired in training; None when not stored."""
        if self.export is None or not (self.export / SPARSITY_FILENAME).is_file():
            return None
        stored = _tensor(self.export / SPARSITY_FILENAME, "sparsity")
        return 10 ** stored.double()

    def activations(self) -> torch.Tensor | None:
        """(n, d_in) activations kept from the export check; None when there are none."""
        path = self.folder / ACTIVATIONS_FILENAME
        return _tensor(path, "activations") if path.is_file() else None

    def contexts(self) -> list[Mapping[str, Any]]:
        """Latents in context that the run stored, as in demo.json; none when it did not."""
        path = self.folder / CONTEXTS_FILE
        if not path.is_file():
            return []
        latents = read_json(path).get("latents")
        return latents or []

    def weight_hashes(self) -> set[str]:
        """sha256 of the exported weights and of their twin's."""
        files = [self.export, self.folder / TWIN_FOLDER]
        paths = [folder / SAE_WEIGHTS_FILENAME for folder in files if folder is not None]
        return {file_sha256(path) for path in paths if path.is_file()}


def _tensor(path: Path, name: str) -> torch.Tensor:
    try:
        return load_file(path)[name]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error


def trained_saes(sources: Sources) -> list[TrainedSAE]:
    """Every SAE that the sources point at and whose folder is there, each once.

    A comparison's row points at its folder relative to the comparison's.

    Raises:
        InputError: A file of one cannot be read.
    """
    found: dict[Path, TrainedSAE] = {}
    for source in sources.comparisons:
        rows = source.content["rows"]
        several_hooks = len({row.get("hook") for row in rows}) > 1
        for row in rows:
            folder = row_folder(source, row)
            if folder is None or folder.resolve() in found:
                continue
            sae = _read(
                str(row["name"]), str(row["method"]), row.get("l0_target"), row.get("seed"), folder
            )
            found[folder.resolve()] = replace(
                sae,
                place=f"{source.label}, {row['hook']}" if several_hooks else source.label,
                metrics=finite(row["metrics"]),
            )
    for run in sources.runs:
        for name in run.content["saes"]:
            folder = run_sae_folder(run, name)
            if folder.is_dir() and folder.resolve() not in found:
                unique = name if len(sources.runs) == 1 else f"{run.label}/{name}"
                found[folder.resolve()] = _read(
                    unique, name, run_l0_target(run, name), run.content.get("seed"), folder
                )
    return list(found.values())


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among metrics."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and isfinite(value)
    }


def row_folder(source: Source, row: Mapping[str, Any]) -> Path | None:
    """Folder of a comparison's row; None when it names none or the folder is not there."""
    named = row.get("folder")
    if not named:
        return None
    folder = source.folder / str(named)
    return folder if folder.is_dir() else None


def run_sae_folder(run: RunSource, name: str) -> Path:
    """Folder of an SAE of a run."""
    return run.folder / str(run.content["saes"][name].get("folder", name))


def run_l0_target(run: RunSource, name: str) -> float | None:
    """The L0 that an SAE of a run was trained for; None for one without such a setting."""
    export = run.content["saes"][name].get("export") or {}
    if export.get("l0_target") is not None:
        return float(export["l0_target"])
    config = run.content.get("config") or {}
    # A recipe of one SAE has it under `sae`, of several under `saes`.
    saes = config.get("saes") or {}
    settings = saes.get(name) or config.get("sae") or {}
    return float(settings["k"]) if settings.get("k") is not None else None


def _read(
    name: str, method: str, l0_target: float | None, seed: int | None, folder: Path
) -> TrainedSAE:
    places = [folder / SAE_FOLDER, folder]
    export = next((p for p in places if (p / SAE_WEIGHTS_FILENAME).is_file()), None)
    config: Mapping[str, Any] = {}
    if export is not None and (export / SAE_CFG_FILENAME).is_file():
        config = read_json(export / SAE_CFG_FILENAME)
    report = folder / REPORT_FILENAME
    return TrainedSAE(
        name=name,
        method=method,
        l0_target=l0_target,
        seed=seed,
        folder=folder,
        export=export,
        rows=read_json_lines(folder / METRICS_FILE),
        events=read_json_lines(folder / REVIVALS_FILE),
        config=config,
        report=read_json(report) if report.is_file() else {},
    )


VARIANTS = {variant.name: variant for variant in ladder_variants()}
_REFERENCES = {variant.name for variant in VARIANTS.values() if variant.against is None}


def is_variant(method: str) -> bool:
    """Whether a method belongs to the ladder alone: its references stand among others too."""
    return method in VARIANTS and method not in _REFERENCES
