"""What may be said of a paired difference: one word, and never a win inside the interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

from msae_plugin.comparison.statistics import NO_DIFFERENCE, PairedDifference, paired_difference

Wording = Literal["better", "worse", "higher", "lower", "no difference shown", "one pair"]


Key = TypeVar("Key")


def difference_of(
    ours: Mapping[Key, float], theirs: Mapping[Key, float]
) -> PairedDifference | None:
    """Ours minus theirs, over the pairs that both have; None without one.

    Args:
        ours: Value by what makes a pair: the seed, or target L0 and seed.
        theirs: The same of the other method.
    """
    found = [value - theirs[key] for key, value in ours.items() if key in theirs]
    return paired_difference(found) if found else None


def wording(difference: PairedDifference, higher_is_better: bool | None) -> Wording:
    """The word for a difference.

    Args:
        difference: Ours minus theirs.
        higher_is_better: As in the metric's definition; None where neither is.
    """
    if difference.low is None:
        return "one pair"
    if not difference.shown:
        return NO_DIFFERENCE
    if higher_is_better is None:
        return "higher" if difference.mean > 0 else "lower"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
