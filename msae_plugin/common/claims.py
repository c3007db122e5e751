"""Folders that one process at a time may write.

A claim is a file that is made exclusively and says which process holds the folder. It goes with its
process: one whose process has ended is taken over. Of a process on another machine nobody here can
tell whether it lives; its claim counts until somebody deletes the file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.errors import InputError

logger = logging.getLogger(__name__)

CLAIM = ".claim"
"""The file's name, in the claimed folder."""

# Between making its claim and writing into it a process may be killed, and leaves an empty one.
_EMPTY_FOR_SECONDS = 2
_STARTING = "a process that is just starting"
_POLL_SECONDS = 0.5
# Python makes folders one inside the other by recursion.
_DEEPEST = 100


@contextmanager
def claimed_output(folder: Path, share: str | None = None) -> Generator[None]:
    """Hold the folder of a command's results for the time of the block; it is made if need be.

    A folder that was made and that nothing was written into is gone afterwards. `share` is which of
    several processes that divide the work this is.
    """
    made = folders_to_make(folder)
    claim = folder / (CLAIM if share is None else f"{CLAIM}-{share}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = _taken(claim)
        others = folder.glob(f"{CLAIM}*") if share is None else (folder / CLAIM,)
        for other in others:
            if holder is None and other != claim and (holder := _holder(other)) is not None:
                claim.unlink(missing_ok=True)
    except OSError as error:
        _remove_empty(made)
        raise InputError(
            f"--output {str(folder)!r} cannot be written ({error.strerror or error})",
            "choose another --output",
        ) from error
    if holder is not None:
        raise InputError(
            f"--output {str(folder)!r} is being written by {holder}",
            "wait until it has ended, or choose another --output",
        )
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)
        _remove_empty(made)


def folders_to_make(output: Path) -> list[Path]:
    """The folder for results and those above it that are not there, the innermost first."""
    missing = [path for path in (output, *output.parents) if not path.exists()]
    if len(missing) > _DEEPEST:
        raise InputError(
            f"--output {str(output)[:100]!r}... lies {len(missing)} folders below any that exists",
            f"give one that is at most {_DEEPEST} deep",
        )
    return missing


def is_held(folder: Path) -> bool:
    """Whether a process that lives, this one included, has claimed a folder."""
    claim = folder / CLAIM
    try:
        return json.loads(claim.read_text(encoding="utf-8")) == _own() or _living(claim) is not None
    except (OSError, ValueError):
        return False


def claim_when_free(folder: Path) -> None:
    """Wait until no other process holds a folder, then hold it until `release`.

    The claim lies beside the folder: its holder may empty the folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while (holder := _taken(_beside(folder))) is not None:
        if not told:
            logger.warning("%s is being written by %s: waiting for it", folder, holder)
            told = True
        time.sleep(_POLL_SECONDS)


def release(folder: Path) -> None:
    """Give up what `claim_when_free` took."""
    _beside(folder).unlink(missing_ok=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{CLAIM}-{folder.name}")


def _taken(claim: Path) -> str | None:
    """Make a claim file; who holds it where another process does."""
    own = json.dumps(_own()).encode()
    while True:
        try:
            descriptor = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if (holder := _holder(claim)) is not None:
                return holder
            _remove_stale(claim)
            continue
        try:
            os.write(descriptor, own)
        finally:
            os.close(descriptor)
        return None


def _own() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": _start_of(pid)}


def _holder(claim: Path) -> str | None:
    """As `_living`, once a process that is just starting has said who it is."""
    while (holder := _living(claim)) == _STARTING:
        time.sleep(_POLL_SECONDS)
    return holder


def _living(claim: Path) -> str | None:
    """The process that holds a claim, in words; None where it has ended, or is this one."""
    try:
        text, age = claim.read_text(encoding="utf-8"), time.time() - claim.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        held = cast("dict[str, Any]", json.loads(text))
        pid, host, started = int(held["pid"]), str(held["host"]), held["started"]
    except (ValueError, KeyError, TypeError):
        return _STARTING if abs(age) < _EMPTY_FOR_SECONDS else None
    if host != socket.gethostname():
        return f"process {pid} on {host} (if it has ended, delete {claim})"
    if pid == os.getpid() or not _runs(pid) or started != _start_of(pid):
        return None
    return f"process {pid}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _start_of(pid: int) -> str | None:
    """When a process began: numbers of processes are used again. None where Linux does not say."""
    try:
        # The name before it may hold spaces and brackets. Field 22 of man 5 proc_pid_stat.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _remove_stale(claim: Path) -> None:
    # Moved away first: of two processes that find it stale only one moves it. What was moved may
    # be the other's new claim, which is then put back.
    aside = claim.with_name(f"{claim.name}-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):
        claim.rename(aside)
        if _living(aside) is not None:
            with contextlib.suppress(OSError):
                os.link(aside, claim)
        aside.unlink()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
