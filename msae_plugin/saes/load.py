"""Any SAE reference, loaded as the evaluations need it.

Float32, eval mode, decoder rows of unit norm. SAEBench folds decoder norms only into SAEs that it
loads by release; folding happens here, in float32, before anything is cast down.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from safetensors import SafetensorError

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import file_sha256, tensors_sha256
from msae_plugin.common.stored import read_json_object
from msae_plugin.models.hook_names import common_style, parse_hook_name
from msae_plugin.models.hub_access import (
    HubUnreachableError,
    cached_file,
    hub_refusal,
    require_repository,
)
from msae_plugin.models.loading import require_convertible
from msae_plugin.registration import register
from msae_plugin.saes.find import (
    HubSource,
    LocatedSAE,
    StoredSAE,
    holds_nan,
    locate,
    read_checkpoint,
    unfinished_run,
)

FOLDED_SCALINGS = ("expected_average_only_in", "covariance_whitening")
"""SAELens' scalings whose factors are in no file until training ends and folds them away."""


class BrokenSAEError(RunFailure):
    """An SAE that is there and can be read, but has no numbers: never trained, or NaN weights."""


def load_sae(found: LocatedSAE, device: str) -> tuple[SAE[Any], str]:
    """Load an SAE in float32, and hash its weights as they are stored.

    The sha256 is of sae_weights.safetensors, or of the loaded tensors where a release keeps its
    weights in another format. What is in a folder needs no network.
    """
    if isinstance(found.source, Path):
        info = read_checkpoint(found.source)  # names a truncated file
        sha256 = info.weights_sha256  # names a damaged one
        return _load_folder(found, info, device), sha256
    sae = _load_from_hub(found, found.source, device)
    file = cached_file(found.source.repository, f"{found.source.path}/{SAE_WEIGHTS_FILENAME}")
    return sae, tensors_sha256(sae.state_dict()) if file is None else file_sha256(file)


def _load_folder(found: LocatedSAE, info: StoredSAE, device: str) -> SAE[Any]:
    where = f"SAE {found.reference!r}"
    if info.kind == "training checkpoint":
        _require_inference_form(info, where)
    steps = _training_steps(info)
    if steps is not None and steps < 1:
        raise BrokenSAEError(
            f"{where} has zero training steps: there is nothing to evaluate; train it"
        )
    # Before SAELens makes tensors of these sizes, which may not fit into memory.
    if info.d_in * info.d_sae > info.parameters:
        raise InputError(
            f"{where}: {SAE_CFG_FILENAME} says {info.d_sae:,} latents of width {info.d_in:,}, and "
            f"{SAE_WEIGHTS_FILENAME} holds only {info.parameters:,} numbers: they must belong "
            "together"
        )
    with _loading_errors(where, info.architecture):
        return SAE.load_from_disk(info.folder, device=device, dtype="float32")


def _require_inference_form(info: StoredSAE, where: str) -> None:
    """Some training checkpoints are inference SAEs as they stand; refuse the others."""
    scaled = info.config.get("normalize_activations") in FOLDED_SCALINGS
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


def _training_steps(info: StoredSAE) -> int | None:
    """Steps that the SAE was trained for, where any file beside it says so."""
    if info.metadata.get("training_steps") is not None:
        return int(info.metadata["training_steps"])
    try:
        runner = read_json_object(info.folder / RUNNER_CFG_FILENAME)
    except InputError:
        runner = {}
    tokens, batch = runner.get("training_tokens"), runner.get("train_batch_size_tokens")
    if tokens is not None and batch:
        return int(tokens) // int(batch)
    # Only a trained SAE is exported (`saes/export.py`); a hand-made report may still say otherwise.
    return 0 if info.report.get("l0_exported") == 0 else None


def _load_from_hub(found: LocatedSAE, source: HubSource, device: str) -> SAE[Any]:
    where = f"SAE {found.reference!r}"
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=source.repository, repo_type="model"
    )
    with _hub_errors(source, where):
        if not cache.is_dir():
            require_repository(source.repository, "model")
        if not source.registered:
            file = hf_hub_download(source.repository, f"{source.path}/{SAE_CFG_FILENAME}")
            config = read_json_object(Path(file))
            architecture = str(config.get("architecture"))
            if "decoder_init_norm" in config and not _same_in_inference(architecture):
                raise InputError(
                    f"{where} is a training checkpoint: its author must publish the SAE that "
                    "save_inference_model writes"
                )
        with _loading_errors(where, "its architecture"):
            return SAE.from_pretrained(
                source.release, source.sae_id, device=device, dtype="float32"
            )


@contextmanager
def _hub_errors(source: HubSource, where: str) -> Generator[None, None, None]:
    try:
        yield
    # As in hub_access: the errors of a failed connection share no base class but Exception.
    except Exception as error:
        # Without a network it is a `LocalEntryNotFoundError`, with one there is no such file.
        missing = isinstance(error, EntryNotFoundError)
        if missing and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(
                f"{where}: {source.repository} has no {source.path}/{SAE_CFG_FILENAME}: give the "
                f"folder of an SAE in it, see https://huggingface.co/{source.repository}/tree/main"
            ) from error
        if isinstance(error, InputError) and str(error).startswith(where):
            raise
        told = isinstance(error, InputError)
        refusal = error if told else hub_refusal(source.repository, "model", error)
        # `hub_access` advises on language models, which packages may carry.
        unreachable = isinstance(refusal, HubUnreachableError)
        how = "give a local copy of its folder" if unreachable else refusal.how
        raise InputError(f"{where}: {refusal.what}", how) from error


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
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        SafetensorError,
    ) as error:
        if isinstance(error, InputError | EntryNotFoundError | HFValidationError):
            raise  # the hub's, which are ValueErrors too
        raise InputError(
            f"{where} cannot be loaded as {architecture} ({' '.join(str(error).split())[:200]}): "
            f"{SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME} must belong together"
        ) from error


logger = logging.getLogger(__name__)

# Residual streams under the names that transformers gives the layers.
_LAYER_OUTPUT = re.compile(r"(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)")
_NAME_CHARACTERS = 150
_HASH_CHARACTERS = 8
# As SAEBench checks it in float32 (`general_utils.check_decoder_norms`).
_NORM_TOLERANCE = 1e-5
# Arguments of loading a model that change neither its weights nor what it computes.
_HARMLESS_ARGUMENTS = frozenset({"dtype", "torch_dtype", "device", "n_devices", "cache_dir"})


def load_saes(
    references: Sequence[str],
    *,
    device: str = "cpu",
    hook: str | None = None,
    model_name: str | None = None,
    on_broken: Callable[[str, str], None] | None = None,
) -> list[EvaluatedSAE]:
    """Load the SAEs behind references.

    A hook stands in place of what their metadata say; the model's name is for SAEs that name none.
    `on_broken` is called with name and reason for each SAE that was never trained or holds NaN, and
    the others are loaded all the same; without it the first such SAE raises `BrokenSAEError`.
    """
    if not references:
        raise InputError(
            "no SAE is given: name a run, a folder, user/repo:folder or release:sae_id"
        )
    register()  # SAELens must know `multiscale` before it reads a cfg.json
    located = [found for reference in references for found in locate(reference)]
    seen: dict[Path | HubSource, str] = {}
    for found in located:
        if found.source in seen:
            raise InputError(
                f"{found.reference!r} and {seen[found.source]!r} are the same SAE: give it once"
            )
        seen[found.source] = found.reference
    saes: list[EvaluatedSAE] = []
    broken: list[tuple[str, str]] = []
    for found in located:
        try:
            saes.append(_load(found, device, hook, model_name))
        except BrokenSAEError as error:
            if on_broken is None:
                raise
            broken.append((found.name, str(error)))
    taken: set[str] = set()
    saes = _with_unique_names(saes, taken)
    for name, reason in broken:
        if on_broken is not None:
            on_broken(_unused(name, taken), reason)
    return saes


load_subjects = load_saes
"""Its name in version 0.1."""


def sae_record(evaluated: EvaluatedSAE) -> dict[str, Any]:
    """The record of an SAE in `summary.json`."""
    config = evaluated.sae.cfg
    return {
        "reference": evaluated.reference,
        "weights_sha256": evaluated.weights_sha256,
        "architecture": config.architecture(),
        "hook_name": evaluated.hook_name,
        "model_name": evaluated.model_name,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
    }


def transformer_lens_hook(hook: str) -> str:
    """A hook's name as TransformerLens has it: `model.layers.9` is `blocks.9.hook_resid_post`."""
    if hook.rsplit(".", 1)[-1].startswith("hook_"):
        return hook
    layer = _LAYER_OUTPUT.fullmatch(hook)
    if layer is None:
        raise InputError(
            f"SAEBench reads TransformerLens' hook points and {hook!r} is none: give the one with "
            "the same activations as --hook, for example blocks.9.hook_resid_post"
        )
    return f"blocks.{layer.group(1)}.hook_resid_post"


def check_evaluable(model_name: str, hooks: Sequence[str], loader: str = "auto") -> None:
    """Say before a model is loaded which of its hooks can be trained on and not evaluated."""
    if common_style(hooks) == "transformer_lens":
        require_convertible(model_name, loader)
    try:
        require_convertible(model_name, loader)
        for hook in hooks:
            if parse_hook_name(transformer_lens_hook(hook)).layer is None:
                raise InputError(f"SAEBench finds the layer in a hook's name, {hook!r} names none")
    except InputError as error:
        logger.warning("SAEs of this run can be trained, msae eval cannot measure them: %s", error)


def fold_decoder_norms(sae: SAE[Any], name: str) -> None:
    """Give the decoder rows unit norm and let the encoder make up for it, in place.

    A row of zeros stays one: its latent contributes nothing.
    """
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError as error:
        norms = sae.W_dec.detach().norm(dim=-1)
        if torch.allclose(norms, torch.ones_like(norms), atol=_NORM_TOLERANCE):
            return
        raise InputError(
            f"SAE {name!r}: decoder norms of architecture {sae.cfg.architecture()} cannot be "
            f"folded into the encoder and are {float(norms.min()):.3g} to "
            f"{float(norms.max()):.3g}, where SAEBench needs 1: train it with unit-norm decoder "
            "rows or, for topk, with rescale_acts_by_decoder_norm"
        ) from error


def _load(found: LocatedSAE, device: str, hook: str | None, model_name: str | None) -> EvaluatedSAE:
    sae, weights_sha256 = load_sae(found, device)
    reads: str | None = hook or sae.cfg.metadata.hook_name
    if not reads:
        raise InputError(
            f"SAE {found.reference!r} does not say where in the model it reads: give it as hook in "
            "the evaluation config, or with --hook, for example blocks.9.hook_resid_post"
        )
    try:
        hook_name = transformer_lens_hook(reads)
    except InputError as error:
        raise InputError(f"SAE {found.reference!r}: {error}") from error
    model_name = sae.cfg.metadata.model_name or model_name
    if not model_name:
        raise InputError(
            f"SAE {found.reference!r} does not say which language model it is for: give it as "
            "model.name in the evaluation config, or with --model"
        )
    _require_evaluable(sae, found.reference, hook_name)
    _require_finite(sae, found.reference, "holds NaN or infinite values: its training diverged")
    fold_decoder_norms(sae, found.reference)
    _require_finite(sae, found.reference, "becomes NaN when its decoder norms are folded")
    sae.eval()
    return EvaluatedSAE(
        name=found.name,
        reference=found.reference,
        sae=sae,
        weights_sha256=weights_sha256,
        model_name=model_name,
        hook_name=hook_name,
        folder=found.source if isinstance(found.source, Path) else None,
    )


def _require_evaluable(sae: SAE[Any], reference: str, hook_name: str) -> None:
    metadata = sae.cfg.metadata
    target = metadata.hook_name_out
    if "transcoder" in sae.cfg.architecture() or (target and target != metadata.hook_name):
        raise InputError(
            f"SAE {reference!r} is a transcoder, from {hook_name} to {target or 'another hook'}: "
            "SAEBench evaluates reconstructions of what is read"
        )
    if sae.cfg.normalize_activations in FOLDED_SCALINGS:
        logger.warning(
            "SAE %r expects activations scaled by a factor that is not in its files "
            "(normalize_activations is %s): its results are those of unscaled activations",
            reference,
            sae.cfg.normalize_activations,
        )
    arguments = dict(metadata.model_from_pretrained_kwargs or {})
    changed = sorted(set(arguments) - _HARMLESS_ARGUMENTS)
    if changed:
        logger.warning(
            "SAE %r was made on a model loaded with %s; here it is loaded without",
            reference,
            ", ".join(f"{key}={arguments[key]!r}" for key in changed),
        )


def _require_finite(sae: SAE[Any], reference: str, problem: str) -> None:
    for name, tensor in sae.state_dict().items():
        if holds_nan(name, tensor):
            raise BrokenSAEError(f"SAE {reference!r}: {name} {problem}")


def _with_unique_names(saes: Sequence[EvaluatedSAE], taken: set[str]) -> list[EvaluatedSAE]:
    """Names that collide get the start of their weights' hash: it depends on no order."""
    short = [evaluated.name[:_NAME_CHARACTERS] for evaluated in saes]
    # Without case: two names that differ in it alone are one file on some systems.
    count = Counter(name.casefold() for name in short)
    named: list[EvaluatedSAE] = []
    for evaluated, name in zip(saes, short, strict=True):
        unique = name
        if count[name.casefold()] > 1 or name != evaluated.name:
            unique = f"{name}-{evaluated.weights_sha256[:_HASH_CHARACTERS]}"
        # Taken where the same weights are in two places.
        named.append(replace(evaluated, name=_unused(unique, taken)))
    return named


def is_told_apart(name: str, weights_sha256: str | None) -> bool:
    """Whether a name carries the hash that tells it from others of the same name."""
    return bool(weights_sha256) and f"-{weights_sha256[:_HASH_CHARACTERS]}" in name


def _unused(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken."""
    unique, copy = name, 1
    while unique.casefold() in taken:
        copy += 1
        unique = f"{name}-{copy}"
    taken.add(unique.casefold())
    return unique


@dataclass(frozen=True)
class EvaluatedSAE:
    """An SAE under evaluation."""

    name: str  # unique in one evaluation, safe as a file name
    reference: str  # what the user wrote
    # In float32 and eval mode, decoder norms folded in float32. Shared by all evaluations: none
    # changes it; SAEBench, which writes into an SAE and its config, gets a copy.
    sae: SAE[Any]
    weights_sha256: str  # hash of the weights as they were loaded, before folding
    model_name: str | None  # the language model in the checkpoint's metadata
    hook_name: str  # where the SAE reads, TransformerLens style
    folder: Path | None = None  # the checkpoint's folder, where it is local

    @property
    def layer(self) -> int:
        """The first number in the hook's name, which is how SAEBench finds the layer."""
        found = re.search(r"\d+", self.hook_name)
        if found is None:
            raise RunFailure(f"SAE {self.name!r}: hook {self.hook_name!r} names no layer")
        return int(found.group())

    def for_saebench(self, dtype: torch.dtype, device: str) -> SAE[Any]:
        """A copy that SAEBench may change: cast as it casts, its metadata complete."""
        sae = copy.deepcopy(self.sae).to(device=device, dtype=dtype)
        sae.cfg.dtype = str(dtype).removeprefix("torch.")
        metadata = sae.cfg.metadata
        metadata.model_name = self.model_name
        metadata.hook_name = self.hook_name
        metadata.hook_layer = self.layer
        # SAELens stores what the model was loaded with; a dtype in it makes SAEBench's core fail
        # ("multiple values for keyword argument 'dtype'"), and here the model is loaded already.
        metadata.model_from_pretrained_kwargs = {}
        if metadata.prepend_bos is None:
            metadata.prepend_bos = True
        return sae
