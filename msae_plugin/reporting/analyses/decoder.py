"""How diverse a dictionary is: overlap, effective rank and clusters of its decoder directions.

Works in blocks on decoders of any width: what grows with d_sae x d_sae is compute, never memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# 2^22 similarities of float32 are 16 MiB.
BLOCK_ELEMENTS = 2**22
CLUSTER_COSINES = (0.2, 0.5)


@dataclass(frozen=True)
class Clusters:
    """Groups of decoder directions linked by cosines above a threshold.

    Two directions are in one cluster when a chain of cosines above the threshold joins them
    (single linkage). A direction without such a neighbour is a cluster of one.
    """

    cosine: float
    sizes: list[int]  # number of directions in each cluster, largest first

    @property
    def count(self) -> int:
        """Number of clusters."""
        return len(self.sizes)

    @property
    def largest(self) -> int:
        """Directions in the largest; 0 for an empty decoder."""
        return self.sizes[0] if self.sizes else 0

    @property
    def single(self) -> int:
        """Directions without a neighbour above the threshold."""
        return sum(size == 1 for size in self.sizes)


@dataclass(frozen=True)
class DecoderDiversity:
    """Overlap, rank and clusters of the directions of one decoder."""

    d_sae: int  # rows of the decoder
    d_in: int
    zero_rows: int  # rows without a direction; left out of everything else
    mean_max_cosine: float  # mean over directions of the cosine to the nearest other one
    max_cosines: torch.Tensor  # (directions,) those cosines
    # exp of the entropy of the directions' singular values, normalised to sum 1 (Roy and
    # Vetterli 2007): between 1 and min(d_in, d_sae).
    effective_rank: float
    norms: tuple[float, float, float]  # smallest, median and largest norm of the rows
    clusters: tuple[Clusters, ...]  # one per threshold


@torch.no_grad()
def decoder_diversity(
    W_dec: torch.Tensor,
    thresholds: Sequence[float] = CLUSTER_COSINES,
    block_elements: int = BLOCK_ELEMENTS,
) -> DecoderDiversity:
    """Overlap, rank and clusters in one walk over the similarities.

    Args:
        W_dec: (d_sae, d_in), rows of any norm.
        thresholds: Cosines above which two directions are linked.
        block_elements: Similarities held at once.

    Raises:
        ValueError: The decoder is no matrix, or holds NaN or infinite values.
    """
    if W_dec.ndim != 2:
        raise ValueError(f"a decoder is (d_sae, d_in); got shape {tuple(W_dec.shape)}")
    rows = W_dec.detach().float()
    norms = rows.norm(dim=1)
    if not torch.isfinite(norms).all():
        raise ValueError("the decoder holds NaN or infinite values")
    directions = rows[norms > 0] / norms[norms > 0, None]
    nearest, parents = _walk(directions, thresholds, block_elements)
    return DecoderDiversity(
        d_sae=rows.shape[0],
        d_in=rows.shape[1],
        zero_rows=int((norms == 0).sum()),
        mean_max_cosine=nearest.double().mean().item() if nearest.numel() else 0.0,
        max_cosines=nearest.cpu(),
        effective_rank=effective_rank(directions),
        norms=(norms.min().item(), norms.median().item(), norms.max().item())
        if norms.numel()
        else (0.0, 0.0, 0.0),
        clusters=tuple(
            Clusters(cosine, _sizes(parent))
            for cosine, parent in zip(thresholds, parents, strict=True)
        ),
    )


@torch.no_grad()
def effective_rank(directions: torch.Tensor, rows_at_a_time: int = 8192) -> float:
    """exp(entropy) of the normalised singular values: how many dimensions are used evenly.

    Args:
        directions: (n, d_in); the spectrum is that of the (d_in, d_in) Gram matrix in float64.
        rows_at_a_time: Rows added to the Gram matrix at once.

    Returns:
        Between 1 and min(n, d_in); 0 for an empty or zero matrix.
    """
    gram = torch.zeros(directions.shape[1], directions.shape[1], dtype=torch.float64)
    for block in directions.split(rows_at_a_time):
        exact = block.double().cpu()
        gram += exact.T @ exact
    eigenvalues = torch.linalg.eigvalsh(gram)
    # Rounding leaves about 1e-16 of the largest where the rank is exhausted; its square root would
    # count.
    largest = eigenvalues.max().item() if eigenvalues.numel() else 0.0
    kept = eigenvalues[eigenvalues > 1e-12 * largest]
    if largest <= 0:
        return 0.0
    shares = kept.sqrt() / kept.sqrt().sum()
    return (-(shares * shares.log()).sum()).exp().item()


def _walk(
    directions: torch.Tensor, thresholds: Sequence[float], block_elements: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Nearest cosines, and each direction's cluster by threshold."""
    count = directions.shape[0]
    parents = [torch.arange(count, device=directions.device) for _ in thresholds]
    if count < 2:
        return directions.new_zeros(0), parents
    height = max(1, block_elements // count)
    nearest: list[torch.Tensor] = []
    for start in range(0, count, height):
        block = directions[start : start + height]
        cosines = block @ directions.T
        own = torch.arange(block.shape[0], device=cosines.device)
        cosines[own, start + own] = -torch.inf
        nearest.append(cosines.amax(dim=1))
        for place, cosine in enumerate(thresholds):
            pairs = (cosines > cosine).nonzero()
            parents[place] = _joined(parents[place], pairs[:, 0] + start, pairs[:, 1])
    return torch.cat(nearest), parents


def _joined(parent: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Connected components after adding edges; each points at its smallest member."""
    while True:
        a, b = parent[left], parent[right]
        open_edges = a != b
        if not bool(open_edges.any()):
            return parent
        left, right, a, b = (part[open_edges] for part in (left, right, a, b))
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        parent = parent.scatter_reduce(0, high, low, "amin")
        while True:
            further = parent[parent]
            if torch.equal(further, parent):
                break
            parent = further


def _sizes(parent: torch.Tensor) -> list[int]:
    if parent.numel() == 0:
        return []
    counts = torch.bincount(parent)
    return counts[counts > 0].sort(descending=True).values.tolist()
