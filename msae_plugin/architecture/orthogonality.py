"""[O] Orthogonality of decoder directions, over chunks or lists of pairs.

    penalty = mean_i sum_j w_ij relu(cos(d_i, d_j))^2,   w_ij = min(1, relu(c_ij - tau))

The gradient is written out by hand and gathered while the penalty is computed, chunk by chunk, so
that nothing of size d_sae x d_sae is ever kept, and nothing at all for the backward pass but one
(d_sae, d_in) gradient. OrtSAE's form (arXiv 2509.22033) is the unweighted one over chunks, with the
maximum over j in place of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

ChunkWeights = Callable[[torch.Tensor], torch.Tensor]
# Rows of pairs handled at a time: 16384 pairs of 2304 floats are 150 MB.
_PAIR_BLOCK = 16_384


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
    chunk_weights: ChunkWeights | None,
) -> torch.Tensor:
    """Penalty over all pairs within each chunk.

    Args:
        W_dec: (d_sae, d_in) decoder.
        chunks: Disjoint index tensors, each (n_in_chunk,).
        chunk_weights: Maps a chunk (n,) to the weights (n, n) of its pairs. None takes OrtSAE's
            mean_i max_j cos^2 per chunk, averaged over chunks.

    Returns:
        Zero-dimensional penalty, differentiable in W_dec. With weights it estimates the sum over
        the whole dictionary: it is divided by the share of pairs that fell into a chunk together.
    """
    d_sae = W_dec.shape[0]
    with torch.no_grad(), torch.autocast(W_dec.device.type, enabled=False):
        directions, norms = unit_rows(W_dec)
        grad_unit = torch.zeros_like(directions)
        total = directions.new_zeros(())
        n_pairs = sum(chunk.numel() * (chunk.numel() - 1) for chunk in chunks)
        if n_pairs == 0:
            return _attach(W_dec, total, grad_unit)
        for chunk in chunks:
            rows = directions[chunk]
            cosines = (rows @ rows.T).fill_diagonal_(0)
            if chunk_weights is None:
                # OrtSAE squares the signed maximum; a chunk of one latent has no pair.
                largest, nearest = cosines.fill_diagonal_(-2).max(dim=1)
                largest = largest.where(largest > -2, largest.new_zeros(()))
                scale = 1 / (len(chunks) * chunk.numel())
                total += scale * largest.pow(2).sum()
                slope = (2 * scale * largest)[:, None]
                grad_unit[chunk] += slope * rows[nearest]
                grad_unit.index_add_(0, chunk[nearest], slope * rows)
            else:
                scale = (d_sae - 1) / n_pairs
                overlap = cosines.clamp_(min=0)
                weights = chunk_weights(chunk).fill_diagonal_(0)
                total += scale * (weights * overlap.pow(2)).sum()
                slope = weights * overlap
                grad_unit[chunk] += 2 * scale * ((slope + slope.T) @ rows)
        gradient = _through_norm(grad_unit, directions, norms)
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
        directions, norms = unit_rows(W_dec)
        grad_unit = torch.zeros_like(directions)
        total = directions.new_zeros(())
        for start in range(0, first.numel(), _PAIR_BLOCK):
            i, j = first[start : start + _PAIR_BLOCK], second[start : start + _PAIR_BLOCK]
            w = weights[start : start + _PAIR_BLOCK].to(directions.dtype)
            rows_i, rows_j = directions[i], directions[j]
            overlap = (rows_i * rows_j).sum(dim=-1).clamp(min=0)
            total += (w * overlap.pow(2)).sum() / d_sae
            slope = (2 * w * overlap / d_sae)[:, None]
            grad_unit.index_add_(0, i, slope * rows_j)
            grad_unit.index_add_(0, j, slope * rows_i)
        gradient = _through_norm(grad_unit, directions, norms)
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
    W_dec: torch.Tensor, count: int, rows_at_a_time: int, candidates: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest decoder neighbours of every latent, by cosine, a block of rows at a time.

    Args:
        W_dec: (d_sae, d_in) decoder.
        count: Neighbours per latent; capped at d_sae - 1.
        rows_at_a_time: Rows of the Gram matrix that exist at once.
        candidates: (d_sae,) bool, latents that may be neighbours; None allows all.

    Returns:
        Cosines (d_sae, count), descending, and indices (d_sae, count), long.
    """
    d_sae = W_dec.shape[0]
    count = min(count, d_sae - 1)
    directions, _ = unit_rows(W_dec)
    cosines: list[torch.Tensor] = []
    indices: list[torch.Tensor] = []
    with torch.autocast(W_dec.device.type, enabled=False):
        for start in range(0, d_sae, rows_at_a_time):
            block = directions[start : start + rows_at_a_time] @ directions.T
            own = torch.arange(block.shape[0], device=block.device)
            block[own, own + start] = -torch.inf
            if candidates is not None:
                block[:, ~candidates] = -torch.inf
            top = block.topk(count, dim=1)
            cosines.append(top.values)
            indices.append(top.indices)
    return torch.cat(cosines), torch.cat(indices)
