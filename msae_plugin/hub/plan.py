"""What one publication writes and removes, decided before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sae_lens.constants import RUNNER_CFG_FILENAME

from msae_plugin.common.errors import InputError
from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILENAME
from msae_plugin.hub.card import make_card
from msae_plugin.hub.card_data import FIGURES_FOLDER, CardEntry, usable_summary
from msae_plugin.hub.measured import measured_of, read_evaluation
from msae_plugin.hub.remote import CARD_FILENAME, read_card, read_entries
from msae_plugin.hub.sae_folder import SAEFolder, build_folder, content_size, default_paths
from msae_plugin.saes.download import RepositoryState
from msae_plugin.saes.export import REPORT_FILENAME, TWIN_FOLDER
from msae_plugin.saes.local_sae import LocalSAE, find_saes
from msae_plugin.saes.references import require_folder


@dataclass(frozen=True)
class PublishPlan:
    """One commit.

    Args:
        state: The repository as it is.
        folders: The SAEs to publish.
        additions: Contents, or the file that holds them, by path.
        deletions: Files of a replaced folder that the new one does not have.
        entries: What the card says, of all SAEs.
        new_entries: Of those to publish.
        notes: What the user should know.
    """

    state: RepositoryState
    folders: tuple[SAEFolder, ...]
    additions: dict[str, bytes | Path]
    deletions: tuple[str, ...]
    entries: tuple[CardEntry, ...]
    new_entries: tuple[CardEntry, ...]
    notes: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that is written."""
        return {path: content_size(content) for path, content in self.additions.items()}


def make_plan(
    run: Path,
    state: RepositoryState,
    *,
    folder: str | None,
    licence: str | None,
    evaluation: Path | None,
    report: Path | None,
) -> PublishPlan:
    """Decide everything.

    Args:
        run: A run folder, the folder of one of its SAEs, or an export.
        state: The repository as it is.
        folder: Folder in the repository; None for the default.
        licence: Identifier of the licence; None keeps the repository's.
        evaluation: Output folder of `msae eval` on these SAEs.
        report: Output folder of `msae report`, for its figures.

    Raises:
        InputError: Something must not be published, or a name is wrong.
        RunFailure: The Hub does not give what is in the repository.
    """
    saes = find_saes(run)
    if report is not None and not any((report / FIGURES_FOLDER).glob("*.png")):
        raise InputError(
            f"--report {str(report)!r} has no {FIGURES_FOLDER}/*.png: give the --output folder of "
            "`msae report`"
        )
    summary = None if evaluation is None else read_evaluation(evaluation)
    folders: list[SAEFolder] = []
    for path, sae in zip(_paths(saes, folder), saes, strict=True):
        measured = None
        if evaluation is not None and summary is not None:
            measured = measured_of(sae, summary, evaluation, f"{state.repo}:{path}")
        # Figures of the run and of the report compare SAEs: once is enough.
        pictures = [] if folders else [run, *([] if report is None else [report])]
        folders.append(build_folder(path, sae, measured, pictures))
    paths = [sae.path for sae in folders]
    new_entries = tuple(_entry(sae) for sae in folders)
    entries = tuple(
        sorted([*read_entries(state, leave_out=paths), *new_entries], key=lambda e: e.folder)
    )
    card = make_card(state.repo, entries, new_entries[0], read_card(state), licence)
    additions = {path: content for sae in folders for path, content in sae.uploads()}
    additions[CARD_FILENAME] = card.encode()
    present = {path for sae in folders for path in state.files_in(sae.path)}
    notes = [
        f"{sae.path} exists: it would be replaced, after a question or with --overwrite"
        for sae in folders
        if state.files_in(sae.path)
    ]
    if evaluation is None:
        notes.append("no --evaluation: the card says that these SAEs were not evaluated")
    return PublishPlan(
        state=state,
        folders=tuple(folders),
        additions=additions,
        deletions=tuple(sorted(present - additions.keys())),
        entries=entries,
        new_entries=new_entries,
        notes=tuple(notes),
    )


def _paths(saes: list[LocalSAE], folder: str | None) -> list[str]:
    if folder is None:
        return default_paths(saes)
    if len(saes) > 1:
        names = ", ".join(sae.name for sae in saes)
        raise InputError(
            f"--folder is for one SAE and this run has {len(saes)} ({names}): publish their "
            "folders one by one"
        )
    path = require_folder(folder)
    if path.split("/")[-1] in (TWIN_FOLDER, FIGURES_FOLDER):
        raise InputError(f"--folder {folder!r}: that name is taken inside an SAE's folder")
    return [path]


def _entry(folder: SAEFolder) -> CardEntry:
    """What the card says of an SAE, from the very files that are uploaded."""
    config = folder.json_file("cfg.json")
    assert config is not None
    return CardEntry(
        folder=folder.path,
        config=config,
        run=folder.json_file(RUNNER_CFG_FILENAME) or {},
        export=folder.json_file(REPORT_FILENAME) or {},
        summary=usable_summary(folder.json_file(SUMMARY_FILENAME)),
        has_twin=folder.sae.twin is not None,
        figures=tuple(sorted(path for path, _ in folder.uploads() if path.endswith(".png"))),
    )
