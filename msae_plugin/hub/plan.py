"""The files of a publication and what it removes, decided before anything is sent."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import file_sha256
from msae_plugin.common.stored import read_json_object
from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILENAME
from msae_plugin.hub.card import make_card
from msae_plugin.hub.card_data import (
    FIGURES_FOLDER,
    CardEntry,
    Measured,
    card_entry,
    measured_of,
    read_evaluation,
)
from msae_plugin.models.hub_access import hub_errors
from msae_plugin.saes.clean_config import clean_run_config, private_traces, require_inside
from msae_plugin.saes.download import RepositoryState, require_folder
from msae_plugin.saes.export import JUMPRELU_FOLDER, REPORT_FILENAME
from msae_plugin.saes.find import StoredSAE, find_saes
from msae_plugin.saes.run_record import METRICS_FILE

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".csv")
CARD_FILENAME = "README.md"
_SMALL_FILES = (SAE_CFG_FILENAME, RUNNER_CFG_FILENAME, REPORT_FILENAME, SUMMARY_FILENAME)


@dataclass(frozen=True)
class SAEFolder:
    """One SAE as it will stand in a repository."""

    path: str  # folder in the repository
    sae: StoredSAE  # the SAE on disk
    # Contents, or the file that holds them, by path relative to the folder.
    files: dict[str, bytes | Path]
    measured: Measured | None  # what was measured of it

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


def default_path(sae: StoredSAE) -> str:
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


def default_paths(saes: list[StoredSAE]) -> list[str]:
    """Distinct folders for the SAEs of a run: where two would share one, their names are added."""
    paths = [default_path(sae) for sae in saes]
    return [
        path if paths.count(path) == 1 else f"{path}_{_NOT_IN_NAMES.sub('-', sae.name)}"
        for path, sae in zip(paths, saes, strict=True)
    ]


def build_folder(
    path: str, sae: StoredSAE, measured: Measured | None, pictures: Sequence[Path] = ()
) -> SAEFolder:
    """Collect the files of one SAE, none of them a link that leads out of its folder."""
    sources = {
        name: sae.folder / name
        for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME)
    }
    if sae.jumprelu_export is not None:
        for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
            sources[f"{JUMPRELU_FOLDER}/{name}"] = sae.jumprelu_export / name
    sources |= {name: sae.root / name for name in (REPORT_FILENAME, METRICS_FILE)}
    files: dict[str, bytes | Path] = {}
    for name, source in sources.items():
        if source.is_file():
            require_inside(sae.root, source)
            cleaned = source.name in (SAE_CFG_FILENAME, RUNNER_CFG_FILENAME)
            files[name] = (
                _as_json(clean_run_config(read_json_object(source))) if cleaned else source
            )
    if measured is not None:
        files[SUMMARY_FILENAME] = _as_json(measured.summary)
        files.update(measured.files)
    for figure in _figures([*pictures, sae.root]):
        files[f"{FIGURES_FOLDER}/{figure.name}"] = figure
    return SAEFolder(path, sae, files, measured)


def _figures(places: Sequence[Path]) -> Iterator[Path]:
    for place in dict.fromkeys(places):
        for picture in (
            *sorted(place.glob("*.png")),
            *sorted(place.glob(f"{FIGURES_FOLDER}/*.png")),
        ):
            require_inside(place, picture)
            yield picture


def _as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_files(files: Iterable[tuple[str, bytes | Path]], root: Path, *, link: bool) -> None:
    """Write files of a repository into a folder, or link to those that are on the disk."""
    for path, content in files:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        elif link:  # a copy may take gigabytes
            target.symlink_to(content.resolve())
        else:
            shutil.copyfile(content, target)


def content_sha256(content: bytes | Path) -> str:
    """Hash of what a file of the repository will hold."""
    if isinstance(content, Path):
        return file_sha256(content)
    return hashlib.sha256(content).hexdigest()


def private_content(folder: SAEFolder) -> list[str]:
    """Local paths that a folder would publish, one line per file.

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


@dataclass(frozen=True)
class PublishPlan:
    """One commit."""

    state: RepositoryState  # the repository as it is
    folders: tuple[SAEFolder, ...]  # the SAEs to publish
    additions: dict[str, bytes | Path]  # contents, or the file that holds them, by path
    deletions: tuple[str, ...]  # files of a replaced folder that the new one does not have
    entries: tuple[CardEntry, ...]  # what the card says, of all SAEs
    notes: tuple[str, ...]  # what the user should know

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is written."""
        return {
            path: content.stat().st_size if isinstance(content, Path) else len(content)
            for path, content in self.additions.items()
        }


@dataclass(frozen=True)
class PublishOptions:
    """How to publish.

    Args:
        folder: Folder in the repository; None for `<model>/<hook>/<width>_l0-<n>_seed<k>`.
        dry_run: Render everything into `output` and upload nothing. Needs no token.
        output: Where a dry run goes; None for a new temporary folder.
        private: Make the repository private.
        revision: Branch to commit to; made from main when it does not exist.
        tag: Name for the commit, given when it has been checked.
        pr: Open a pull request in place of committing to main.
        licence: Identifier of the licence; None keeps the repository's, or takes MIT.
        evaluation: Output folder of `msae eval` on these SAEs.
        report: Output folder of `msae report`; its figures are published with the first SAE.
        overwrite: Replace folders that exist without asking.
        allow_negative_variance: Publish SAEs that reconstruct worse than the mean activation.
    """

    folder: str | None = None
    dry_run: bool = False
    output: Path | None = None
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    pr: bool = False
    licence: str | None = None
    evaluation: Path | None = None
    report: Path | None = None
    overwrite: bool = False
    allow_negative_variance: bool = False

    def __post_init__(self) -> None:
        """Refuse options that exclude one another."""
        if self.output is not None and not self.dry_run:
            raise InputError(
                "--output is where --dry-run renders to: add --dry-run or leave it out"
            )
        if self.pr and self.tag is not None:
            raise InputError(
                "--tag names a commit of the repository; merge the --pr first, then tag"
            )
        if self.pr and self.revision is not None:
            raise InputError("--pr asks for a change of main: leave --revision out")


def build_folders(run: Path, repo: str, options: PublishOptions) -> list[SAEFolder]:
    """The SAEs of a run, the folder of one of its SAEs, or an export, as they will be uploaded."""
    evaluation, report = options.evaluation, options.report
    saes = find_saes(run)
    if report is not None and not any((report / FIGURES_FOLDER).glob("*.png")):
        raise InputError(
            f"--report {str(report)!r} has no {FIGURES_FOLDER}/*.png: give the --output folder of "
            "`msae report`"
        )
    summary = None if evaluation is None else read_evaluation(evaluation)
    folders: list[SAEFolder] = []
    with _only_expected_values(run):
        paths = _paths(saes, options.folder)
    for path, sae in zip(paths, saes, strict=True):
        if sae.root.is_relative_to(run):  # it is the folder above where one export is named
            require_inside(run, sae.root)
        measured = None
        if evaluation is not None and summary is not None:
            measured = measured_of(sae, summary, evaluation, f"{repo}:{path}")
        # Figures of the run and of the report compare SAEs: once is enough.
        pictures = [] if folders else [run, *([] if report is None else [report])]
        folders.append(build_folder(path, sae, measured, pictures))
    return folders


def make_plan(
    run: Path, folders: Sequence[SAEFolder], state: RepositoryState, options: PublishOptions
) -> PublishPlan:
    """Decide everything about publishing the SAEs of a run."""
    with _only_expected_values(run):
        others = _read_entries(state, leave_out=[sae.path for sae in folders])
        existing = _read_card(state)
        new_entries = tuple(uploaded_entry(sae) for sae in folders)
        entries = tuple(sorted([*others, *new_entries], key=lambda e: e.folder))
        card = make_card(state.repo, entries, new_entries[0], existing, options.licence)
    additions = {path: content for sae in folders for path, content in sae.uploads()}
    additions[CARD_FILENAME] = card.encode()
    present = {path for sae in folders for path in state.files_in(sae.path)}
    notes = [
        f"{sae.path} exists: it would be replaced, after a question or with --overwrite"
        for sae in folders
        if state.files_in(sae.path)
    ]
    if options.evaluation is None:
        notes.append("no --evaluation: the card says that these SAEs were not evaluated")
    return PublishPlan(
        state=state,
        folders=tuple(folders),
        additions=additions,
        deletions=tuple(sorted(present - additions.keys())),
        entries=entries,
        notes=tuple(notes),
    )


@contextmanager
def _only_expected_values(run: Path) -> Generator[None]:
    """Name the run where a value in one of its files is of a kind that nobody writes there."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{str(run)!r} (or what the repository holds already) cannot be described in a model "
            f"card ({type(error).__name__}: {' '.join(str(error).split())}): a value in "
            f"{SAE_CFG_FILENAME}, {REPORT_FILENAME} or {SUMMARY_FILENAME} is of the wrong kind"
        ) from error


def _paths(saes: list[StoredSAE], folder: str | None) -> list[str]:
    if folder is None:
        return default_paths(saes)
    if len(saes) > 1:
        names = ", ".join(sae.name for sae in saes)
        raise InputError(
            f"--folder is for one SAE and this run has {len(saes)} ({names}): publish their "
            "folders one by one"
        )
    path = require_folder(folder)
    if path.split("/")[-1] in (JUMPRELU_FOLDER, FIGURES_FOLDER):
        raise InputError(f"--folder {folder!r}: that name is taken inside an SAE's folder")
    return [path]


def uploaded_entry(folder: SAEFolder) -> CardEntry:
    """Card entry of an SAE, from the very files that are uploaded."""
    figures = [path for path, _ in folder.uploads() if path.endswith(".png")]
    return card_entry(
        folder.path, folder.json_file, folder.sae.jumprelu_export is not None, figures
    )


def _read_card(state: RepositoryState) -> str | None:
    """The repository's README.md, None without one."""
    if CARD_FILENAME not in state.files:
        return None
    path = _snapshot(state, [CARD_FILENAME]) / CARD_FILENAME
    # As bytes: reading as text would change line breaks that are the user's.
    return path.read_bytes().decode("utf-8")


def _read_entries(state: RepositoryState, leave_out: Iterable[str] = ()) -> list[CardEntry]:
    """Card entries of the SAEs in a repository."""
    folders = [folder for folder in state.sae_folders() if folder not in set(leave_out)]
    if not folders:
        return []
    root = _snapshot(state, [f"*{name}" for name in _SMALL_FILES])
    return [_published(state, root, folder) for folder in folders]


def _published(state: RepositoryState, root: Path, folder: str) -> CardEntry:
    def read(name: str) -> Any:
        path = root / folder / name
        with hub_errors(f"reading {state.repo}:{folder}/{name}"):
            return read_json_object(path) if path.is_file() else None

    has_jumprelu = f"{folder}/{JUMPRELU_FOLDER}/{SAE_WEIGHTS_FILENAME}" in state.files
    figures = fnmatch.filter(state.files, f"{folder}/{FIGURES_FOLDER}/*.png")
    return card_entry(folder, read, has_jumprelu, figures)


def _snapshot(state: RepositoryState, patterns: Sequence[str]) -> Path:
    with hub_errors(f"reading {state.repo}"):
        return Path(
            snapshot_download(state.repo, revision=state.head, allow_patterns=list(patterns))
        )
