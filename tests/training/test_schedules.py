import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msae_plugin.training.schedules import GradientRateConfig, LearningRateRule

ON = GradientRateConfig(enabled=True, threshold=2.0, factor=0.5, recovery=1.01, floor=1e-5)


def test_without_rules_the_rate_is_the_scheduled_one_exactly() -> None:
    rule = LearningRateRule(GradientRateConfig())
    for step, (scheduled, norm) in enumerate([(3e-4, 1.0), (1e-5, 1e9), (0.0, 0.0)]):
        assert rule.rate(scheduled, norm, step) == scheduled


def test_floor_is_literal_after_the_warm_up_and_absent_during_it() -> None:
    rule = LearningRateRule(GradientRateConfig(), lr_floor=1e-5, warm_up_steps=3)
    scheduled = [1e-6, 2e-6, 3e-6, 3e-4, 2e-5, 9e-6, 0.0]
    rates = [rule.rate(value, 1.0, step) for step, value in enumerate(scheduled)]
    assert rates == [1e-6, 2e-6, 3e-6, 3e-4, 2e-5, 1e-5, 1e-5]


def test_a_large_gradient_halves_the_rate_which_then_recovers() -> None:
    rule = LearningRateRule(ON)
    # The first gradient sets the mean; 2.5 is above twice the mean of 1, 1.5 is not.
    assert [rule.rate(1e-3, norm, 0) for norm in (1.0, 1.0, 2.5)] == [1e-3, 1e-3, 5e-4]
    assert rule.rate(1e-3, 1.5, 0) == pytest.approx(5.05e-4, rel=1e-12)
    steps_to_recover = math.ceil(math.log(2) / math.log(1.01))
    for _ in range(steps_to_recover):
        rate = rule.rate(1e-3, 1.0, 0)
    assert rate == 1e-3


def test_the_mean_remembers_99_percent() -> None:
    rule = LearningRateRule(ON)
    rule.rate(1e-3, 1.0, 0)
    rule.rate(1e-3, 101.0, 0)
    assert rule.mean_gradient_norm == pytest.approx(2.0)


def test_growing_gradients_stop_at_the_floor() -> None:
    rule = LearningRateRule(ON)
    rates = [rule.rate(3e-4, 3.0**power, 0) for power in range(40)]
    assert min(rates) == pytest.approx(1e-5)
    assert rates[-1] == pytest.approx(1e-5)


def test_the_state_continues_the_sequence() -> None:
    norms = [1.0, 3.0, 1.0, 9.0, 2.0, 30.0, 1.0]
    whole = LearningRateRule(ON)
    expected = [whole.rate(1e-3, norm, step) for step, norm in enumerate(norms)]
    first, second = LearningRateRule(ON), LearningRateRule(ON)
    rates = [first.rate(1e-3, norm, step) for step, norm in enumerate(norms[:4])]
    second.load_state_dict(first.state_dict())
    rates += [second.rate(1e-3, norm, step) for step, norm in enumerate(norms[4:], 4)]
    assert rates == expected


@given(
    norms=st.lists(st.floats(0, 1e6), min_size=1, max_size=50),
    scheduled=st.floats(1e-8, 1.0),
    factor=st.floats(0.01, 1.0),
    floor=st.floats(1e-9, 1e-2),
)
def test_the_rule_never_raises_the_rate_nor_crosses_the_floor(
    norms: list[float], scheduled: float, factor: float, floor: float
) -> None:
    rule = LearningRateRule(GradientRateConfig(enabled=True, factor=factor, floor=floor))
    for step, norm in enumerate(norms):
        rate = rule.rate(scheduled, norm, step)
        assert rate <= scheduled
        assert rate >= min(floor, scheduled) * (1 - 1e-12)
