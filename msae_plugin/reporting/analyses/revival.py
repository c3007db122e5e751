"""Fates of revived latents, from the events in `revivals.jsonl`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["alive", "dead", "revived again", "not judged"]
FATES: tuple[Fate, ...] = ("alive", "dead", "revived again", "not judged")


@dataclass(frozen=True)
class Revival:
    """One revival and what followed."""

    step: int
    latent: int  # which, in the order of training
    # `alive` or `dead` when it was judged; `revived again` when it died before that; `not
    # judged` when the run ended first.
    fate: Fate
    old_cosine: float | None  # cosine to the live latent that it interfered with, before
    distance: float | None  # 1 minus the cosine between its old and its new direction
    source: str  # where the new direction came from
    # Share of tokens on which it fired from the revival to the judgement; None when not
    # judged.
    firing_rate: float | None


@dataclass(frozen=True)
class RevivalStatistics:
    """Totals of one run."""

    revivals: int  # number of revivals
    latents: int  # distinct latents among them
    steps: int  # length of the run
    fates: Mapping[Fate, int]  # how many of each
    repeated: int  # latents that were revived more than once
    distance: float | None  # median distance travelled; None when not recorded
    old_cosine: float | None  # median cosine to the old neighbour
    firing_rate: float | None  # median firing rate after the revival, of the judged
    sources: Mapping[str, int]  # revivals by source of the new direction

    @property
    def per_thousand_steps(self) -> float | None:
        """Revivals per 1000 training steps; None for a run of unknown length."""
        return 1000 * self.revivals / self.steps if self.steps > 0 else None

    @property
    def settled(self) -> int:
        """Revivals whose fate is known."""
        return self.revivals - self.fates["not judged"]

    @property
    def survival(self) -> float | None:
        """Share found alive among those whose fate is known."""
        return self.fates["alive"] / self.settled if self.settled else None

    @property
    def re_death(self) -> float | None:
        """Share that died again, found dead or revived once more, among those with a known fate."""
        if not self.settled:
            return None
        return (self.fates["dead"] + self.fates["revived again"]) / self.settled


def revivals(events: Sequence[Mapping[str, Any]]) -> list[Revival]:
    """Join every revival with its outcome.

    Raises:
        KeyError: An event lacks a field that every version has written.
    """
    outcomes: dict[tuple[int, int], Mapping[str, Any]] = {}
    last: dict[int, int] = {}
    for event in events:
        latent = int(event["latent"])
        if event["event"] == "outcome":
            outcomes[latent, int(event["revived_at"])] = event
        elif event["event"] == "revival":
            last[latent] = max(last.get(latent, -1), int(event["step"]))
    found: list[Revival] = []
    for event in events:
        if event["event"] != "revival":
            continue
        latent, step = int(event["latent"]), int(event["step"])
        outcome = outcomes.get((latent, step))
        found.append(
            Revival(
                step=step,
                latent=latent,
                fate=_fate(outcome, revived_later=last[latent] > step),
                old_cosine=event.get("old_cosine"),
                distance=event.get("distance_travelled"),
                source=str(event.get("source", "not recorded")),
                firing_rate=None if outcome is None else outcome.get("firing_rate"),
            )
        )
    return found


def _fate(outcome: Mapping[str, Any] | None, *, revived_later: bool) -> Fate:
    if outcome is not None:
        return "alive" if outcome["survived"] else "dead"
    return "revived again" if revived_later else "not judged"


def revival_statistics(found: Sequence[Revival], steps: int) -> RevivalStatistics:
    """Totals."""
    per_latent = Counter(item.latent for item in found)
    fates = Counter(item.fate for item in found)
    return RevivalStatistics(
        revivals=len(found),
        latents=len(per_latent),
        steps=steps,
        fates={fate: fates[fate] for fate in FATES},
        repeated=sum(count > 1 for count in per_latent.values()),
        distance=_median([item.distance for item in found]),
        old_cosine=_median([item.old_cosine for item in found]),
        firing_rate=_median([item.firing_rate for item in found]),
        sources=dict(sorted(Counter(item.source for item in found).items())),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def timeline(
    found: Sequence[Revival], steps: int, bins: int = 20
) -> tuple[list[float], dict[Fate, list[int]]]:
    """Revivals over the course of training, by fate."""
    width = max(1, steps) / bins
    counts: dict[Fate, list[int]] = {fate: [0] * bins for fate in FATES}
    for item in found:
        counts[item.fate][min(bins - 1, max(0, int((item.step - 1) / width)))] += 1
    return [(place + 0.5) * width for place in range(bins)], counts
