"""Spread over seeds, and paired differences with their intervals.

One rule of wording for every table: a difference whose interval contains zero is "no difference
shown", never a win. Two methods are paired where they have the same hook, target L0 and seed: the
same activations in the same order, at the same sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from msae_plugin.common.table import spread

CONFIDENCE = 0.95
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences first - second over pairs, with a t-interval."""

    mean: float
    low: float | None  # Lower end of the interval; None for a single pair, which has none
    high: float | None
    n_pairs: int
    confidence: float = CONFIDENCE

    @property
    def shown(self) -> bool:
        """Whether zero is outside the interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_difference(
    differences: Sequence[float], confidence: float = CONFIDENCE
) -> PairedDifference:
    """The t-interval of the mean of paired differences: mean +- t(n - 1) s / sqrt(n).

    Raises ValueError without a pair, or where the (two-sided) confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    found = spread(differences)
    if found.std is None:
        return PairedDifference(found.mean, None, None, 1, confidence)
    quantile = float(stdtrit(found.n - 1, (1 + confidence) / 2))
    half = quantile * found.std / found.n**0.5
    return PairedDifference(found.mean, found.mean - half, found.mean + half, found.n, confidence)
