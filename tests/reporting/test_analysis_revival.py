from __future__ import annotations

import pytest
from report_inputs import events

from msae_plugin.reporting.analyses import revival_statistics, revivals, timeline


def test_every_revival_has_the_fate_that_the_log_tells():
    fates = [(item.step, item.latent, item.fate) for item in revivals(events())]
    assert fates == [
        (50, 1, "alive"),
        (50, 2, "dead"),
        (50, 3, "revived again"),
        (150, 3, "not judged"),
    ]


def test_totals_by_hand():
    found = revival_statistics(revivals(events()), steps=200)
    assert (found.revivals, found.latents, found.repeated) == (4, 3, 1)
    assert found.per_thousand_steps == 20
    assert found.settled == 3
    assert found.survival == pytest.approx(1 / 3)
    assert found.re_death == pytest.approx(2 / 3)
    assert found.distance == pytest.approx(0.95)
    assert found.old_cosine == pytest.approx(0.35)
    assert found.firing_rate == pytest.approx(0.01)
    assert found.sources == {"error_samples": 4}


def test_nothing_revived_has_no_shares():
    found = revival_statistics([], steps=0)
    assert (found.revivals, found.survival, found.re_death) == (0, None, None)
    assert found.per_thousand_steps is None


def test_the_timeline_counts_every_revival_once():
    middles, counts = timeline(revivals(events()), steps=200, bins=4)
    assert middles == [25, 75, 125, 175]
    assert counts["alive"] == [1, 0, 0, 0]
    assert counts["not judged"] == [0, 0, 1, 0]
    assert sum(sum(parts) for parts in counts.values()) == 4


def test_an_event_of_another_kind_is_an_error_and_not_a_guess():
    with pytest.raises(KeyError):
        revivals([{"event": "revival", "step": 1}])
