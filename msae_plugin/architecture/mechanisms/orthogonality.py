"""[O] Orthogonality of decoder directions, over chunks or lists of pairs.

    penalty = mean_i sum_j w_ij relu(cos(d_i, d_j))^2,   w_ij = min(1, relu(c_ij - tau))

The gradient is written out by hand and gathered while the penalty is computed, chunk by chunk, so
that nothing of size d_sae x d_sae is ever kept, and nothing at all for the backward pass but one
(d_sae, d_in) gradient. OrtSAE's form, with the maximum over j in place of the weighted sum, is in
`ortsae.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from msae_plugin.architecture.mechanisms.ortsae import chunks_together

ChunkWeights = Callable[[torch.Tensor], torch.Tensor]
# Numbers per temporary: 16 MiB of float32 for pairs and decoder rows, 64 MiB for rows of the Gram
# matrix, of which an efficient product needs enough at a time (128 at d_sae 131,072).
_BLOCK_SIZE = 2**22
_SEARCH_BLOCK_SIZE = 2**24


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to one tensor is already known."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        tensor: torch.Tensor,  # noqa: ARG004  it is what the gradient is handed to
        value: torch.Tensor,
        gradient: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None


def _attach(tensor: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    result = _WithGradient.apply(tensor, value.to(tensor.dtype), gradient.to(tensor.dtype))
    assert isinstance(result, torch.Tensor)
    return result


def unit_rows(W_dec: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions and norms of the decoder rows, in at least float32.

    Args:
        W_dec: (d_sae, d_in).

    Returns:
        (d_sae, d_in) unit rows, zero where the row is zero, and (d_sae, 1) norms, at least 1e-8.
    """
    rows = W_dec.detach()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    norms = rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return rows / norms, norms


def _through_norm(
    grad_unit: torch.Tensor, directions: torch.Tensor, norms: torch.Tensor
) -> torch.Tensor:
    """Gradient with respect to the rows, from the gradient with respect to their directions."""
    along = (grad_unit * directions).sum(dim=-1, keepdim=True)
    return (grad_unit - along * directions) / norms


def chunk_penalty(
    W_dec: torch.Tensor,
    chunks: list[torch.Tensor],
    chunk_weights: ChunkWeights,
) -> torch.Tensor:
    """Weighted penalty over all pairs within each chunk.

    Args:
        W_dec: (d_sae, d_in) decoder.
        chunks: Disjoint index tensors, each (n_in_chunk,).
        chunk_weights: Maps a chunk (n,) to the weights (n, n) of its pairs.

    Returns:
        Zero-dimensional penalty, differentiable in W_dec. It estimates the sum over the whole
        dictionary: it is divided by the share of pairs that fell into a chunk together.
    """
    d_sae = W_dec.shape[0]
    with torch.no_grad(), torch.autocast(W_dec.device.type, enabled=False):
        # A latent is in one chunk, where its gradient is complete: one buffer is all that is kept.
        gradient = torch.zeros_like(W_dec, dtype=torch.promote_types(W_dec.dtype, torch.float32))
        total = gradient.new_zeros(())
        n_pairs = sum(chunk.numel() * (chunk.numel() - 1) for chunk in chunks)
        if n_pairs == 0:
            return _attach(W_dec, total, gradient)
        for group in chunks_together(chunks, W_dec.device):
            members = torch.stack(group)  # (n_together, n_in_chunk)
            rows, norms = unit_rows(W_dec[members])
            cosines = rows @ rows.mT
            scale = (d_sae - 1) / n_pairs
            cosines.diagonal(dim1=-2, dim2=-1).fill_(0)
            overlap = cosines.clamp_(min=0)
            weights = torch.stack([chunk_weights(chunk).fill_diagonal_(0) for chunk in group])
            total += scale * (weights * overlap.pow(2)).sum()
            slope = weights * overlap
            grad_unit = 2 * scale * ((slope + slope.mT) @ rows)
            gradient[members] = _through_norm(grad_unit, rows, norms)
    return _attach(W_dec, total, gradient)


def pair_penalty(
    W_dec: torch.Tensor, first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Penalty over a list of pairs: 1/d_sae sum_p w_p relu(cos(d_first, d_second))^2.

    Args:
        W_dec: (d_sae, d_in) decoder.
        first: (n_pairs,) latent i of each pair.
        second: (n_pairs,) latent j of each pair.
        weights: (n_pairs,) weights; pairs of weight zero are best left out before.

    Returns:
        Zero-dimensional penalty, differentiable in W_dec.
    """
    d_sae = W_dec.shape[0]
    with torch.no_grad(), torch.autocast(W_dec.device.type, enabled=False):
        gradient = torch.zeros_like(W_dec, dtype=torch.promote_types(W_dec.dtype, torch.float32))
        total = gradient.new_zeros(())
        block = max(1, _BLOCK_SIZE // W_dec.shape[1])
        for start in range(0, first.numel(), block):
            i, j = first[start : start + block], second[start : start + block]
            w = weights[start : start + block].to(gradient.dtype)
            (rows_i, _), (rows_j, _) = unit_rows(W_dec[i]), unit_rows(W_dec[j])
            overlap = (rows_i * rows_j).sum(dim=-1).clamp(min=0)
            total += (w * overlap.pow(2)).sum() / d_sae
            slope = (2 * w * overlap / d_sae)[:, None]
            gradient.index_add_(0, i, slope * rows_j)
            gradient.index_add_(0, j, slope * rows_i)
        # So far the gradient of the directions; in place, a block of rows at a time.
        for start in range(0, d_sae, block):
            own = slice(start, start + block)
            gradient[own] = _through_norm(gradient[own], *unit_rows(W_dec[own]))
    return _attach(W_dec, total, gradient)


def coactivation_weights(coactivation: torch.Tensor, tau: float) -> torch.Tensor:
    """min(1, relu(c - tau)): pairs that fire together more than tau are pushed apart.

    Args:
        coactivation: Normalised co-activations, any shape.
        tau: Co-activation that is free.

    Returns:
        Weights of the same shape, in [0, 1]. Without the upper bound the penalty is unstable.
    """
    return (coactivation - tau).clamp(min=0, max=1)


def random_chunks(d_sae: int, chunk_size: int, device: torch.device) -> list[torch.Tensor]:
    """A random partition of the dictionary into chunks of nearly equal size."""
    n_chunks = max(1, -(-d_sae // chunk_size))
    return list(torch.randperm(d_sae, device=device).chunk(n_chunks))


@torch.no_grad()
def nearest_neighbours(
    W_dec: torch.Tensor, count: int, rows_at_a_time: int, latents: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest decoder neighbours, by cosine, a block of rows at a time.

    The decoder is not copied: cosines are divided by the norms of the neighbours afterwards.

    Args:
        W_dec: (d_sae, d_in) decoder.
        count: Neighbours per latent; capped at d_sae - 1.
        rows_at_a_time: Most rows of the Gram matrix that exist at once.
        latents: (n,) latents whose neighbours are sought among all; None seeks everyone's.

    Returns:
        Cosines (n, count), descending, and indices (n, count), long.
    """
    d_sae = W_dec.shape[0]
    count = min(count, d_sae - 1)
    if latents is None:
        latents = torch.arange(d_sae, device=W_dec.device)
    rows_at_a_time = max(1, min(rows_at_a_time, _SEARCH_BLOCK_SIZE // d_sae))
    cosines: list[torch.Tensor] = []
    indices: list[torch.Tensor] = []
    with torch.autocast(W_dec.device.type, enabled=False):
        rows = W_dec if W_dec.dtype == torch.float64 else W_dec.float()
        norms = rows.norm(dim=-1).clamp(min=1e-8)
        for own in latents.split(rows_at_a_time):
            block = (rows[own] / norms[own, None]) @ rows.T
            block /= norms
            block.scatter_(1, own[:, None], -torch.inf)
            top = block.topk(count, dim=1)
            cosines.append(top.values)
            indices.append(top.indices)
    return torch.cat(cosines), torch.cat(indices)
