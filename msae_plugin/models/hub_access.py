"""Access to the Hugging Face Hub: cached files first, every failure in one line.

transformers, TransformerLens and datasets each retry a hub that does not answer: one model load
without a network was measured at 127 s before its error. Here one request with a short time limit
says whether the repository can be had at all, and only then is anything downloaded.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from msae_plugin.common.errors import InputError, RunFailure, first_line, in_one_line

logger = logging.getLogger(__name__)

HUB_TIMEOUT_SECONDS = 5.0
"""How long the hub may take to answer the one request that asks whether a repository exists."""

# What a connection failed with, inside `hub_asked_once`; None outside.
_failures: ContextVar[list[Exception] | None] = ContextVar("failures", default=None)

TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@contextmanager
def hub_asked_once() -> Generator[None, None, None]:
    """Where many repositories are asked for: the first connection that fails stands for all.

    A network that swallows packets makes each request wait for its whole time limit. What the hub
    answers about one repository says nothing on the next and is not remembered.
    """
    token = _failures.set([])
    try:
        yield
    finally:
        _failures.reset(token)


def require_repository(
    name: str, kind: Literal["model", "dataset"], *, files: bool = False
) -> None:
    """Ask the hub once, for seconds at most, whether a repository (and its files) can be had."""
    remembered = _failures.get()
    if remembered:
        raise hub_refusal(name, kind, remembered[0])
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT_SECONDS)
        if files:
            # Anyone may see a gated repository; its files need accepted terms and a token.
            HfApi().auth_check(name)
    except HFValidationError as error:
        raise InputError(
            f"{kind} {name!r} is neither an existing folder nor a valid hub name",
            "give a folder, organisation/name, or packaged:NAME",
        ) from error
    # The client library behind huggingface_hub has changed twice (requests, httpx, httpx2); the
    # errors of a failed connection share no base class but Exception.
    except Exception as error:
        if remembered is not None and not isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled)):
            remembered.append(error)
        raise hub_refusal(name, kind, error) from error


class HubUnreachableError(InputError):
    """A repository is not cached, and the hub cannot be asked for it."""


def hub_refusal(name: str, kind: Literal["model", "dataset"], error: Exception) -> InputError:
    """Why the hub did not give a repository, and what to do about it."""
    refusal = _no_access(error, f"{kind} {name!r}", f"https://huggingface.co/{name}")
    if refusal is not None:
        return refusal
    reason = (
        "offline mode is on (HF_HUB_OFFLINE)"
        if isinstance(error, OfflineModeIsEnabled)
        else f"the hub answered with an error ({first_line(error)})"
        if isinstance(error, HfHubHTTPError)
        else f"the hub cannot be reached ({first_line(error)})"
    )
    return HubUnreachableError(
        f"{kind} {name!r} is not in the local cache and {reason}",
        f"give a local folder or a packaged: {kind}",
    )


def _no_access(error: BaseException, repository: str, page: str) -> InputError | None:
    """The refusal where the hub gives a repository to others alone, or has none."""
    if isinstance(error, GatedRepoError):
        return InputError(
            f"{repository} is gated on the Hugging Face Hub",
            f"accept its terms on {page} and log in with `hf auth login`",
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{repository} does not exist on the Hugging Face Hub, or is private",
            "check the spelling, or log in with `hf auth login`",
        )
    return None


def model_config_folder(name: str) -> Path:
    """A local folder that holds the config.json of a hub model; no weights are fetched."""
    cached = cached_file(name, "config.json")
    return cached.parent if cached is not None else downloaded(name, "config.json")


def model_folder(name: str) -> Path:
    """A local folder with the config, tokenizer and weights of a hub model.

    A complete snapshot in the local cache is used as it is, without asking the hub.
    """
    cached = cached_file(name, "config.json")
    if cached is not None and has_all_weights(cached.parent):
        return cached.parent
    logger.info("downloading %s from the Hugging Face Hub", name)
    folder = downloaded(name, *TEXT_FILES, "*.safetensors")
    if has_all_weights(folder):
        return folder
    # Older repositories hold pickled weights alone; both kinds would be twice the size.
    return downloaded(name, *TEXT_FILES, "*.bin")


def downloaded(name: str, *patterns: str) -> Path:
    """A folder with the files of these names of a hub model; at once refused without network."""
    require_repository(name, "model")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        raise hub_refusal(name, "model", error) from error


def cached_file(name: str, file: str) -> Path | None:
    """A file of a repository in the local cache; None where it is not there."""
    try:
        cached = try_to_load_from_cache(name, file, cache_dir=constants.HF_HUB_CACHE)
    except HFValidationError:
        return None  # `require_repository` says what is wrong with the name
    return Path(cached) if isinstance(cached, str) else None


def has_all_weights(folder: Path) -> bool:
    """Whether a folder holds every weight file that it should.

    A cached snapshot may stem from an interrupted download, or from a tool that wanted the
    tokenizer alone.
    """
    for index in _WEIGHT_INDEXES:
        if (folder / index).is_file():
            shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            return all((folder / shard).is_file() for shard in shards)
    return any((folder / weights).is_file() for weights in _WEIGHT_FILES)


_DISK_ERRORS = {errno.ENOSPC: "the disk is full", errno.EFBIG: "the file is too large for the disk"}
if hasattr(errno, "EDQUOT"):
    _DISK_ERRORS[errno.EDQUOT] = "the disk quota is used up"

LOG_IN = (
    "log in with `hf auth login`, or set HF_TOKEN, with a token that may write "
    "(https://huggingface.co/settings/tokens)"
)


def require_token() -> str:
    """The user's token."""
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


def explained(error: Exception, doing: str) -> InputError | RunFailure:
    """The error to raise in place of what huggingface_hub raised, while `reading user/repo`."""
    # huggingface_hub wraps what happened in errors of its own, some of which misname it.
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            disk = _DISK_ERRORS[cause.errno]
            return RunFailure(f"{doing}: {disk}; make room and run the command again")
    for cause in chain:
        known = _recognised(cause, doing)
        if known is not None:
            return known
    return RunFailure(f"{doing}: {in_one_line(error)}; try again")


def _recognised(error: BaseException, doing: str) -> InputError | RunFailure | None:
    """The error to raise for one that says enough by itself."""
    if isinstance(error, (InputError, RunFailure)):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(f"{doing}: offline mode is on (HF_HUB_OFFLINE): unset it")
    refusal = _no_access(error, f"{doing}: the repository", "its page")
    if refusal is not None:
        return refusal
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
    return str(said).strip().splitlines()[0] if said else first_line(error)


@contextmanager
def hub_errors(doing: str) -> Generator[None]:
    """Turn every error of the block into one line."""
    try:
        yield
    # The HTTP library under huggingface_hub changed twice (requests, httpx, httpx2); the errors of
    # a failed connection share no base class but Exception.
    except Exception as error:
        raise explained(error, doing) from error
