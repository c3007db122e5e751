"""[S] Nested prefixes of the dictionary, decoded once, and their losses.

Each active pair belongs to a ring (the part of the dictionary between two prefixes) and to a tier
(the smallest sparsity budget that includes it). All rings and tiers are decoded in one pass; every
reconstruction that a loss needs is a sum of these groups, built up incrementally.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.kernels.decoding import DecodeKernel, bag_sum
from msae_plugin.architecture.kernels.static_selection import needs_static_shapes
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.selection import Selection


@dataclass
class Reconstructions:
    """Reconstructions of one batch, each of shape (n_tokens, d_in).

    Attributes:
        prefixes: One per nested prefix, ascending; the last is the whole dictionary at budget k.
        scales: One per further sparsity budget, ascending, from the whole dictionary.
        stacked: (n_tokens, n_prefixes + n_scales, d_in) all of them in this order, of which the
            others are views; None where they were made one by one.
    """

    prefixes: list[torch.Tensor]
    scales: list[torch.Tensor]
    stacked: torch.Tensor | None = None

    @property
    def main(self) -> torch.Tensor:
        """(n_tokens, d_in) reconstruction of the whole dictionary at the budget k."""
        return self.prefixes[-1]


def assign_rings(firing_rate: torch.Tensor, prefix_widths: Sequence[int]) -> torch.Tensor:
    """Order latents by firing rate, most frequent first, and cut them into rings.

    Args:
        firing_rate: (d_sae,) running share of tokens on which each latent fires.
        prefix_widths: (n_prefixes,) ascending widths; the last equals d_sae.

    Returns:
        (d_sae,) ring of each latent, long, in [0, n_prefixes).
    """
    order = torch.argsort(firing_rate, descending=True, stable=True)
    return rings_of_order(order, prefix_widths)


def rings_of_order(order: torch.Tensor, prefix_widths: Sequence[int]) -> torch.Tensor:
    """Ring of each latent when latent order[r] has rank r; (d_sae,) long."""
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(order.numel(), device=order.device)
    widths = torch.tensor(list(prefix_widths), device=order.device)
    return torch.bucketize(ranks, widths, right=True)


def decode_nested(
    selection: Selection,
    weights: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    ring_of_latent: torch.Tensor,
    n_rings: int,
    n_tiers: int,
    n_tokens: int,
    detach_inner: bool,
    kernel: DecodeKernel = "auto",
) -> Reconstructions:
    """Decode every nested prefix at budget k and the whole dictionary at every other budget.

    Args:
        selection: The active pairs.
        weights: (n_pairs,) coefficient of the decoder row of each pair.
        W_dec: (d_sae, d_in) decoder.
        b_dec: (d_in,) decoder bias, part of every reconstruction.
        ring_of_latent: (d_sae,) ring of each latent.
        n_rings: Number of prefixes.
        n_tiers: Number of sparsity budgets.
        n_tokens: Number of tokens in the batch.
        detach_inner: Let a prefix's loss reach only the latents that the prefix adds.
        kernel: As in `decoding.bag_sum`.

    Returns:
        The reconstructions, differentiable in weights, W_dec and b_dec.
    """
    n_inner_tiers = selection.main_tier + 1
    # Pairs within budget k are grouped by tier and ring, pairs beyond it by tier alone.
    within = selection.tiers * n_rings + ring_of_latent[selection.latents]
    beyond = n_inner_tiers * n_rings + (selection.tiers - n_inner_tiers)
    n_groups = n_inner_tiers * n_rings + (n_tiers - n_inner_tiers)
    groups = torch.where(selection.active(), within, beyond)
    bags = selection.tokens * n_groups + groups
    parts = bag_sum(W_dec, selection.latents, weights, bags, n_tokens * n_groups, kernel)
    parts = parts.view(n_tokens, n_groups, W_dec.shape[1])
    if selection.main_tier == 0 and not detach_inner and needs_static_shapes(parts):
        # Every reconstruction adds one group to the one before: a single running sum instead of a
        # kernel per group. (On a CPU it takes twice the time of the additions.)
        stacked = parts.cumsum(dim=1) + b_dec
        each = list(stacked.unbind(dim=1))
        return Reconstructions(each[:n_rings], each[n_rings:], stacked)
    # Unbinding once gives the backward pass one stack instead of one zero-filled copy per group.
    groups_of_rows = parts.unbind(dim=1)

    def ring_at(tier: int, ring: int) -> torch.Tensor:
        return groups_of_rows[tier * n_rings + ring]

    scales: list[torch.Tensor] = []
    at_budget = b_dec.expand(n_tokens, -1)
    for tier in range(selection.main_tier):
        for ring in range(n_rings):
            at_budget = at_budget + ring_at(tier, ring)
        scales.append(at_budget)

    prefixes: list[torch.Tensor] = []
    so_far = b_dec.expand(n_tokens, -1)
    whole = so_far  # with gradient to every ring, also when the prefixes are detached
    for ring in range(n_rings):
        base = so_far.detach() if detach_inner and ring else so_far
        added = ring_at(0, ring)
        for tier in range(1, n_inner_tiers):
            added = added + ring_at(tier, ring)
        so_far = base + added
        whole = whole + added if detach_inner else so_far
        prefixes.append(so_far)

    for tier in range(n_inner_tiers, n_tiers):
        whole = whole + groups_of_rows[n_inner_tiers * n_rings + tier - n_inner_tiers]
        scales.append(whole)
    return Reconstructions(prefixes=prefixes, scales=scales)


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
