"""What the weights and logs of every SAE on disk show, computed once for all sections.

Fates of revived latents are those of the events in `revivals.jsonl`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from sae_lens import SAE

from msae_plugin.common.errors import InputError
from msae_plugin.common.table import Spread, spread
from msae_plugin.evaluation.outcomes import Reporter
from msae_plugin.reporting.dictionaries import (
    CosineBin,
    DecoderDiversity,
    FiringDensity,
    ScaleFiring,
    coactivation_by_cosine,
    decoder_diversity,
    firing_by_scale,
    firing_density,
)
from msae_plugin.reporting.sources import TrainedSAE

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


@dataclass(frozen=True)
class SAEAnalysis:
    """One SAE."""

    sae: TrainedSAE
    diversity: DecoderDiversity | None  # of its decoder; None without weights
    density: FiringDensity | None  # how often its latents fired in training; None when not stored
    scales: Sequence[ScaleFiring]  # firing by nested prefix; empty without prefixes
    found_revivals: Sequence[Revival]  # in order; empty without any
    revival: RevivalStatistics | None  # totals; None for an SAE that was trained without revival

    @property
    def auxk(self) -> bool | None:
        """Whether AuxK was on; None when not recorded."""
        coefficient = self.sae.training.get("aux_loss_coefficient")
        return None if coefficient is None else bool(coefficient)

    @cached_property
    def numbers(self) -> Mapping[str, float]:
        """What tables and figures compare of it, by name; what is not recorded is left out."""
        found: dict[str, float | None] = {
            "dead": self.sae.rows[-1].get("dead_latents") if self.sae.rows else None,
            "uniqueness": self.sae.metrics.get("ground_truth/uniqueness"),
        }
        if self.density is not None:
            found |= {"median_frequency": self.density.median, "never": self.density.never}
        if self.diversity is not None:
            found["mean_max_cosine"] = self.diversity.mean_max_cosine
            found["effective_rank"] = self.diversity.effective_rank
            for clusters in self.diversity.clusters:
                found[f"largest_cluster_{clusters.cosine:g}"] = clusters.largest
                share = clusters.single / total if (total := sum(clusters.sizes)) else None
                found[f"single_share_{clusters.cosine:g}"] = share
        if self.revival is not None:
            found |= {
                "revivals": self.revival.revivals,
                "frequency": self.revival.per_thousand_steps,
                "survival": self.revival.survival,
                "re_death": self.revival.re_death,
                "not_judged": self.revival.fates["not judged"],
                "repeated": self.revival.repeated,
                "distance": self.revival.distance,
                "old_cosine": self.revival.old_cosine,
                "firing_rate": self.revival.firing_rate,
            }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class AnalysedGroup:
    """SAEs of one method and target L0, by seed."""

    method: str
    l0_target: float | None  # None when not recorded
    saes: Sequence[SAEAnalysis]  # in the order of the data

    @property
    def label(self) -> str:
        """The method and its target L0."""
        return self.method if self.l0_target is None else f"{self.method}, L0 {self.l0_target:g}"

    def values(self, name: str) -> dict[int | None, float]:
        """One of the numbers by seed, of the SAEs that have it."""
        return {a.sae.seed: a.numbers[name] for a in self.saes if name in a.numbers}

    def spread(self, name: str) -> Spread | None:
        """Mean over seeds of one of the numbers; None when no SAE has it."""
        values = [a.numbers[name] for a in self.saes if name in a.numbers]
        return spread(values) if values else None


def analyse(trained: Sequence[TrainedSAE], report: Reporter) -> list[SAEAnalysis]:
    """Read the weights of every SAE and work out what they show."""
    found: list[SAEAnalysis] = []
    for done, sae in enumerate(trained):
        report("analysing the SAEs on disk", done, len(trained))
        found.append(_analyse(sae))
    return found


def _analyse(sae: TrainedSAE) -> SAEAnalysis:
    decoder, frequencies = sae.decoder(), sae.frequencies()
    try:
        diversity = None if decoder is None else decoder_diversity(decoder)
    except ValueError as error:
        raise InputError(f"{str(sae.export)!r}: {error}: train it again") from error
    try:
        events = revivals(sae.events)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{str(sae.folder)!r}: an event of its revivals.jsonl lacks {error}: not written by "
            "this package"
        ) from error
    fractions = sae.training.get("prefix_fractions") or []
    revives = bool(events) or bool(sae.training.get("revival_every"))
    return SAEAnalysis(
        sae=sae,
        diversity=diversity,
        density=None if frequencies is None else firing_density(frequencies),
        scales=firing_by_scale(frequencies, fractions)
        if frequencies is not None and fractions
        else (),
        found_revivals=events,
        revival=revival_statistics(events, sae.steps) if revives else None,
    )


def grouped(analyses: Sequence[SAEAnalysis]) -> list[AnalysedGroup]:
    """By method and target L0, lowest L0 first."""
    by_key: dict[tuple[str, float | None], list[SAEAnalysis]] = {}
    for item in analyses:
        by_key.setdefault((item.sae.method, item.sae.l0_target), []).append(item)
    groups = [AnalysedGroup(method, l0, saes) for (method, l0), saes in by_key.items()]
    return sorted(groups, key=lambda g: float("inf") if g.l0_target is None else g.l0_target)


def twins(
    groups: Sequence[AnalysedGroup], prefixes: Sequence[str], switch: str
) -> list[tuple[AnalysedGroup, AnalysedGroup]]:
    """Pairs of groups that differ in one mechanism alone: with it, without it."""
    keyed: dict[str, dict[bool, AnalysedGroup]] = {}
    for group in groups:
        settings = group.saes[0].sae.training
        if switch not in settings:
            continue
        rest = {k: v for k, v in settings.items() if not k.startswith(tuple(prefixes))}
        config = group.saes[0].sae.config
        same = (group.l0_target, config.get("architecture"), config.get("d_sae"))
        key = repr((same, sorted(rest.items())))
        # The first of several twins, in the order of the data.
        keyed.setdefault(key, {}).setdefault(bool(settings[switch]), group)
    return [(pair[True], pair[False]) for pair in keyed.values() if len(pair) == 2]


def coactivation(sae: TrainedSAE) -> tuple[int, list[CosineBin]] | None:
    """Co-activation against decoder cosine on the activations that the run kept."""
    activations = sae.activations()
    if activations is None or sae.export is None:
        return None
    try:
        loaded: SAE[Any] = SAE.load_from_disk(sae.export, device="cpu")
        with torch.no_grad():
            latents = loaded.encode(activations)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{str(sae.export)!r} cannot be run on its activations: {first}"
        ) from error
    return activations.shape[0], coactivation_by_cosine(latents, loaded.W_dec)
