"""Run configurations without what is private to the machine that ran them."""

from __future__ import annotations

import getpass
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from msae_plugin.common.errors import InputError

# Fields whose value is a place on the user's disk, an account or a machine, by their last word.
_PRIVATE_FIELDS = frozenset({
    "checkpoint_path", "output_path", "output", "resume", "resume_from_checkpoint",
    "from_pretrained_path", "cached_activations_path", "cache_dir", "wandb_entity", "wandb_id",
    "wandb_project", "wandb_group", "entity", "hf_token", "token", "api_key", "user", "username",
    "hostname",
})  # fmt: skip
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)


# A path in the middle of any text: one that starts at a usual root, or at a Windows drive.
_PATH_IN_TEXT = re.compile(
    r"(?<![\w./:~-])(?:~|/(?:home|Users|root|mnt|media|tmp|var|srv|opt|data|scratch|workspace|Volumes))"
    r"/[\w.~-][^\s\"'<>|\\]*"
    r"|(?<!\w)[A-Za-z]:\\{1,2}[\w.~-][^\s\"'<>|]*"
)


def _is_local_path(value: str) -> bool:
    if _URL.match(value):
        return value.lower().startswith("file:")
    if value.startswith(("~", "./", "../", ".\\", "..\\")):
        return True
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute():
        return True
    try:
        # A relative path that exists: `models/tiny` is a folder then and not a name on the Hub.
        return ("/" in value or "\\" in value) and Path(value).exists()
    except (OSError, ValueError):
        return False  # too long for a path, or no path at all


def require_inside(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of the folder whose files are to be published."""
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()):
        raise InputError(
            f"{str(path)!r} leads out of {str(folder)!r}, to {str(target)!r}: only what is in the "
            "folder is published; put the file itself there, or remove the link"
        )


def private_traces(text: str) -> list[str]:
    """Local paths and the user's home folder in a text that is to be published as it is."""
    found = dict.fromkeys(match.group() for match in _PATH_IN_TEXT.finditer(text))
    home = str(Path.home())
    if len(home) > 1 and home in text:
        found.setdefault(home)
    return list(found)


def clean_run_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without local paths and account names, JSON-able.

    Fields that only hold a place on the user's disk or an account become null; a path in any other
    field (a corpus or a model in a folder) keeps its last part, so that a reader still sees what
    was used; the home folder and the user's name are removed from longer strings.
    """
    return {str(key): _clean(str(key), value) for key, value in config.items()}


def _clean(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return clean_run_config(value)
    if key.lower() in _PRIVATE_FIELDS and isinstance(value, str | Path):
        return None
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, Sequence):
        return [_clean("", item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # strict JSON has no infinity
    if value is None or isinstance(value, bool | int | float):
        return value
    return _clean_text(str(value))


def _clean_text(value: str) -> str:
    if "\n" not in value and _is_local_path(value):
        path = PureWindowsPath(value) if "\\" in value else PurePosixPath(value)
        return path.name or "local folder"
    home = str(Path.home())
    if len(home) > 1:
        value = value.replace(home, "~")
    try:
        account = getpass.getuser()
    except (KeyError, OSError, ImportError):
        account = ""  # no name is known for this user id (a container), so none can leak
    if len(account) > 2:
        # The account's name as part of a path inside a longer string.
        value = re.sub(rf"(?<=[/\\]){re.escape(account)}(?=[/\\]|$)", "user", value)
    return value
