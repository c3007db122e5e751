"""Loss terms that are sums over tokens: reconstruction at every scale, and L1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.nested import Reconstructions
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.selection import Selection


@torch.no_grad()
def token_weight(x_c: torch.Tensor, ranks: Ranks = ALONE) -> torch.Tensor:
    """Weight 1 / |x - b_dec| per token, mean 1 over the batch.

    Args:
        x_c: (n_tokens, d_in) activations minus b_dec.
        ranks: The processes that share the batch.

    Returns:
        (n_tokens,) constants. A token at b_dec itself weighs as much as the heaviest other one; if
        all are there, all weigh 1.
    """
    norms = x_c.float().norm(dim=-1)
    present = norms > 0
    inverse = torch.where(present, 1 / norms.clamp(min=1e-30), 0.0)
    inverse = torch.where(present, inverse, ranks.largest(inverse.max()))
    mean = ranks.mean(inverse.mean())
    return torch.where(mean > 0, inverse / mean.clamp(min=1e-30), torch.ones_like(inverse))


def squared_error(
    reconstruction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """Mean over tokens of the squared error, summed over d_in.

    Args:
        reconstruction: (n_tokens, d_in), or (n_tokens, n, d_in) for several at once.
        target: (n_tokens, d_in).
        weight: (n_tokens,) or None.

    Returns:
        Zero-dimensional or (n,), in squared activation units.
    """
    if reconstruction.dim() == 3:
        target = target[:, None]
        weight = None if weight is None else weight[:, None]
    errors = (reconstruction - target).pow(2).sum(dim=-1)
    return (errors if weight is None else errors * weight).mean(dim=0)


def _squared_errors(
    reconstructions: Reconstructions, target: torch.Tensor, weight: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Those of the prefixes and those of the further budgets."""
    n_prefixes = len(reconstructions.prefixes)
    if reconstructions.stacked is None:
        each = [*reconstructions.prefixes, *reconstructions.scales]
        errors = [squared_error(one, target, weight) for one in each]
    else:
        errors = list(squared_error(reconstructions.stacked, target, weight).unbind())
    return errors[:n_prefixes], errors[n_prefixes:]


def reconstruction_losses(
    cfg: MultiScaleTrainingSAEConfig,
    reconstructions: Reconstructions,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    scales: Sequence[float],
) -> dict[str, torch.Tensor]:
    """[S]: the whole dictionary at budget k, each nested prefix, each further budget.

    Args:
        cfg: Weights of the terms.
        reconstructions: One per prefix and per further budget, each (n_tokens, d_in).
        target: (n_tokens, d_in).
        weight: (n_tokens,) weight of each token, or None.
        scales: Further budgets as multiples of k, in the order of `reconstructions.scales`.

    Returns:
        Weighted loss terms by name; prefix terms carry SAELens' name `inner_mse_loss_<width>`.
    """
    (*inner, main), further = _squared_errors(reconstructions, target, weight)
    terms = {"mse_loss": main}
    if cfg.prefix_weight > 0:
        for width, loss in zip(cfg.prefix_widths[:-1], inner, strict=True):
            terms[f"inner_mse_loss_{width}"] = cfg.prefix_weight * loss
    if cfg.sparsity_scale_weight > 0:
        for scale, loss in zip(scales, further, strict=True):
            terms[f"mse_loss_at_{scale:g}k"] = cfg.sparsity_scale_weight * loss
    return terms


def l1_loss(
    selection: Selection,
    coefficients: torch.Tensor,
    decoder_norm: torch.Tensor,
    latent_weight: torch.Tensor | None,
    n_tokens: int,
) -> torch.Tensor:
    """Sum over latents of |f_i| |d_i|, mean over tokens.

    Args:
        selection: The active pairs.
        coefficients: (n_pairs,) coefficients of the raw decoder rows; not negative.
        decoder_norm: (d_sae,) norms of these rows.
        latent_weight: (d_sae,) weight of each latent's share, or None.
        n_tokens: Number of tokens in the batch.

    Returns:
        Zero-dimensional, in activation units.
    """
    penalised = coefficients * selection.active() * decoder_norm[selection.latents]
    if latent_weight is not None:
        penalised = penalised * latent_weight[selection.latents]
    return penalised.sum() / n_tokens
