"""SAEs from folders and from the hub: what may be loaded at all, and why the rest may not."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from safetensors import SafetensorError

from msae_plugin.common.cache import tensors_sha256
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.models.hub_access import explain_hub_error, require_repository
from msae_plugin.saes.describe import CheckpointInfo, read_checkpoint
from msae_plugin.saes.export import REPORT_FILENAME
from msae_plugin.saes.find import FolderSource, HubSource, LocatedSAE, unfinished_run

FOLDED_SCALINGS = ("expected_average_only_in", "covariance_whitening")
"""SAELens' scalings whose factors are in no file until training ends and folds them away."""

_READ_BYTES = 1 << 20


class BrokenSAEError(RunFailure):
    """An SAE that is there and can be read, but has no numbers: never trained, or NaN weights."""


def load_sae(found: LocatedSAE, device: str) -> tuple[SAE[Any], str]:
    """Load an SAE in float32, and hash its weights as they are stored.

    Args:
        found: Where it is; what is in a folder needs no network.
        device: A torch device.

    Returns:
        The SAE, and the sha256 of sae_weights.safetensors (of the loaded tensors where a release
        keeps its weights in another format).

    Raises:
        InputError: It cannot be had or loaded, was not trained, or is a training checkpoint that
            computes something else than the SAE it would be exported as.
    """
    if isinstance(found.source, FolderSource):
        folder = found.source.folder
        sae = _load_folder(found, folder, device)
        return sae, _file_sha256(folder / SAE_WEIGHTS_FILENAME)
    sae = _load_from_hub(found, found.source, device)
    file = _cached(found.source.repository, f"{found.source.path}/{SAE_WEIGHTS_FILENAME}")
    return sae, tensors_sha256(sae.state_dict()) if file is None else _file_sha256(file)


def _load_folder(found: LocatedSAE, folder: Path, device: str) -> SAE[Any]:
    info = read_checkpoint(folder)  # names a truncated file
    where = f"SAE {found.reference!r}"
    if info.kind == "training checkpoint":
        _require_inference_form(info, where)
    steps = _training_steps(info)
    if steps is not None and steps < 1:
        raise BrokenSAEError(
            f"{where} has zero training steps: there is nothing to evaluate; train it"
        )
    with _loading_errors(where, info.architecture):
        return SAE.load_from_disk(folder, device=device, dtype="float32")


def _require_inference_form(info: CheckpointInfo, where: str) -> None:
    """Some training checkpoints are inference SAEs as they stand; refuse the others."""
    scaled = _config(info.folder).get("normalize_activations") in FOLDED_SCALINGS
    if not scaled and _same_in_inference(info.architecture):
        return
    run = next((parent for parent in info.folder.parents if (parent / "run.json").is_file()), None)
    if run is None:
        advice = "export it with sae.save_inference_model(FOLDER) and give FOLDER"
    else:
        advice = unfinished_run(run) or f"give the finished run, {run}"
    why = (
        "whose activation scaling is not folded yet"
        if scaled
        else f"and {info.architecture} is another SAE in training"
    )
    raise InputError(f"{where} is a training checkpoint {why}: {advice}")


def _same_in_inference(architecture: str) -> bool:
    """Whether SAELens' inference class of that name computes what the training class does."""
    inference = SAE_CLASS_REGISTRY.get(architecture)
    training = SAE_TRAINING_CLASS_REGISTRY.get(architecture)
    # `multiscale` has one name for both, but other weights.
    return (
        inference is not None
        and training is not None
        and inference[0].__module__ == training[0].__module__
        and inference[0].__module__.startswith("sae_lens.")
    )


def _training_steps(info: CheckpointInfo) -> int | None:
    """Steps that the SAE was trained for, where any file beside it says so."""
    if info.metadata.get("training_steps") is not None:
        return int(info.metadata["training_steps"])
    runner = _config(info.folder, RUNNER_CFG_FILENAME)
    tokens, batch = runner.get("training_tokens"), runner.get("train_batch_size_tokens")
    if tokens is not None and batch:
        return int(tokens) // int(batch)
    export = info.folder.parent / REPORT_FILENAME
    # Only a trained SAE is exported (hub.export_run); a hand-made report may still say otherwise.
    if export.is_file() and _config(info.folder.parent, REPORT_FILENAME).get("l0_exported") == 0:
        return 0
    return None


def _config(folder: Path, name: str = SAE_CFG_FILENAME) -> dict[str, Any]:
    try:
        content: object = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _load_from_hub(found: LocatedSAE, source: HubSource, device: str) -> SAE[Any]:
    where = f"SAE {found.reference!r}"
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=source.repository, repo_type="model"
    )
    if not cache.is_dir():
        try:
            require_repository(source.repository, "model")
        except InputError as error:
            raise InputError(f"{where}: {_for_sae(str(error))}") from error
    if not source.registered:
        _require_inference_repository(source, where)
    with _hub_errors(source, where), _loading_errors(where, "its architecture"):
        return SAE.from_pretrained(source.release, source.sae_id, device=device, dtype="float32")


def _require_inference_repository(source: HubSource, where: str) -> None:
    with _hub_errors(source, where):
        file = hf_hub_download(source.repository, f"{source.path}/{SAE_CFG_FILENAME}")
    config = _config(Path(file).parent)
    if "decoder_init_norm" in config and not _same_in_inference(str(config.get("architecture"))):
        raise InputError(
            f"{where} is a training checkpoint: its author must publish the SAE that "
            "save_inference_model writes"
        )


@contextmanager
def _hub_errors(source: HubSource, where: str) -> Generator[None, None, None]:
    try:
        yield
    except InputError:
        raise
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # no network, rather than no such file
            explained = _for_sae(explain_hub_error(source.repository, "model", error))
            raise InputError(f"{where}: {explained}") from error
        raise InputError(
            f"{where}: {source.repository} has no {source.path}/{SAE_CFG_FILENAME}: give the "
            f"folder of an SAE in it, see https://huggingface.co/{source.repository}/tree/main"
        ) from error
    # As in hub_access: the errors of a failed connection share no base class but Exception.
    except Exception as error:
        explained = _for_sae(explain_hub_error(source.repository, "model", error))
        raise InputError(f"{where}: {explained}") from error


def _for_sae(explained: str) -> str:
    """`hub_access` explains for language models, which packages may carry."""
    return explained.replace("a local folder or a packaged: model", "a local copy of its folder")


@contextmanager
def _loading_errors(where: str, architecture: str) -> Generator[None, None, None]:
    try:
        with warnings.catch_warnings():
            # How to load the language model, which is not SAELens' to do here.
            warnings.filterwarnings("ignore", message=".*model_from_pretrained_kwargs")
            yield
    except KeyError as error:
        raise InputError(
            f"{where}: SAELens knows no architecture {error}: known are "
            f"{', '.join(sorted(SAE_CLASS_REGISTRY))}; import the package that registers it"
        ) from error
    # Weights that do not fit the config (load_state_dict), configs that lack or repeat fields.
    except (RuntimeError, ValueError, TypeError, SafetensorError) as error:
        if isinstance(error, InputError | EntryNotFoundError | HFValidationError):
            raise  # the hub's, which are ValueErrors too
        raise InputError(
            f"{where} cannot be loaded as {architecture} ({' '.join(str(error).split())[:200]}): "
            f"{SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME} must belong together"
        ) from error


def _cached(repository: str, file: str) -> Path | None:
    try:
        found = try_to_load_from_cache(repository, file, cache_dir=constants.HF_HUB_CACHE)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
