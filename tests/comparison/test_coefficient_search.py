"""The search on curves whose answer is known."""

import math
from collections.abc import Callable

import pytest

from msae_plugin.comparison.group_training import is_matched
from msae_plugin.comparison.training_schedule import (
    Trial,
    best_trial,
    corrected_coefficient,
    next_coefficient,
    slope,
)


def search(
    curve: Callable[[float], float], target: float, start: float, trials: int
) -> list[Trial]:
    found: list[Trial] = []
    for _ in range(trials):
        coefficient = next_coefficient(found, target, start)
        found.append(Trial(coefficient, curve(coefficient), tokens=1))
        if is_matched(found[-1].l0, target, 0.05):
            break
    return found


@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("power", [0.4, 1.0, 2.5])
def test_a_power_law_is_found_from_far_away(start: float, power: float) -> None:
    found = search(lambda c: 40 * c**-power, target=16.0, start=start, trials=8)
    assert is_matched(found[-1].l0, 16.0, 0.05)
    assert found[-1].coefficient == pytest.approx((40 / 16) ** (1 / power), rel=0.06 / power)


def test_a_curve_that_saturates_and_dies_is_found() -> None:
    def curve(c: float) -> float:
        return 0.0 if c > 30 else 900 / (1 + c**1.5)

    for start in (0.001, 50.0):
        found = search(curve, target=12.0, start=start, trials=12)
        assert is_matched(found[-1].l0, 12.0, 0.05), (start, found)


def test_trials_stay_inside_their_bracket() -> None:
    trials = [Trial(1.0, 100.0, 1), Trial(8.0, 1.0, 1)]
    for target in (99.0, 30.0, 1.1):
        assert 1.0 < next_coefficient(trials, target, 1.0) < 8.0


def test_the_first_trial_is_the_start_and_steps_are_bounded() -> None:
    assert next_coefficient([], 10, 0.3) == 0.3
    step = next_coefficient([Trial(1.0, 1e6, 1)], 10, 1.0)
    assert step == pytest.approx(8.0)
    assert next_coefficient([Trial(1.0, 0.0, 1)], 10, 1.0) == pytest.approx(1 / 8)


def test_a_whole_run_is_corrected_along_the_slope() -> None:
    trials = [Trial(1.0, 40.0, 1), Trial(2.0, 20.0, 1)]
    assert slope(trials, 20) == pytest.approx(-1)
    assert corrected_coefficient(2.0, 30.0, 20.0, trials) == pytest.approx(3.0)
    # Without a slope that means anything, L0 is taken for inversely proportional.
    assert corrected_coefficient(2.0, 30.0, 20.0, [Trial(1.0, 20.0, 1)]) == pytest.approx(3.0)


def test_matching_is_relative_and_the_best_is_the_closest_in_ratio() -> None:
    assert is_matched(10.5, 10, 0.05)
    assert not is_matched(10.6, 10, 0.05)
    assert is_matched(10 / 1.049, 10, 0.05)
    assert best_trial([Trial(1, 20, 1), Trial(2, 6, 1)], 10).l0 == 6
    assert math.isfinite(slope([Trial(1, 0, 1), Trial(2, 0, 1)], 10))
    with pytest.raises(ValueError, match="at least one"):
        best_trial([], 10)
