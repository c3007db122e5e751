"""Statistics of latents: how often they fire, in which scale, and with whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from msae_plugin.reporting.analyses.decoder import BLOCK_ELEMENTS

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
    """A histogram of log10 firing frequencies.

    Args:
        frequencies: (d_sae,) share of tokens on which each latent fires.
        lowest: log10 of the first edge; rarer latents count in the first bin.
        bins: Number of bins between it and 0.
    """
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

    Args:
        frequencies: (d_sae,) in the exported order, in which prefixes are contiguous.
        prefix_fractions: Inner prefixes as shares of d_sae; the whole dictionary is added.
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

    Args:
        latents: (tokens, d_sae).
        W_dec: (d_sae, d_in).
        edges: Increasing cosines; the first and last bin take what lies outside.
        block_elements: Similarities held at once.
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
