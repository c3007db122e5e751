"""Statistics of a dictionary: decoder overlap, rank and clusters; how latents fire, and with whom.

Works in blocks on decoders of any width: what grows with d_sae x d_sae is compute, never memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from msae_plugin.evaluation.heldout import cosines_to_others

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
    """Overlap, rank and clusters of W_dec (d_sae, d_in), rows of any norm.

    Raises ValueError for a decoder that is no matrix, or holds NaN or infinite values.
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
    """exp(entropy) of the normalised singular values of (n, d_in): dimensions used evenly.

    The spectrum is that of the Gram matrix in float64. Between 1 and min(n, d_in); 0 for zeros.
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
    nearest: list[torch.Tensor] = []
    for start, cosines in cosines_to_others(directions, block_elements):
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


# SAELens stores log10(frequency + 1e-10): this is "never".
NEVER_FIRED = 1e-9
COSINE_EDGES = (-1.0, -0.3, -0.1, 0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class FiringDensity:
    """How often latents fire."""

    never: int  # latents that fired on none of the counted tokens
    edges: list[float]  # edges of the bins, in log10 of the share of tokens
    counts: list[int]  # latents in each bin
    median: float | None  # median share of tokens among latents that fire; None when none does


def firing_density(
    frequencies: torch.Tensor, lowest: float = -6.0, bins: int = 24
) -> FiringDensity:
    """A histogram of log10 of the (d_sae,) shares; below `lowest` counts in the first bin."""
    fires = frequencies > NEVER_FIRED
    logs = frequencies[fires].double().log10().clamp(lowest, 0.0)
    edges = torch.linspace(lowest, 0.0, bins + 1, dtype=torch.float64)
    counts = torch.histc(logs, bins, lowest, 0.0) if logs.numel() else torch.zeros(bins)
    return FiringDensity(
        never=int((~fires).sum()),
        edges=edges.tolist(),
        counts=[int(count) for count in counts.tolist()],
        median=frequencies[fires].median().item() if logs.numel() else None,
    )


@dataclass(frozen=True)
class ScaleFiring:
    """The latents that one nested prefix adds to the one before it."""

    first: int  # index of the first latent
    end: int  # index behind the last
    active: float  # active latents per token among them
    share: float  # of all active latents
    never: int  # how many never fired


def firing_by_scale(
    frequencies: torch.Tensor, prefix_fractions: Sequence[float]
) -> list[ScaleFiring]:
    """How the active latents of a token spread over the nested prefixes.

    `frequencies` are in the exported order, in which prefixes are contiguous; the fractions are the
    inner prefixes', and the whole dictionary is added.
    """
    d_sae = frequencies.numel()
    ends = sorted({max(1, round(share * d_sae)) for share in prefix_fractions if share < 1})
    total = frequencies.double().sum().item()
    bands: list[ScaleFiring] = []
    for first, end in zip([0, *ends], [*ends, d_sae], strict=True):
        band = frequencies[first:end].double()
        active = band.sum().item()
        bands.append(
            ScaleFiring(
                first=first,
                end=end,
                active=active,
                share=active / total if total > 0 else 0.0,
                never=int((band <= NEVER_FIRED).sum()),
            )
        )
    return bands


@dataclass(frozen=True)
class CosineBin:
    """Pairs of latents whose decoder directions have a cosine between two values."""

    low: float
    high: float
    pairs: int  # how many, among latents that fired
    # Mean over the pairs of sum f_i f_j / sqrt(sum f_i^2 sum f_j^2): what the co-activation
    # penalty weighs; None without a pair.
    coactivation: float | None
    # Share of the pairs that fired together at least once; None without a pair.
    together: float | None


@torch.no_grad()
def coactivation_by_cosine(
    latents: torch.Tensor,
    W_dec: torch.Tensor,
    edges: Sequence[float] = COSINE_EDGES,
    block_elements: int = BLOCK_ELEMENTS,
) -> list[CosineBin]:
    """Whether latents that point alike also fire together, over all pairs, in blocks.

    `latents` is (tokens, d_sae); the first and last bin take the cosines outside of `edges`.
    """
    fired = (latents != 0).any(0)
    activity = latents[:, fired].float()
    activity = activity / activity.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    directions = torch.nn.functional.normalize(W_dec[fired].float(), dim=1)
    count = directions.shape[0]
    n_bins = len(edges) - 1
    pairs = torch.zeros(n_bins, dtype=torch.int64)
    strength = torch.zeros(n_bins, dtype=torch.float64)
    together = torch.zeros(n_bins, dtype=torch.int64)
    inner = torch.tensor(edges[1:-1])
    height = max(1, block_elements // max(1, count))
    later = torch.arange(count)
    for start in range(0, count, height):
        rows = slice(start, start + height)
        # Every pair once: the partner comes later.
        once = later[None, :] > later[rows, None]
        cosines = (directions[rows] @ directions.T)[once]
        shared = (activity[:, rows].T @ activity)[once]
        place = torch.bucketize(cosines, inner, right=True)
        pairs += torch.bincount(place, minlength=n_bins)
        strength += torch.bincount(place, shared.double(), minlength=n_bins)
        together += torch.bincount(place[shared != 0], minlength=n_bins)
    return [
        CosineBin(
            low=edges[i],
            high=edges[i + 1],
            pairs=n,
            coactivation=strength[i].item() / n if n else None,
            together=int(together[i]) / n if n else None,
        )
        for i, n in enumerate(pairs.tolist())
    ]
