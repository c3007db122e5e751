"""Do two versions of an SAE compute the same, up to rounding?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE

from msae_plugin.architecture.training_sae import MultiScaleTrainingSAE

# Rounding of a float32 dot product of length d_in is about sqrt(d_in) 2^-24 of its operands' size
# (3e-6 at d_in 2304); 1e-4 of a token's largest latent leaves room for the cancellation in
# x - b_dec and for folded weights, and is far below any real disagreement. Lower precisions: 4
# units of rounding.
TOLERANCE = 1e-4
# A latent whose pre-activation is within rounding of its threshold may be on in one version and off
# in the other. Of the active latents a share of about the rounding error lies that close; ten times
# the tolerance is never reached by rounding and always by a wrong threshold or a missing row.
FLIPS_PER_TOLERANCE = 10
# A handful is always allowed: the share means nothing for a few hundred active latents.
MIN_FLIPS_ALLOWED = 2


@dataclass(frozen=True)
class Agreement:
    """Differences between a trained SAE and an exported one on the same activations.

    Args:
        max_latent_difference: Largest |difference| of a latent that both have on, divided by the
            largest latent of its token (or by the median of those, for a token with tiny latents).
        max_reconstruction_difference: Largest |difference| of a reconstruction divided by the norm
            of the trained one (same floor), over tokens without a flip.
        flips: Latents on in exactly one of the two.
        flips_allowed: How many may be on their threshold by rounding.
        active: Latents that are on in the trained SAE, over all tokens.
        exported_active: The same of the exported one.
        tolerance: Bound on both differences.
    """

    max_latent_difference: float
    max_reconstruction_difference: float
    flips: int
    flips_allowed: int
    active: int
    exported_active: int
    tolerance: float

    def failure(self) -> str | None:
        """The disagreement in words, or None."""
        # `not <=` rather than `>`: NaN must fail.
        if not self.max_latent_difference <= self.tolerance:
            return (
                f"latents differ by {self.max_latent_difference:.2e} of the token's largest "
                f"(at most {self.tolerance:.0e} is rounding)"
            )
        if not self.max_reconstruction_difference <= self.tolerance:
            return (
                f"reconstructions differ by {self.max_reconstruction_difference:.2e} of their norm "
                f"(at most {self.tolerance:.0e} is rounding)"
            )
        if self.flips > self.flips_allowed:
            return (
                f"{self.flips} of {self.active} active latents are on in only one of the two "
                f"(at most {self.flips_allowed} can be on the threshold by rounding)"
            )
        return None


def export_order(sae: TrainingSAE[Any]) -> torch.Tensor | None:
    """(d_sae,) long: exported latent j is training latent order[j]; None where nothing moves."""
    return sae.export_order() if isinstance(sae, MultiScaleTrainingSAE) else None


def _decoder_norms(sae: MultiScaleTrainingSAE) -> torch.Tensor | float:
    """Factor of a training latent when its decoder row gets unit norm at export."""
    return 1.0 if sae.cfg.rescale_acts_by_decoder_norm else sae.get_W_dec_norm()


@torch.no_grad()
def trained_latents(sae: TrainingSAE[Any], activations: torch.Tensor) -> torch.Tensor:
    """Latents of a training SAE as its export must give them: in its order and its units.

    In eval mode a SAELens training SAE encodes as it is exported, with one exception: BatchTopK and
    its kin select over the batch even then, and are exported with their running threshold, which is
    therefore applied here to the training SAE's own pre-activations.

    Args:
        sae: In eval mode, with every scaling of the activations folded in.
        activations: (n, d_in) raw.

    Returns:
        (n, d_sae) dense.
    """
    if isinstance(sae, MultiScaleTrainingSAE):
        latents = sae.encode(activations) * _decoder_norms(sae)
        return latents[:, sae.export_order()]
    threshold = getattr(sae, "topk_threshold", None)
    if isinstance(threshold, torch.Tensor):
        pre = sae.encode_with_hidden_pre(activations)[1]
        return pre.relu() * (pre > threshold.to(pre.dtype))
    latents = sae.encode(activations)
    return latents.to_dense() if latents.is_sparse else latents


@torch.no_grad()
def trained_reconstruction(sae: TrainingSAE[Any], latents: torch.Tensor) -> torch.Tensor:
    """Decode what `trained_latents` gave with the training SAE. (n, d_sae) -> (n, d_in)."""
    if isinstance(sae, MultiScaleTrainingSAE):
        own = torch.empty_like(latents).index_copy_(1, sae.export_order(), latents)
        latents = own / _decoder_norms(sae)
    return sae.decode(latents)


@torch.no_grad()
def compare(
    latents: torch.Tensor,
    reconstruction: torch.Tensor,
    exported: SAE[Any],
    activations: torch.Tensor,
) -> Agreement:
    """Compare an exported SAE with what the trained one gives.

    Args:
        latents: (n, d_sae) of the trained one, from `trained_latents`.
        reconstruction: (n, d_in), from `trained_reconstruction`.
        exported: The reloaded export.
        activations: (n, d_in) that both are given.
    """
    other = exported.encode(activations.to(exported.device, exported.dtype))
    other = (other.to_dense() if other.is_sparse else other).to(latents.device)
    other_reconstruction = exported.decode(other).to(latents.device)
    tolerance = max(TOLERANCE, 4 * torch.finfo(exported.dtype).eps)
    on, other_on = latents != 0, other != 0
    flipped = on ^ other_on
    active = int(on.sum())
    difference = (latents.float() - other.float()).abs().masked_fill(flipped, 0.0)
    largest = _floored(latents.float().abs().amax(dim=1))
    latent_difference = (difference.amax(dim=1) / largest).max().item()
    clean = ~flipped.any(dim=1)
    norms = _floored(reconstruction.float().norm(dim=1))
    errors = (reconstruction.float() - other_reconstruction.float()).norm(dim=1) / norms
    share = FLIPS_PER_TOLERANCE * tolerance
    return Agreement(
        max_latent_difference=latent_difference,
        max_reconstruction_difference=errors[clean].max().item() if clean.any() else math.inf,
        flips=int(flipped.sum()),
        flips_allowed=max(MIN_FLIPS_ALLOWED, math.ceil(share * active)),
        active=active,
        exported_active=int(other_on.sum()),
        tolerance=tolerance,
    )


def _floored(sizes: torch.Tensor) -> torch.Tensor:
    """Sizes per token, raised to their median (and to something above zero) where tiny."""
    floor = max(sizes.median().item(), torch.finfo(torch.float32).tiny)
    return sizes.clamp(min=floor)
