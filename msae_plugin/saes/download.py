"""`msae download`, and what other commands do with a reference to the Hub."""

from __future__ import annotations

import glob
import shutil
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import folder_written_atomically
from msae_plugin.hub.remote import RepositoryState, read_state
from msae_plugin.models.hub_errors import hub_errors
from msae_plugin.saes.local_sae import file_sha256
from msae_plugin.saes.references import HubReference, is_reference, parse_reference


def download(reference: str, destination: Path) -> Path:
    """Fetch a folder of a repository, or all of it, whole or not at all.

    Args:
        reference: `user/repo:folder`, `user/repo`, either with `@revision` after the repository.
        destination: A new or empty folder. It gets what is in the folder.

    Returns:
        The destination.

    Raises:
        InputError: There is no such repository, folder or revision, or the destination is in use.
        RunFailure: The network, the Hub or the disk failed; nothing is left in the destination.
    """
    found, state = _resolve(parse_reference(reference))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"--output {str(destination)!r} is not empty: choose another folder")
    wanted = sorted(state.files if found.folder is None else state.files_in(found.folder))
    with (
        hub_errors(f"downloading {found} to {destination}"),
        folder_written_atomically(destination) as folder,
    ):
        fetched = folder / ".download"
        for path in wanted:
            hf_hub_download(found.repo, path, revision=state.head, local_dir=fetched)
        _require_intact(found.repo, state, wanted, fetched)
        content = fetched if found.folder is None else fetched / found.folder
        # huggingface_hub's own notes on what it downloaded.
        shutil.rmtree(fetched / ".cache", ignore_errors=True)
        for item in content.iterdir():
            item.rename(folder / item.name)
        shutil.rmtree(fetched)
    return destination


def fetch(reference: str) -> Path:
    """The local copy of a folder of a repository, in huggingface_hub's own cache.

    Args:
        reference: As in `download`.

    Returns:
        The folder; not to be written to.

    Raises:
        InputError: There is no such repository, folder or revision.
        RunFailure: The network, the Hub or the disk failed.
    """
    found, state = _resolve(parse_reference(reference))
    with hub_errors(f"downloading {found}"):
        pattern = None if found.folder is None else f"{glob.escape(found.folder)}/*"
        root = Path(snapshot_download(found.repo, revision=state.head, allow_patterns=pattern))
    return root if found.folder is None else root / found.folder


def local_folder(text: str) -> Path:
    """The folder behind an argument of `msae report`: one on disk, or fetched from the Hub.

    Args:
        text: A path, or a reference as in `download`. What exists on disk is taken first.

    Raises:
        InputError: It is a reference to something that does not exist.
        RunFailure: The network, the Hub or the disk failed.
    """
    path = Path(text)
    return path if path.exists() or not is_reference(text) else fetch(text)


def _resolve(reference: HubReference) -> tuple[HubReference, RepositoryState]:
    """The repository at the commit that is meant now, and the reference without a wrong folder."""
    state = read_state(reference.repo, reference.revision)
    if not state.exists:
        raise InputError(
            f"there is no repository {reference.repo} on the Hub, or it is private and you are "
            "not logged in (`hf auth login`)"
        )
    if reference.revision is not None and not state.has_revision:
        raise InputError(f"{reference.repo} has no revision {reference.revision!r}")
    if reference.folder is not None and not state.files_in(reference.folder):
        known = ", ".join(state.sae_folders()[:5]) or "no SAE"
        raise InputError(f"{reference.repo} has no folder {reference.folder!r}; it has {known}")
    return replace(reference, revision=reference.revision), state


def _require_intact(repo: str, state: RepositoryState, paths: list[str], folder: Path) -> None:
    """Compare the hashes of large files with the Hub's; huggingface_hub compares sizes only."""
    listed = HfApi().get_paths_info(repo, paths, revision=state.head)
    for item in listed:
        large = getattr(item, "lfs", None)
        if large is not None and file_sha256(folder / item.path) != large.sha256:
            raise RunFailure(f"{item.path} arrived damaged: run the command again")
