"""Files and folders that are whole or absent, and folders found again by a key.

A key holds everything that the contents depend on: the model's weights, dtype, hook, text, sizes,
seed and the versions of the libraries. Another value of any of them is another folder, so a stale
one cannot be used. A folder counts only once its marker is written, so what a killed run leaves is
never trusted. Delete the root at any time: it is computed again.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError

from msae_plugin.common.claims import CLAIM, claim_when_free, release
from msae_plugin.common.errors import InputError, RunFailure

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20


CACHE_VARIABLE = "MSAE_CACHE"
"""Environment variable that names the cache folder, in place of the platform's own."""


TEMPORARY_PREFIX = ".incomplete-"

# A disk or quota that is full, a file larger than allowed, a failing or read-only disk.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def _sync_folder(folder: Path) -> None:
    # Without this a rename can be lost with the power although the file's contents are safe.
    # Windows has no way to open a folder for it.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def disk_errors_told(target: Path) -> Generator[None]:
    """Tell what a full or failing disk does to a file or folder in one line, as RunFailure."""
    try:
        yield
    except RunFailure:  # a RuntimeError, which has told it
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise RunFailure(_not_written(target, str(error.strerror))) from error
    except (RuntimeError, SafetensorError) as error:
        # torch.save and safetensors say it in words of their own.
        text = str(error).strip()
        if not any(word in text for word in ("inline_container", "StreamWriter", "I/O error")):
            raise
        raise RunFailure(_not_written(target, text.splitlines()[0])) from error


def _not_written(target: Path, reason: str) -> str:
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return f"{target} cannot be written ({reason}); {human_bytes(free)} are free there"


def human_bytes(size: float) -> str:
    """A size in B, KiB, MiB, GiB or TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with file_written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def file_written_atomically(target: Path) -> Generator[Path]:
    """Give a temporary path whose file becomes `target` when the block ends well."""
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}-{target.name}")
    try:
        with disk_errors_told(target):
            yield temporary
            _sync_file(temporary)
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace a JSON file in one step; NaN and infinities become null, as strict JSON needs."""
    write_text_atomic(path, json.dumps(json_safe(value), indent=2) + "\n")


def json_safe(value: Any) -> Any:
    """The same value with what strict JSON cannot hold replaced: NaN by null, objects by text."""
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        return {str(key): json_safe(item) for key, item in mapping.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in cast("list[Any]", value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


@contextmanager
def folder_written_atomically(target: Path) -> Generator[Path]:
    """Give a temporary folder that becomes `target` when the block ends well.

    Every file is flushed to the disk before the rename, so that a folder found under its final
    name is complete. If the block raises, nothing is left. An existing target is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        with disk_errors_told(target):
            yield temporary
            for folder, _, files in os.walk(temporary, topdown=False):
                for file in files:
                    _sync_file(Path(folder) / file)
                _sync_folder(Path(folder))
        replaced: Path | None = None
        if target.exists():
            # A folder cannot be renamed onto a filled one: move the old one aside first.
            replaced = temporary.with_name(f"{temporary.name}-replaced")
            target.replace(replaced)
        temporary.replace(target)
        _sync_folder(target.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def held_in(output: Path) -> list[str]:
    """Names in the folder that `--output` names, less claims and what is unfinished."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {str(output)!r} is a file: give a folder")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    return [name for name in names if not name.startswith((TEMPORARY_PREFIX, CLAIM))]


def require_empty(output: Path) -> None:
    """Refuse an `--output` in which there is something."""
    if held_in(output):
        raise InputError(f"--output {str(output)!r} is not empty: choose another folder")


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what a killed process left unfinished in a folder and those below it."""
    leftovers = list(folder.rglob(f"{TEMPORARY_PREFIX}*"))
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return leftovers


def default_cache_dir() -> Path:
    """The folder for converted models: MSAE_CACHE, or the platform's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else user_cache_path("msae_plugin", appauthor=False)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    _add_contents(digest, path)
    return digest.hexdigest()


def _add_contents(digest: Any, path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)


MARKER = "complete.json"
HASH_CHARACTERS = 24
_DIGEST = "digest"


def default_cache() -> Path:
    """`evaluation/` in the package's cache folder (MSAE_CACHE)."""
    return default_cache_dir() / "evaluation"


def key_digest(key: Mapping[str, Any]) -> str:
    """The name of a key: the same for equal keys whatever the order of their entries.

    Raises TypeError where a value is not JSON: its text would not say what it is.
    """
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARACTERS]


def with_digest(contents: Mapping[str, Any]) -> dict[str, Any]:
    """JSON that carries a hash of itself, for `is_as_written`."""
    safe = cast("dict[str, Any]", json_safe(contents))
    return {**safe, _DIGEST: key_digest(safe)}


def is_as_written(contents: Mapping[str, Any]) -> bool:
    """Whether contents that `with_digest` gave are unchanged."""
    try:
        own = {key: value for key, value in contents.items() if key != _DIGEST}
        return contents.get(_DIGEST) == key_digest(own)
    except ValueError:  # no JSON that could be written
        return False


def keyed_folder(root: Path, kind: str, key: Mapping[str, Any]) -> Path:
    """The folder of a key, created when missing.

    It is emptied when a killed run left it unfinished, or when a byte of it was changed. Until
    `mark_complete` it belongs to this process; another one that asks for it waits.
    """
    folder = root / kind / key_digest(key)
    try:
        if not _is_whole(folder):
            # Another process may be filling it at this moment.
            claim_when_free(folder)
            if _is_whole(folder):
                release(folder)
            elif folder.is_dir():
                if is_complete(folder):
                    logger.warning("cache folder %s is damaged: it is computed again", folder)
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cache folder {folder} cannot be made ({error.strerror}): choose another with cache:"
        ) from error
    return folder


def is_complete(folder: Path) -> bool:
    """Whether the folder's contents were finished."""
    return (folder / MARKER).is_file()


def mark_complete(folder: Path, key: Mapping[str, Any]) -> None:
    """Declare the contents finished; their hashes and the key are written beside them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    write_json_atomic(folder / MARKER, with_digest({"key": key, "sha256": hashes}))
    release(folder)


def _is_whole(folder: Path) -> bool:
    """Whether a folder is finished and every file as it was then; version 0.1 kept no hashes."""
    if not is_complete(folder):
        return False
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    if not isinstance(marker, dict):
        return False
    if _DIGEST not in marker:
        return True
    hashes = cast("dict[str, str]", marker.get("sha256"))
    return is_as_written(marker) and all(
        (folder / name).is_file() and file_sha256(folder / name) == expected
        for name, expected in hashes.items()
    )


def kept_folder(
    root: Path, kind: str, key: Mapping[str, Any], compute: Callable[[Path], object]
) -> Path:
    """The finished folder of a key: filled by `compute` unless an earlier run has done so."""
    folder = keyed_folder(root, kind, key)
    if not is_complete(folder):
        try:
            with disk_errors_told(folder):
                compute(folder)
                mark_complete(folder, key)
        finally:
            release(folder)
    return folder


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, found without importing it: some load all their data."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(folders))) if folders else None


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions, for keys and records; `not installed` where there is none."""
    found: dict[str, str] = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of named tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # numpy has no bfloat16: hash the bytes.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_sha256(paths: Sequence[Path]) -> str:
    """Hash of files' names and contents, in the order of their names; a folder gives all in it."""
    digest = hashlib.sha256()
    for path in sorted(_files_in(paths)):
        digest.update(f"{path.name}|{path.stat().st_size}|".encode())
        _add_contents(digest, path)
    return digest.hexdigest()


def _files_in(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            # os.walk does not follow links to folders: trees of packages hold loops.
            for folder, _, names in os.walk(path):
                found += [Path(folder) / name for name in names]
        else:
            found.append(path)
    return found
