"""[S] Nested prefixes of the dictionary, decoded once, and the losses of a step.

Each active pair belongs to a group (the latents between two prefixes) and to a level (the smallest
sparsity budget that includes it). All groups and levels are decoded in one pass; every
reconstruction that a loss needs is a sum of these, built up incrementally.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.kernels.decoding import DecodeKernel, bag_sum
from msae_plugin.architecture.kernels.static_selection import needs_static_shapes
from msae_plugin.architecture.selection import Selection
from msae_plugin.architecture.step_schedule import DeadLatents, EncoderInput


@dataclass
class Reconstructions:
    """Reconstructions of one batch, each of shape (n_tokens, d_in)."""

    # One per nested prefix, ascending; the last is the whole dictionary at budget k
    prefixes: list[torch.Tensor]
    # One per further sparsity budget, ascending, from the whole dictionary
    scales: list[torch.Tensor]
    # (n_tokens, n_prefixes + n_scales, d_in) all of them in this order, of which the others are
    # views; None where they were made one by one
    stacked: torch.Tensor | None = None

    @property
    def main(self) -> torch.Tensor:
        """(n_tokens, d_in) reconstruction of the whole dictionary at the budget k."""
        return self.prefixes[-1]


def assign_groups(firing_rate: torch.Tensor, prefix_widths: Sequence[int]) -> torch.Tensor:
    """(d_sae,) group of each latent, those that fire most often in the first."""
    order = torch.argsort(firing_rate, descending=True, stable=True)
    return groups_of_order(order, prefix_widths)


def groups_of_order(order: torch.Tensor, prefix_widths: Sequence[int]) -> torch.Tensor:
    """Group of each latent when latent order[r] has rank r; (d_sae,) long."""
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(order.numel(), device=order.device)
    widths = torch.tensor(list(prefix_widths), device=order.device)
    return torch.bucketize(ranks, widths, right=True)


def decode_nested(
    cfg: MultiScaleTrainingSAEConfig,
    selection: Selection,
    coefficients: torch.Tensor,  # (n_pairs,) coefficient of the decoder row of each pair
    W_dec: torch.Tensor,  # (d_sae, d_in) decoder
    b_dec: torch.Tensor,  # (d_in,) decoder bias, part of every reconstruction
    latent_group: torch.Tensor,  # (d_sae,) group of each latent
    n_tokens: int,
    kernel: DecodeKernel = "auto",
) -> Reconstructions:
    """Decode every nested prefix at budget k and the whole dictionary at every other budget.

    b_dec is part of every reconstruction. With `detach_inner_prefixes` a prefix's loss reaches only
    the latents that the prefix adds. Differentiable in coefficients, W_dec and b_dec.
    """
    detach_inner = cfg.detach_inner_prefixes
    n_groups, n_levels = len(cfg.prefix_widths), len(cfg.sparsity_scales) + 1
    n_inner_levels = selection.main_level + 1
    # Pairs within budget k are summed by level and group, pairs beyond it by level alone.
    within = selection.levels * n_groups + latent_group[selection.latents]
    beyond = n_inner_levels * n_groups + (selection.levels - n_inner_levels)
    n_sums = n_inner_levels * n_groups + (n_levels - n_inner_levels)
    sum_of_pair = torch.where(selection.active(), within, beyond)
    bags = selection.tokens * n_sums + sum_of_pair
    sums = bag_sum(W_dec, selection.latents, coefficients, bags, n_tokens * n_sums, kernel)
    sums = sums.view(n_tokens, n_sums, W_dec.shape[1])
    if selection.main_level == 0 and not detach_inner and needs_static_shapes(sums):
        # Every reconstruction adds one sum to the one before: a single running sum instead of a
        # kernel per sum. (On a CPU it takes twice the time of the additions.)
        stacked = sums.cumsum(dim=1) + b_dec
        each = list(stacked.unbind(dim=1))
        return Reconstructions(each[:n_groups], each[n_groups:], stacked)
    # Unbinding once gives the backward pass one stack instead of one zero-filled copy per sum.
    each_sum = sums.unbind(dim=1)

    scales: list[torch.Tensor] = []
    at_budget = b_dec.expand(n_tokens, -1)
    for level in range(selection.main_level):
        for group in range(n_groups):
            at_budget = at_budget + each_sum[level * n_groups + group]
        scales.append(at_budget)

    prefixes: list[torch.Tensor] = []
    so_far = b_dec.expand(n_tokens, -1)
    whole = so_far  # with gradient to every group, also when the prefixes are detached
    for group in range(n_groups):
        base = so_far.detach() if detach_inner and group else so_far
        added = each_sum[group]
        for level in range(1, n_inner_levels):
            added = added + each_sum[level * n_groups + group]
        so_far = base + added
        whole = whole + added if detach_inner else so_far
        prefixes.append(so_far)

    for beyond_k in each_sum[n_inner_levels * n_groups :]:
        whole = whole + beyond_k
        scales.append(whole)
    return Reconstructions(prefixes=prefixes, scales=scales)


def squared_error(reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error, summed over d_in.

    Of a reconstruction (n_tokens, d_in), or of several at once (n_tokens, n, d_in).
    """
    if reconstruction.dim() == 3:
        target = target[:, None]
    return (reconstruction - target).pow(2).sum(dim=-1).mean(dim=0)


def _squared_errors(
    reconstructions: Reconstructions, target: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Those of the prefixes and those of the further budgets."""
    n_prefixes = len(reconstructions.prefixes)
    if reconstructions.stacked is None:
        each = [*reconstructions.prefixes, *reconstructions.scales]
        errors = [squared_error(one, target) for one in each]
    else:
        errors = list(squared_error(reconstructions.stacked, target).unbind())
    return errors[:n_prefixes], errors[n_prefixes:]


def reconstruction_losses(
    cfg: MultiScaleTrainingSAEConfig,
    reconstructions: Reconstructions,
    target: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """[S]: weighted losses of the whole dictionary, each nested prefix, each further budget.

    Prefix terms carry SAELens' name `inner_mse_loss_<width>`.
    """
    (*inner, main), further = _squared_errors(reconstructions, target)
    terms = {"mse_loss": main}
    if cfg.prefix_weight > 0:
        for width, loss in zip(cfg.prefix_widths[:-1], inner, strict=True):
            terms[f"inner_mse_loss_{width}"] = cfg.prefix_weight * loss
    if cfg.sparsity_scale_weight > 0:
        for scale, loss in zip(sorted(cfg.sparsity_scales), further, strict=True):
            terms[f"mse_loss_at_{scale:g}k"] = cfg.sparsity_scale_weight * loss
    return terms


def l1_loss(
    selection: Selection,
    coefficients: torch.Tensor,
    decoder_norm: torch.Tensor,
    latent_weight: torch.Tensor | None,
    n_tokens: int,
) -> torch.Tensor:
    """Sum over latents of |f_i| |d_i|, mean over tokens; the coefficients are not negative."""
    penalised = coefficients * selection.active() * decoder_norm[selection.latents]
    if latent_weight is not None:
        penalised = penalised * latent_weight[selection.latents]
    return penalised.sum() / n_tokens


def auxk_loss(
    given: EncoderInput,
    residual: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    dead: DeadLatents,
) -> torch.Tensor:
    """AuxK: dead latents reconstruct what the live ones miss (Gao et al. 2024, appendix A.2).

    The squared error of the k_aux = d_in // 2 strongest dead latents on the residual.

    Only the dead columns of the encoder are computed, so that the cost is proportional to the
    number of dead latents, of which there is at least one. The scale of the loss falls with that
    number, as in SAELens. The residual (n_tokens, d_in), input minus reconstruction, is a constant.
    """
    latents = dead.latents
    most = max(given.x_hat.shape[1] // 2, 1)
    k_aux = min(most, latents.numel())
    hidden_pre = given.x_hat @ W_enc[:, latents] + b_enc[latents]
    norm = given.decoder_norm
    scores = hidden_pre if norm is None else hidden_pre * norm.detach()[latents]
    padding = None
    if dead.count is not None:
        padding = torch.arange(latents.numel(), device=latents.device) >= dead.count
        scores = scores.masked_fill(padding, -torch.inf)
    top = scores.topk(k_aux, dim=-1, sorted=False).indices
    acts = torch.zeros_like(hidden_pre).scatter(-1, top, hidden_pre.gather(-1, top))
    if padding is not None:
        acts = acts.masked_fill(padding, 0)
    if given.token_scale is not None:
        acts = acts * given.token_scale
    error = (acts @ W_dec[latents] - residual.detach()).pow(2).sum(dim=-1).mean()
    if dead.count is not None:
        return (dead.count / most).clamp(max=1.0).to(error.dtype) * error
    return min(latents.numel() / most, 1.0) * error
