"""What went wrong between here and the Hugging Face Hub, in one line."""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.models.hub_access import first_line

_DISK_ERRORS = {errno.ENOSPC: "the disk is full", errno.EFBIG: "the file is too large for the disk"}
if hasattr(errno, "EDQUOT"):
    _DISK_ERRORS[errno.EDQUOT] = "the disk quota is used up"

LOG_IN = (
    "log in with `hf auth login`, or set HF_TOKEN, with a token that may write "
    "(https://huggingface.co/settings/tokens)"
)


def require_token() -> str:
    """The user's token.

    Raises:
        InputError: There is none, or the client was told to stay offline.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            "offline mode is on (HF_HUB_OFFLINE): unset it to publish, or look at the result with "
            "--dry-run"
        )
    token = get_token()
    if token is None:
        raise InputError(f"publishing needs a Hugging Face token: {LOG_IN}")
    return token


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error; None where there was no answer."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def disk_problem(error: BaseException) -> str | None:
    """What is wrong with the disk, None for an error of another kind.

    huggingface_hub wraps some errors in others; the chain of causes is followed.
    """
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            return _DISK_ERRORS[cause.errno]
    return None


def explained(error: Exception, doing: str) -> InputError | RunFailure:
    """The error to raise in place of what huggingface_hub raised.

    Args:
        error: From huggingface_hub, its HTTP library, or the disk.
        doing: What was being done, as in "reading user/repo".
    """
    disk = disk_problem(error)
    if disk is not None:
        return RunFailure(f"{doing}: {disk}; make room and run the command again")
    # huggingface_hub wraps what happened in errors of its own, some of which misname it.
    for cause in _chain(error):
        known = _recognised(cause, doing)
        if known is not None:
            return known
    return RunFailure(f"{doing}: {type(error).__name__}: {first_line(error)}; try again")


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _recognised(error: BaseException, doing: str) -> InputError | RunFailure | None:
    """The error to raise for one that says enough by itself."""
    if isinstance(error, (InputError, RunFailure)):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(f"{doing}: offline mode is on (HF_HUB_OFFLINE): unset it")
    if isinstance(error, GatedRepoError):
        return InputError(f"{doing}: the repository is gated: accept its terms on its page")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{doing}: there is no such repository, or it is private and you are not logged in "
            "(`hf auth login`)"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{doing}: there is no such revision (branch, tag or commit)")
    status = status_of(error)
    if status is None:
        return None
    if status == 401:
        return InputError(f"{doing}: the token is not valid (any more): {LOG_IN}")
    if status == 403:
        return InputError(f"{doing}: the token may not do this ({_said(error)}): {LOG_IN}")
    if status in (409, 412):
        return RunFailure(
            f"{doing}: somebody changed the repository meanwhile ({status}); run the command again"
        )
    if status >= 500:
        return RunFailure(f"{doing}: the Hub failed ({status}); try again later")
    return RunFailure(f"{doing}: the Hub refused ({status}: {_said(error)})")


def _said(error: BaseException) -> str:
    """The server's own words where the error keeps them."""
    said = getattr(error, "server_message", None) if isinstance(error, HfHubHTTPError) else None
    return str(said).splitlines()[0] if said else first_line(error)


@contextmanager
def hub_errors(doing: str) -> Generator[None]:
    """Turn every error of the block into one line.

    Args:
        doing: What the block does, as in "reading user/repo".

    Raises:
        InputError: The user can mend it: a name, a token, a permission.
        RunFailure: The network, the Hub or the disk failed.
    """
    try:
        yield
    # The HTTP library under huggingface_hub changed twice (requests, httpx, httpx2); the errors of
    # a failed connection share no base class but Exception.
    except Exception as error:
        raise explained(error, doing) from error
