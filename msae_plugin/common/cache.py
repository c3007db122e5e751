"""Folders for what an evaluation computes of the language model alone, found again by their key.

A key holds everything that the contents depend on: the model's weights, dtype, hook, text, sizes,
seed and the versions of the libraries. Another value of any of them is another folder, so a stale
one cannot be used. A folder counts only once its marker is written, so what a killed run leaves is
never trusted. Delete the root at any time: it is computed again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import default_cache_dir, write_json_atomic

MARKER = "complete.json"
HASH_CHARACTERS = 24
_READ_BYTES = 1 << 20


def default_cache() -> Path:
    """`evaluation/` in the package's cache folder (MSAE_CACHE)."""
    return default_cache_dir() / "evaluation"


def key_digest(key: Mapping[str, Any]) -> str:
    """The name of a key: the same for equal keys whatever the order of their entries.

    Raises:
        TypeError: A value is not JSON: its text would not say what it is.
    """
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARACTERS]


def keyed_folder(root: Path, kind: str, key: Mapping[str, Any]) -> Path:
    """The folder of a key, created when missing; emptied when a killed run left it unfinished.

    Args:
        root: Root of the caches.
        kind: What it holds; the name of the folder above.
        key: Everything that the contents depend on, JSON-able.

    Returns:
        The folder. `is_complete` tells whether it may be read; `mark_complete` says so for others.

    Raises:
        InputError: The folder cannot be made.
    """
    folder = root / kind / key_digest(key)
    if folder.is_dir() and not is_complete(folder):
        shutil.rmtree(folder)
    try:
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
    """Declare the contents finished, and write the key beside them for people to read."""
    write_json_atomic(folder / MARKER, dict(key))


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
        with path.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
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
