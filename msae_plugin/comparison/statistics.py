"""Spread over seeds, and paired differences with their intervals.

One rule of wording for every table: a difference whose interval contains zero is "no difference
shown", never a win. Two methods are paired where they have the same hook, target L0 and seed: the
same activations in the same order, at the same sparsity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from msae_plugin.common.table import spread

CONFIDENCE = 0.95
NO_DIFFERENCE = "no difference shown"

Pair = tuple[str, float, int]
"""Hook, target L0, seed."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences first - second over pairs, with a t-interval.

    Args:
        mean: Mean difference.
        low: Lower end of the interval; None for a single pair, which has none.
        high: Its upper end.
        n_pairs: Number of pairs.
        confidence: Of the interval.
    """

    mean: float
    low: float | None
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

    Args:
        differences: One per pair.
        confidence: Two-sided.

    Raises:
        ValueError: There is no pair, or the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    found = spread(differences)
    if found.std is None:
        return PairedDifference(found.mean, None, None, 1, confidence)
    quantile = float(stdtrit(found.n - 1, (1 + confidence) / 2))
    half = quantile * found.std / found.n**0.5
    return PairedDifference(found.mean, found.mean - half, found.mean + half, found.n, confidence)


def values_by_pair(
    rows: Iterable[Mapping[str, Any]], method: str, metric: str
) -> dict[Pair, float]:
    """A method's values of a metric, by hook, target L0 and seed.

    Args:
        rows: Rows of comparison.json; those without the metric are left out.
        method: As in the rows.
        metric: `evaluation/metric`.
    """
    found: dict[Pair, float] = {}
    for row in rows:
        value = row["metrics"].get(metric)
        if row["method"] == method and row["l0_target"] is not None and value is not None:
            found[str(row.get("hook", "")), float(row["l0_target"]), int(row["seed"])] = float(
                value
            )
    return found


def compare_methods(
    rows: Iterable[Mapping[str, Any]],
    first: str,
    second: str,
    metric: str,
    confidence: float = CONFIDENCE,
) -> PairedDifference | None:
    """The paired difference first - second of a metric; None where the two share no pair.

    Args:
        rows: Rows of comparison.json.
        first: A method.
        second: Another.
        metric: `evaluation/metric`.
        confidence: Of the interval.
    """
    listed = list(rows)
    ours, theirs = (values_by_pair(listed, name, metric) for name in (first, second))
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    return paired_difference([ours[pair] - theirs[pair] for pair in shared], confidence)


def verdict(
    difference: PairedDifference | None, first: str, second: str, higher_is_better: bool | None
) -> str:
    """One phrase on a difference: who is better, or that no difference is shown.

    Args:
        difference: first - second, from `compare_methods`.
        first: Name of the first method.
        second: Name of the second.
        higher_is_better: Of the metric; None where neither is better.
    """
    if difference is None:
        return "not compared: no L0 and seed in common"
    if difference.low is None or difference.high is None:
        return f"{NO_DIFFERENCE}: one pair has no interval (difference {difference.mean:+.4g})"
    interval = f"{difference.mean:+.4g} [{difference.low:+.4g}, {difference.high:+.4g}]"
    if not difference.shown:
        return f"{NO_DIFFERENCE}: {interval}"
    if higher_is_better is None:
        return (
            f"{first} is {'higher' if difference.mean > 0 else 'lower'} than {second}: {interval}"
        )
    better = (difference.mean > 0) == higher_is_better
    return f"{first} is {'better' if better else 'worse'} than {second}: {interval}"
