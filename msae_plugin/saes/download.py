"""SAEs on the Hugging Face Hub: their names, and downloads of them."""

from __future__ import annotations

import glob
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from msae_plugin.common.errors import InputError, RunFailure, first_line
from msae_plugin.common.files import file_sha256, folder_written_atomically, require_empty
from msae_plugin.models.hub_access import hub_errors
from msae_plugin.saes.export import JUMPRELU_FOLDER

_FORM = re.compile(r"(?P<repo>[^/:@\s]+/[^/:@\s]+)(?:@(?P<revision>[^:\s]+))?(?::(?P<folder>.+))?")


@dataclass(frozen=True)
class HubReference:
    """A repository, or a folder in it."""

    repo: str  # `user/name`
    folder: str | None = None  # path inside the repository; None for all of it
    revision: str | None = None  # branch, tag or commit; None for the main branch

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return self.repo + revision + ("" if self.folder is None else f":{self.folder}")


def is_reference(text: str) -> bool:
    """Whether a text has the form of a reference; a local path such as `runs/a` has it too."""
    return _FORM.fullmatch(text) is not None


def parse_reference(text: str) -> HubReference:
    """Read a reference."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"{text!r} does not name an SAE on the Hub: write user/repo:folder, or "
            "user/repo@revision:folder"
        )
    folder = match["folder"]
    return HubReference(
        require_repo_name(match["repo"]),
        None if folder is None else require_folder(folder),
        match["revision"],
    )


def require_repo_name(repo: str) -> str:
    """Refuse a name that the Hub does not allow for a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"repository {repo!r}: {first_line(error)}") from error
    if repo.count("/") != 1:
        raise InputError(f"repository {repo!r}: give the owner too, as in user/name")
    return repo


def require_folder(folder: str) -> str:
    """Refuse what cannot be a folder of a repository; give it without slashes at its ends."""
    path = PurePosixPath(folder.strip("/"))
    bad = [part for part in path.parts if part in (".", "..", ".git") or not part.strip()]
    if folder.startswith("/") or not path.parts or bad or "\\" in folder:
        raise InputError(
            f"folder {folder!r} cannot be in a repository: give a relative path such as "
            "gemma-2-2b/blocks.12.hook_resid_post/16k"
        )
    return path.as_posix()


# What a listing waits for; uploads and downloads have huggingface_hub's own limits.
LISTING_TIMEOUT_SECONDS = 20.0


def download(reference: str, destination: Path) -> Path:
    """Fetch a folder of a repository, or all of it, whole or not at all.

    The destination, a new or empty folder, gets what is in the folder.
    """
    found = parse_reference(reference)
    state = _state_of(found)
    require_empty(destination)
    wanted = sorted(state.files if found.folder is None else state.files_in(found.folder))
    with (
        hub_errors(f"downloading {found} to {destination}"),
        folder_written_atomically(destination) as folder,
    ):
        fetched = folder / ".download"
        for path in wanted:
            hf_hub_download(found.repo, path, revision=state.head, local_dir=fetched)
        # huggingface_hub compares sizes only: here the hashes of large files.
        for item in HfApi().get_paths_info(found.repo, wanted, revision=state.head):
            large = getattr(item, "lfs", None)
            if large is not None and file_sha256(fetched / item.path) != large.sha256:
                raise RunFailure(f"{item.path} arrived damaged: run the command again")
        content = fetched if found.folder is None else fetched / found.folder
        # huggingface_hub's own notes on what it downloaded.
        shutil.rmtree(fetched / ".cache", ignore_errors=True)
        for item in content.iterdir():
            item.rename(folder / item.name)
        shutil.rmtree(fetched)
    return destination


def fetch(reference: str) -> Path:
    """The local copy, not to be written to, of a folder of a repository in the Hub's own cache."""
    found = parse_reference(reference)
    state = _state_of(found)
    with hub_errors(f"downloading {found}"):
        pattern = None if found.folder is None else f"{glob.escape(found.folder)}/*"
        root = Path(snapshot_download(found.repo, revision=state.head, allow_patterns=pattern))
    return root if found.folder is None else root / found.folder


def local_folder(text: str) -> Path:
    """The folder behind an argument of `msae report`: one on disk, or fetched from the Hub."""
    path = Path(text)
    return path if path.exists() or not is_reference(text) else fetch(text)


def _state_of(reference: HubReference) -> RepositoryState:
    """The repository at the commit that is meant now; refused without the revision or folder."""
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
    return state


@dataclass(frozen=True)
class RepositoryState:
    """A repository at one commit."""

    repo: str  # `user/name`
    exists: bool  # whether there is one
    private: bool | None = None  # whether it is private; None where the Hub does not say
    head: str | None = None  # the commit; None for a repository that does not exist
    # Whether the branch asked for exists; `head` is that of main otherwise.
    has_revision: bool = False
    files: frozenset[str] = frozenset()  # paths of all files at the commit

    def sae_folders(self) -> list[str]:
        """Folders that SAELens can load an SAE from, without their JumpReLU copies."""
        end = f"/{SAE_CFG_FILENAME}"
        found = {path.removesuffix(end) for path in self.files if path.endswith(end)}
        loadable = {folder for folder in found if f"{folder}/{SAE_WEIGHTS_FILENAME}" in self.files}
        copies = {f"{folder}/{JUMPRELU_FOLDER}" for folder in loadable}
        return sorted(loadable - copies)

    def files_in(self, folder: str) -> set[str]:
        """Paths of the files in a folder, its sub-folders included."""
        return {path for path in self.files if path.startswith(f"{folder}/")}


def read_state(repo: str, revision: str | None) -> RepositoryState:
    """Ask the Hub what is in a repository."""
    api, has_revision = HfApi(), True
    with hub_errors(f"reading {repo}"):
        try:
            try:
                info = api.model_info(repo, revision=revision, timeout=LISTING_TIMEOUT_SECONDS)
            except RevisionNotFoundError:
                has_revision = False
                info = api.model_info(repo, timeout=LISTING_TIMEOUT_SECONDS)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return RepositoryState(repo, exists=False)
    files = frozenset(sibling.rfilename for sibling in info.siblings or ())
    return RepositoryState(repo, True, info.private, info.sha, has_revision, files)
