"""The search for a coefficient that gives a target L0: secant steps in logarithms, kept bracketed.

L0 falls as the coefficient rises. Steps are taken in log coefficient and log L0, where sparsity
penalties are close to straight lines; once one trial was too dense and another too sparse, every
further one lies between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# No step changes the coefficient by more than this factor; the first one has no slope to go by.
_LARGEST_STEP = math.log(8.0)
_FIRST_SLOPE = -1.0
# An L0 of zero has no logarithm.
_SMALLEST_L0 = 0.05
# Share of a bracket that a trial keeps away from its ends.
_MARGIN = 0.1


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Args:
        coefficient: What was tried.
        l0: What it gave, active latents per token.
        tokens: What the run cost.
        whole: Whether it was as long as the runs that are reported.
    """

    coefficient: float
    l0: float
    tokens: int
    whole: bool = False


def log_error(l0: float, target: float) -> float:
    """log(l0 / target): zero at the target, positive where too many latents fire."""
    return math.log(max(l0, _SMALLEST_L0) / target)


def is_matched(l0: float, target: float, tolerance: float) -> bool:
    """Whether an L0 is within a relative tolerance of its target, either way."""
    return abs(log_error(l0, target)) <= math.log1p(tolerance) + 1e-9


def best_trial(trials: Sequence[Trial], target: float) -> Trial:
    """The one whose L0 is closest to the target, in ratio.

    Raises:
        ValueError: There is no trial.
    """
    if not trials:
        raise ValueError("a search needs at least one trial")
    return min(trials, key=lambda trial: abs(log_error(trial.l0, target)))


def next_coefficient(trials: Sequence[Trial], target: float, start: float) -> float:
    """What to try next.

    Args:
        trials: So far, in their order, all of one length.
        target: The L0 to reach.
        start: The first to try.
    """
    if not trials:
        return start
    points = [(math.log(t.coefficient), log_error(t.l0, target)) for t in trials]
    low = max((p for p in points if p[1] > 0), default=None)  # too dense: a larger one is needed
    high = min((p for p in points if p[1] <= 0), default=None)
    if low is not None and high is not None and low[0] < high[0]:
        # Two trials on one side: the other end of the bracket is too far off to be trusted.
        same_side = len(points) > 1 and (points[-1][1] > 0) == (points[-2][1] > 0)
        return math.exp((low[0] + high[0]) / 2 if same_side else _between(low, high))
    x, y = points[-1]
    step = -y / slope(trials, target)
    return math.exp(x + max(-_LARGEST_STEP, min(_LARGEST_STEP, step)))


def corrected_coefficient(
    coefficient: float, l0: float, target: float, trials: Sequence[Trial]
) -> float:
    """A coefficient corrected by what a whole run gave, along the slope of the short trials."""
    step = -log_error(l0, target) / slope(trials, target)
    return coefficient * math.exp(max(-_LARGEST_STEP, min(_LARGEST_STEP, step)))


def slope(trials: Sequence[Trial], target: float) -> float:
    """Slope d log L0 / d log coefficient between the two trials closest to the target; negative."""
    ordered = sorted(trials, key=lambda trial: abs(log_error(trial.l0, target)))
    for second in ordered[1:]:
        run = math.log(second.coefficient) - math.log(ordered[0].coefficient)
        rise = log_error(second.l0, target) - log_error(ordered[0].l0, target)
        if run and rise / run < -0.05:
            return rise / run
    return _FIRST_SLOPE


def _between(low: tuple[float, float], high: tuple[float, float]) -> float:
    width = high[0] - low[0]
    share = low[1] / (low[1] - high[1])
    return low[0] + width * max(_MARGIN, min(1 - _MARGIN, share))
