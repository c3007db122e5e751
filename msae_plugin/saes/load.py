"""Any SAE reference, loaded as the evaluations need it.

Float32, eval mode, decoder rows of unit norm. SAEBench folds decoder norms only into SAEs that it
loads by release; folding happens here, in float32, before anything is cast down.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.registration import register
from msae_plugin.saes.find import FolderSource, HubSource, LocatedSAE, locate
from msae_plugin.saes.subject_loading import FOLDED_SCALINGS, BrokenSAEError, load_sae

logger = logging.getLogger(__name__)

# Residual streams under the names that transformers gives the layers.
_LAYER_OUTPUT = re.compile(r"(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)")
_NAME_CHARACTERS = 150
_HASH_CHARACTERS = 8
# As SAEBench checks it in float32 (`general_utils.check_decoder_norms`).
_NORM_TOLERANCE = 1e-5
# Arguments of loading a model that change neither its weights nor what it computes.
_HARMLESS_ARGUMENTS = frozenset({"dtype", "torch_dtype", "device", "n_devices", "cache_dir"})


def load_subjects(
    references: Sequence[str],
    *,
    device: str = "cpu",
    hook: str | None = None,
    model_name: str | None = None,
    on_broken: Callable[[str, str], None] | None = None,
) -> list[Subject]:
    """Load the SAEs behind references.

    Args:
        references: Runs, folders, `user/repo:folder` or `release:sae_id`; see
            `subject_references`. What is on the disk needs no network.
        device: A torch device.
        hook: Where the SAEs read, in place of what their metadata say.
        model_name: The language model of SAEs whose metadata name none.
        on_broken: Called with name and reason for each SAE that was never trained or holds NaN;
            the others are loaded all the same.

    Returns:
        One subject per SAE, in the order of the references.

    Raises:
        InputError: A reference leads to no SAE, to one that is not finished, or to one that
            SAEBench cannot evaluate.
        BrokenSAEError: One was never trained or holds NaN, and nobody is told (`on_broken`).
    """
    if not references:
        raise InputError(
            "no SAE is given: name a run, a folder, user/repo:folder or release:sae_id"
        )
    register()  # SAELens must know `multiscale` before it reads a cfg.json
    located = [found for reference in references for found in locate(reference)]
    seen: dict[FolderSource | HubSource, str] = {}
    for found in located:
        if found.source in seen:
            raise InputError(
                f"{found.reference!r} and {seen[found.source]!r} are the same SAE: give it once"
            )
        seen[found.source] = found.reference
    subjects: list[Subject] = []
    broken: list[tuple[str, str]] = []
    for found in located:
        try:
            subjects.append(_load(found, device, hook, model_name))
        except BrokenSAEError as error:
            if on_broken is None:
                raise
            broken.append((found.name, str(error)))
    subjects = _with_unique_names(subjects)
    taken = {subject.name for subject in subjects}
    for name, reason in broken:
        unique, copy = name, 1
        while unique in taken:
            copy += 1
            unique = f"{name}-{copy}"
        taken.add(unique)
        if on_broken is not None:
            on_broken(unique, reason)
    return subjects


def subject_record(subject: Subject) -> dict[str, Any]:
    """What `summary.json` says of an SAE."""
    config = subject.sae.cfg
    return {
        "reference": subject.reference,
        "weights_sha256": subject.weights_sha256,
        "architecture": config.architecture(),
        "hook_name": subject.hook_name,
        "model_name": subject.model_name,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
    }


def transformer_lens_hook(hook: str) -> str:
    """A hook's name as TransformerLens has it: `model.layers.9` is `blocks.9.hook_resid_post`.

    Raises:
        InputError: It is the name of another module, whose output need not be any hook point's.
    """
    if hook.rsplit(".", 1)[-1].startswith("hook_"):
        return hook
    layer = _LAYER_OUTPUT.fullmatch(hook)
    if layer is None:
        raise InputError(
            f"SAEBench reads TransformerLens' hook points and {hook!r} is none: give the one with "
            "the same activations as --hook, for example blocks.9.hook_resid_post"
        )
    return f"blocks.{layer.group(1)}.hook_resid_post"


def fold_decoder_norms(sae: SAE[Any], name: str) -> None:
    """Give the decoder rows unit norm and let the encoder make up for it, in place.

    A row of zeros stays one: its latent contributes nothing.

    Raises:
        InputError: The architecture cannot be folded and its rows have other norms.
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


def _load(found: LocatedSAE, device: str, hook: str | None, model_name: str | None) -> Subject:
    sae, weights_sha256 = load_sae(found, device)
    hook_name = _hook_of(sae, found.reference, hook)
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
    return Subject(
        name=found.name,
        reference=found.reference,
        sae=sae,
        weights_sha256=weights_sha256,
        model_name=model_name,
        hook_name=hook_name,
        folder=found.source.folder if isinstance(found.source, FolderSource) else None,
    )


def _hook_of(sae: SAE[Any], reference: str, override: str | None) -> str:
    hook: str | None = override or sae.cfg.metadata.hook_name
    if not hook:
        raise InputError(
            f"SAE {reference!r} does not say where in the model it reads: give it as hook in the "
            "evaluation config, or with --hook, for example blocks.9.hook_resid_post"
        )
    try:
        return transformer_lens_hook(hook)
    except InputError as error:
        raise InputError(f"SAE {reference!r}: {error}") from error


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
        if not tensor.is_floating_point():
            continue
        # An infinite threshold is how some SAEs switch a latent off.
        bad = tensor.isnan() if name == "threshold" else ~tensor.isfinite()
        if bad.any():
            raise BrokenSAEError(f"SAE {reference!r}: {name} {problem}")


def _with_unique_names(subjects: Sequence[Subject]) -> list[Subject]:
    """Names that collide get the start of their weights' hash: it depends on no order."""
    short = [subject.name[:_NAME_CHARACTERS] for subject in subjects]
    # Without case: two names that differ in it alone are one file on some systems.
    count = Counter(name.casefold() for name in short)
    named: list[Subject] = []
    taken: set[str] = set()
    for subject, name in zip(subjects, short, strict=True):
        unique = name
        if count[name.casefold()] > 1 or name != subject.name:
            unique = f"{name}-{subject.weights_sha256[:_HASH_CHARACTERS]}"
        base, copy = unique, 1
        while unique.casefold() in taken:  # the same weights in two places
            copy += 1
            unique = f"{base}-{copy}"
        taken.add(unique.casefold())
        named.append(replace(subject, name=unique))
    return named


@dataclass(frozen=True)
class Subject:
    """An SAE under evaluation.

    Args:
        name: Unique in one evaluation, safe as a file name.
        reference: What the user wrote.
        sae: In float32 and eval mode, decoder norms folded in float32. Shared by all evaluations:
            none changes it; SAEBench, which writes into an SAE and its config, gets a copy.
        weights_sha256: Hash of the weights as they were loaded, before folding.
        model_name: The language model in the checkpoint's metadata.
        hook_name: Where the SAE reads, TransformerLens style.
        folder: The checkpoint's folder, where it is local.
    """

    name: str
    reference: str
    sae: SAE[Any]
    weights_sha256: str
    model_name: str | None
    hook_name: str
    folder: Path | None = None

    @property
    def layer(self) -> int:
        """The first number in the hook's name, which is how SAEBench finds the layer."""
        found = re.search(r"\d+", self.hook_name)
        if found is None:
            raise RunFailure(f"SAE {self.name!r}: hook {self.hook_name!r} names no layer")
        return int(found.group())

    def for_saebench(self, dtype: torch.dtype, device: str) -> SAE[Any]:
        """A copy that SAEBench may change: cast as it casts, its metadata complete.

        Args:
            dtype: SAEBench casts every SAE to the language model's.
            device: A torch device.
        """
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
