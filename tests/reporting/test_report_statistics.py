"""Spread and intervals against numbers computed by hand and a table of Student's t; words."""

from __future__ import annotations

import math

import pytest

from msae_plugin.common.table import digits_for, number, signed, spread
from msae_plugin.reporting.results import difference_of, headlines_of, paired_difference, wording


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


def test_only_shared_pairs_count():
    found = difference_of({1: 3.0, 2: 5.0, 3: 9.0}, {2: 4.0, 1: 1.0, 4: 7.0})
    assert found is not None
    assert (found.mean, found.n_pairs) == (1.5, 2)
    assert difference_of({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(
    ("ours", "higher", "word"),
    [
        ([1.0, 1.1, 1.2], True, "better"),
        ([1.0, 1.1, 1.2], False, "worse"),
        ([1.0, 1.1, 1.2], None, "higher"),
        ([-1.0, -1.1, -1.2], None, "lower"),
        ([-1.0, -1.1, -1.2], False, "better"),
        ([1.0, -0.9, 1.1], True, "no difference shown"),
        ([1.0, -0.9, 1.1], False, "no difference shown"),
        ([1.0, -0.9, 1.1], None, "no difference shown"),
        ([5.0], True, "one pair"),
    ],
)
def test_a_word_for_each_difference(ours, higher, word):
    found = difference_of(dict(enumerate(ours)), dict.fromkeys(range(len(ours)), 0.0))
    assert found is not None
    assert wording(found, higher) == word


def test_numbers_of_a_column_share_their_digits():
    assert digits_for([0.81234, 0.5]) == 4
    assert digits_for([1234.5, 2.25]) == 0
    assert digits_for([12.5]) == 2
    assert digits_for([3.0, 200.0]) == 0
    assert digits_for([0.00251, 0.0001]) == 5
    assert number(-0.00001, 3) == "0.000"
    assert number(-1234.5, 1) == "−1,234.5"
    assert number(float("nan"), 2) == "not measured"
    assert signed(0.5, 2) == "+0.50"
    assert signed(-0.5, 2) == "−0.50"


def test_headlines_prefer_sound_numbers():
    metrics = [
        "core/explained_variance",  # SAEBench 0.6's, which is none
        "training/explained_variance",
        "heldout/explained_variance",
        "training/dead_latents",
        "heldout/dead_latents",
        "training/final_loss",
    ]
    assert headlines_of(("explained_variance", "dead", "final_loss", "f1"), metrics) == {
        "explained_variance": "heldout/explained_variance",
        "dead": "heldout/dead_latents",
        "final_loss": "training/final_loss",
    }
    streaming = [*metrics, "core/explained_variance_streaming"]
    assert headlines_of(("explained_variance",), streaming) == {
        "explained_variance": "core/explained_variance_streaming"
    }
    assert headlines_of(("explained_variance",), metrics[:2]) == {}
