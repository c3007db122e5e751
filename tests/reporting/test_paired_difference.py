"""Spread and intervals against numbers computed by hand and a table of Student's t."""

import math

import pytest

from msae_plugin.common.table import spread
from msae_plugin.reporting.results import NO_DIFFERENCE, paired_difference, wording


def test_spread_is_the_sample_deviation() -> None:
    found = spread([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.std == pytest.approx(math.sqrt((16 / 9 + 1 / 9 + 25 / 9) / 2))
    assert spread([3.0]).std is None
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_the_interval_is_students() -> None:
    # t(2, .975) = 4.303 and t(4, .95) = 2.132 in any table.
    found = paired_difference([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high is not None
    assert found.high - 2 == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    ninety = paired_difference([0.0, 1.0, 2.0, 3.0, 4.0], confidence=0.9)
    assert ninety.low is not None
    assert 2 - ninety.low == pytest.approx(2.132 * math.sqrt(2.5) / math.sqrt(5), abs=1e-3)


def test_a_difference_within_its_interval_is_never_a_win() -> None:
    within = paired_difference([1.0, -0.9, 1.1])
    assert within.mean > 0
    assert not within.shown
    for better in (True, False, None):
        assert wording(within, better) == NO_DIFFERENCE
    single = paired_difference([5.0])
    assert not single.shown
    assert wording(single, True) == "one pair"
