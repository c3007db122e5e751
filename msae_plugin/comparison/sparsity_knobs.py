"""How each architecture is told the L0 it is compared at.

- `k` (topk, batchtopk, matryoshka_batchtopk, multiscale, ...) and `max_iterations`
  (matching_pursuit) are the L0.
- `jumprelu` gets `target_l0` in SAELens' quadratic loss; at the end its thresholds are scaled by
  one factor to that mean L0, as the cut of every BatchTopK is set.
- `standard` and `gated` (`l1_coefficient`), and `jumprelu` with another loss (`l0_coefficient`),
  have a coefficient that is searched.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainingSAE

from msae_plugin.architecture.threshold import calibrated_cut
from msae_plugin.common.errors import InputError
from msae_plugin.training.plans import DEFAULT_ARCHITECTURE

_MODE = "jumprelu_sparsity_loss_mode"
_DIRECT = ("k", "max_iterations")
_SEARCHED = ("l1_coefficient", "l0_coefficient")
# SAELens' widths for Matryoshka in the authors' experiments are powers of two of the whole.
_MATRYOSHKA_SHARES = (32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Knob:
    """What sets the L0 of an architecture.

    Args:
        name: Field of its config.
        searched: Whether the value that gives an L0 has to be found.
        start: Where a search begins.
    """

    name: str
    searched: bool
    start: float = 0.0


def sparsity_knob(section: Mapping[str, Any], where: str) -> Knob:
    """The knob of an SAE's section.

    Args:
        section: With `architecture` and any fields of its config.
        where: Its dotted path, for messages.

    Raises:
        InputError: The architecture is unknown or has no knob, or the section sets the L0 itself.
    """
    architecture = str(section.get("architecture", DEFAULT_ARCHITECTURE))
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        near = difflib.get_close_matches(architecture, SAE_TRAINING_CLASS_REGISTRY, n=1)
        known = ", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY))
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {known}"
        raise InputError(f"'{where}.architecture' {architecture!r} is unknown: {hint}")
    config = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    fields = {item.name: item for item in dataclasses.fields(config)}
    direct = next((name for name in _DIRECT if name in fields), None)
    if direct is None and "target_l0" in fields:
        mode = section.get(_MODE, "quadratic")
        direct = "target_l0" if mode == "quadratic" else None
    if direct is not None:
        if direct in section:
            raise InputError(f"'{where}.{direct}' is not set here: 'l0' of the comparison sets it")
        return Knob(direct, searched=False)
    for name in _SEARCHED:
        if name in fields:
            start = float(section.get(name, fields[name].default))
            if not start > 0:
                raise InputError(
                    f"'{where}.{name}' is where the search for the L0 begins: it must be positive"
                )
            return Knob(name, searched=True, start=start)
    raise InputError(
        f"'{where}.architecture' {architecture!r} has no setting that its L0 could be set with"
    )


def with_l0(section: Mapping[str, Any], knob: Knob, l0: float, d_sae: int) -> dict[str, Any]:
    """The section of one target L0; a searched knob is left as it is.

    Args:
        section: As for `sparsity_knob`.
        knob: Its knob.
        l0: Mean number of active latents per token.
        d_sae: Number of latents, which Matryoshka's default widths follow.
    """
    found = dict(section)
    if not knob.searched:
        found[knob.name] = l0
    if knob.name == "target_l0":
        found.setdefault(_MODE, "quadratic")
    if found.get("architecture") == "matryoshka_batchtopk" and "matryoshka_widths" not in found:
        widths = {max(1, d_sae // share) for share in _MATRYOSHKA_SHARES}
        found["matryoshka_widths"] = sorted(widths)
    return found


@torch.no_grad()
def mean_l0(sae: TrainingSAE[Any], batches: Sequence[torch.Tensor]) -> float:
    """Active latents per token of an SAE whose `encode` in eval mode is that of its export.

    Args:
        sae: In eval mode.
        batches: Activations, each (n_tokens, d_in), scaled as training batches are.
    """
    active = sum(int((_dense(sae.encode(batch)) != 0).sum()) for batch in batches)
    return active / sum(len(batch) for batch in batches)


def _dense(latents: torch.Tensor) -> torch.Tensor:
    return latents.to_dense() if latents.is_sparse else latents


@torch.no_grad()
def scale_thresholds(
    sae: JumpReLUTrainingSAE, batches: Sequence[torch.Tensor], l0: float
) -> dict[str, float]:
    """Multiply all thresholds of a JumpReLU by one factor, so that its mean L0 is the target.

    Args:
        sae: In eval mode; its `threshold` is changed.
        batches: Activations, each (n_tokens, d_in), scaled as training batches are; at least one.
        l0: The target.

    Returns:
        `l0_before`, `l0_after` and `threshold` (mean over the latents).
    """
    before = mean_l0(sae, batches)
    # A threshold of zero could not be scaled.
    floor = 1e-3 * float(sae.threshold.median()) or 1e-6
    original = sae.threshold.data.clamp(min=floor)
    # Latent i is on where pre_i / threshold_i is above the factor: the factor is a cut of these.
    factor = calibrated_cut(
        batches,
        lambda batch: sae.encode_with_hidden_pre(batch)[1] / original,
        lambda ratios: ratios,
        l0,
    )
    assert factor is not None, "there are no batches"
    sae.threshold.data = original * max(factor, 1e-6)
    return {
        "l0_before": before,
        "l0_after": mean_l0(sae, batches),
        "threshold": float(sae.threshold.mean()),
    }
