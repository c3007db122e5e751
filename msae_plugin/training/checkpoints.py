"""Checkpoints that are whole or absent.

A checkpoint is a folder with SAELens' own files, one sub-folder per SAE, and a manifest with the
size and hash of every file. It is written under a temporary name, flushed to the disk and renamed;
what lacks a manifest or differs from it is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import (
    TEMPORARY_PREFIX,
    file_sha256,
    folder_written_atomically,
    is_as_written,
    remove_leftovers,
    with_digest,
    write_json_atomic,
)

logger = logging.getLogger(__name__)

MANIFEST_FILE = "checkpoint.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int  # Training steps completed
    tokens: int
    config: dict[str, Any]  # The run's configuration, as `RunConfig.to_dict` gave it


def open_checkpoint(path: Path, *, whole: bool = True) -> Checkpoint:
    """Read a checkpoint's manifest and check every file against it.

    Unless `whole`, by sizes alone. Version 0.1 kept no hashes.
    """
    manifest_path = path / MANIFEST_FILE
    if not manifest_path.is_file():
        raise InputError(
            f"{str(path)!r} is not a checkpoint of msae train: it has no {MANIFEST_FILE}"
        )
    try:
        manifest = cast("dict[str, Any]", json.loads(manifest_path.read_text(encoding="utf-8")))
        files = cast("dict[str, int]", manifest["files"])
        hashes = cast("dict[str, str]", manifest.get("sha256", {}))
        if hashes and not is_as_written(manifest):
            raise ValueError
        checkpoint = Checkpoint(
            path=path,
            step=int(manifest["step"]),
            tokens=int(manifest["tokens"]),
            config=cast("dict[str, Any]", manifest["config"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _unusable(manifest_path, "damaged") from error
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            raise _unusable(file, "missing")
        if file.stat().st_size != size:
            raise _unusable(file, f"truncated ({file.stat().st_size} of {size} bytes)")
        if whole and name in hashes and file_sha256(file) != hashes[name]:
            raise _unusable(file, "damaged (its bytes are not those that were written)")
    return checkpoint


def _unusable(file: Path, state: str) -> InputError:
    return InputError(f"checkpoint file {str(file)!r} is {state}: resume from another checkpoint")


class CheckpointStore:
    """The `checkpoints/` folder of a run, of which the newest `keep` stay.

    0 keeps none once the run is finished. Only one process writes, the others read.
    """

    def __init__(self, folder: Path, keep: int, *, writes: bool = True) -> None:
        self.folder = folder
        self._keep = keep
        if writes:
            remove_leftovers(folder)

    def folder_of(self, tokens: int) -> Path:
        """Folder of the checkpoint at this many tokens."""
        return self.folder / str(tokens)

    def complete(self) -> list[Checkpoint]:
        """All complete checkpoints by their files' sizes, oldest first; the others are named."""
        found = (self._opened(path, whole=False) for path in self._folders())
        return sorted(
            (checkpoint for checkpoint in found if checkpoint is not None),
            key=lambda checkpoint: checkpoint.step,
        )

    def _folders(self) -> list[Path]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return [p for p in paths if p.is_dir() and not p.name.startswith(TEMPORARY_PREFIX)]

    def _opened(self, path: Path, *, whole: bool) -> Checkpoint | None:
        try:
            return open_checkpoint(path, whole=whole)
        except InputError as error:
            logger.warning("%s", error)
            return None

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint whose bytes are as they were written, None without any."""
        found = (self._opened(checkpoint.path, whole=True) for checkpoint in self.complete()[::-1])
        return next((checkpoint for checkpoint in found if checkpoint is not None), None)

    def remove_after(self, step: int) -> None:
        """Remove what a run that goes on at this step has passed by: damaged checkpoints.

        They would count as the newest, and be kept in place of whole ones. A whole one fails:
        another process wrote it since this one looked.
        """
        kept = {checkpoint.path for checkpoint in self.complete() if checkpoint.step <= step}
        for path in self._folders():
            if path in kept:
                continue
            with contextlib.suppress(InputError):  # named already
                open_checkpoint(path)
                raise RunFailure(f"{str(path)!r} was written meanwhile: resume once more")
            self._remove(path)

    def save(
        self, step: int, tokens: int, config: dict[str, Any], write: Callable[[Path], None]
    ) -> Path:
        """Write a checkpoint named after its tokens, then remove the oldest beyond `keep`."""
        target = self.folder_of(tokens)
        with folder_written_atomically(target) as temporary:
            write(temporary)
            files = {
                str(path.relative_to(temporary).as_posix()): path.stat().st_size
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            manifest = {
                "format": MANIFEST_FORMAT,
                "step": step,
                "tokens": tokens,
                "files": files,
                "sha256": {name: file_sha256(temporary / name) for name in files},
                "config": config,
            }
            write_json_atomic(temporary / MANIFEST_FILE, with_digest(manifest))
        # While the run goes on the newest one is always kept: it is what a kill falls back to.
        self.prune(max(self._keep, 1))
        return target

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` complete checkpoints."""
        checkpoints = self.complete()
        for checkpoint in checkpoints[: max(len(checkpoints) - keep, 0)]:
            self._remove(checkpoint.path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a kill half-way leaves what `remove_leftovers` knows to delete.
        doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-pruned")
        path.replace(doomed)
        shutil.rmtree(doomed)

    def finish(self) -> None:
        """The run is complete: keep what the user asked for."""
        self.prune(self._keep)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def resolve(self, resume: str) -> Checkpoint | None:
        """The checkpoint that `--resume` means: a path, or `auto` for the newest of this folder.

        None for `auto` when there is none yet. Refuses a path with newer ones in this folder.
        """
        chosen = None if resume == "auto" else open_checkpoint(Path(resume))
        newest = self.newest()
        if chosen is None:
            for path in self._folders() if newest is None else ():
                open_checkpoint(path)  # to name what is damaged: nothing is left to go on from
            return newest
        if newest is not None and newest.step > chosen.step:
            raise InputError(
                f"{resume!r} is at step {chosen.step} but this run already has the later "
                f"{str(newest.path)!r}: use --resume auto, or another --output"
            )
        return chosen
