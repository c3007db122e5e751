"""Names of SAEs on the Hugging Face Hub: `user/repo:folder`, `user/repo@revision:folder`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from msae_plugin.common.errors import InputError

_FORM = re.compile(r"(?P<repo>[^/:@\s]+/[^/:@\s]+)(?:@(?P<revision>[^:\s]+))?(?::(?P<folder>.+))?")


@dataclass(frozen=True)
class HubReference:
    """A repository, or a folder in it.

    Args:
        repo: `user/name`.
        folder: Path inside the repository; None for all of it.
        revision: Branch, tag or commit; None for the main branch.
    """

    repo: str
    folder: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return self.repo + revision + ("" if self.folder is None else f":{self.folder}")


def is_reference(text: str) -> bool:
    """Whether a text has the form of a reference; a local path such as `runs/a` has it too."""
    return _FORM.fullmatch(text) is not None


def parse_reference(text: str) -> HubReference:
    """Read a reference.

    Args:
        text: `user/repo`, with `@revision` and `:folder` where wanted, in this order.

    Raises:
        InputError: It has another form, or a name that the Hub does not allow.
    """
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
    """Refuse a name that the Hub does not allow for a repository.

    Raises:
        InputError: Saying what is wrong with it.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"repository {repo!r}: {reason}") from error
    if repo.count("/") != 1:
        raise InputError(f"repository {repo!r}: give the owner too, as in user/name")
    return repo


def require_folder(folder: str) -> str:
    """Refuse a path that cannot be a folder of a repository; give it without slashes at its ends.

    Raises:
        InputError: Saying what is wrong with it.
    """
    path = PurePosixPath(folder.strip("/"))
    bad = [part for part in path.parts if part in (".", "..", ".git") or not part.strip()]
    if folder.startswith("/") or not path.parts or bad or "\\" in folder:
        raise InputError(
            f"folder {folder!r} cannot be in a repository: give a relative path such as "
            "gemma-2-2b/blocks.12.hook_resid_post/16k"
        )
    return path.as_posix()
