"""A repository on the Hub as publishing sees it: what is in it, and one commit more."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    snapshot_download,
)
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILENAME
from msae_plugin.hub.card_data import FIGURES_FOLDER, CardEntry, card_entry
from msae_plugin.models.hub_access import hub_errors
from msae_plugin.saes.download import RepositoryState, read_state
from msae_plugin.saes.export import REPORT_FILENAME, TWIN_FOLDER

CARD_FILENAME = "README.md"
MAIN = "main"
_SMALL_FILES = (SAE_CFG_FILENAME, RUNNER_CFG_FILENAME, REPORT_FILENAME, SUMMARY_FILENAME)


def read_card(state: RepositoryState) -> str | None:
    """The repository's README.md, None without one."""
    if CARD_FILENAME not in state.files:
        return None
    path = _snapshot(state, [CARD_FILENAME]) / CARD_FILENAME
    # As bytes: reading as text would change line breaks that are the user's.
    return path.read_bytes().decode("utf-8")


def read_entries(state: RepositoryState, leave_out: Iterable[str] = ()) -> list[CardEntry]:
    """Card entries of the SAEs in a repository."""
    folders = [folder for folder in state.sae_folders() if folder not in set(leave_out)]
    if not folders:
        return []
    root = _snapshot(state, [f"*{name}" for name in _SMALL_FILES])
    return [_entry(state, root, folder) for folder in folders]


def _entry(state: RepositoryState, root: Path, folder: str) -> CardEntry:
    def read(name: str) -> Any:
        path = root / folder / name
        with hub_errors(f"reading {state.repo}:{folder}/{name}"):
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    has_twin = f"{folder}/{TWIN_FOLDER}/{SAE_WEIGHTS_FILENAME}" in state.files
    figures = fnmatch.filter(state.files, f"{folder}/{FIGURES_FOLDER}/*.png")
    return card_entry(folder, read, has_twin, figures)


def _snapshot(state: RepositoryState, patterns: Sequence[str]) -> Path:
    with hub_errors(f"reading {state.repo}"):
        return Path(
            snapshot_download(state.repo, revision=state.head, allow_patterns=list(patterns))
        )


def prepare(state: RepositoryState, private: bool, revision: str | None) -> RepositoryState:
    """Make the repository and the branch where they are missing.

    Raises:
        InputError: The token may not do it.
        RunFailure: The Hub does not answer.
    """
    api = HfApi()
    if not state.exists:
        with hub_errors(f"creating {state.repo}"):
            # None leaves it to the organisation's default; False would make it public.
            api.create_repo(state.repo, private=True if private else None)
        state = read_state(state.repo, revision)
    if not state.has_revision and revision is not None:
        with hub_errors(f"creating the branch {revision} of {state.repo}"):
            api.create_branch(state.repo, branch=revision, revision=state.head)
        state = read_state(state.repo, revision)
    return state


@dataclass(frozen=True)
class Committed:
    """A commit."""

    oid: str
    url: str
    pull_request: str | None  # page of the pull request; None without one


def commit(
    state: RepositoryState,
    additions: Mapping[str, bytes | Path],
    deletions: Iterable[str],
    *,
    message: str,
    revision: str | None,
    pull_request: bool,
) -> Committed:
    """Change the repository in one commit, or not at all.

    The commit names its parent: had somebody else committed meanwhile, the Hub refuses it.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path, is_folder=False) for path in sorted(deletions)
    ]
    operations += [CommitOperationAdd(path, content) for path, content in additions.items()]
    done = HfApi().create_commit(
        state.repo,
        operations,
        commit_message=message,
        revision=revision,
        create_pr=pull_request,
        parent_commit=state.head,
    )
    return Committed(done.oid, done.commit_url, done.pr_url)


def existing_tag(repo: str, tag: str) -> bool:
    """Whether a repository has a tag."""
    with hub_errors(f"reading the tags of {repo}"):
        return any(ref.name == tag for ref in HfApi().list_repo_refs(repo).tags)


def add_tag(repo: str, tag: str, oid: str) -> None:
    """Give a commit a name."""
    with hub_errors(f"tagging {repo}"):
        HfApi().create_tag(repo, tag=tag, revision=oid)
