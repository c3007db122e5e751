from __future__ import annotations

import pytest
from report_inputs import events

from msae_plugin.reporting.analyses import revival_numbers, revivals, timeline


def test_every_revival_has_the_fate_that_the_log_tells():
    fates = [(item.step, item.latent, item.fate) for item in revivals(events())]
    assert fates == [
        (50, 1, "alive"),
        (50, 2, "dead"),
        (50, 3, "revived again"),
        (150, 3, "not judged"),
    ]


def test_totals_by_hand():
    found = revival_numbers(revivals(events()), steps=200)
    assert found == pytest.approx(
        {
            "revivals": 4, "repeated": 1, "not_judged": 1, "frequency": 20,
            "survival": 1 / 3, "re_death": 2 / 3, "distance": 0.95, "old_cosine": 0.35,
            "firing_rate": 0.01,
        }
    )  # fmt: skip


def test_nothing_revived_has_no_shares():
    found = revival_numbers([], steps=0)
    assert (found["revivals"], found["survival"], found["re_death"]) == (0, None, None)
    assert found["frequency"] is None


def test_the_timeline_counts_every_revival_once():
    middles, counts = timeline(revivals(events()), steps=200, bins=4)
    assert middles == [25, 75, 125, 175]
    assert counts["alive"] == [1, 0, 0, 0]
    assert counts["not judged"] == [0, 0, 1, 0]
    assert sum(sum(parts) for parts in counts.values()) == 4


def test_an_event_of_another_kind_is_an_error_and_not_a_guess():
    with pytest.raises(KeyError):
        revivals([{"event": "revival", "step": 1}])
