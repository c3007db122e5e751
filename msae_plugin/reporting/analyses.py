"""What the weights and logs of every SAE on disk show, computed once for all sections.

Overlap, rank and clusters of the decoder; how latents fire, and with whom; what became of revived
latents. Works in blocks on decoders of any width: what grows with d_sae x d_sae is compute, never
memory.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from msae_plugin.common.errors import InputError, first_line
from msae_plugin.common.progress import Report
from msae_plugin.common.table import Spread, spread
from msae_plugin.evaluation.heldout import BLOCK_ELEMENTS, cosines_to_others
from msae_plugin.reporting.sources import TrainedSAE
from msae_plugin.saes.find import LocatedSAE
from msae_plugin.saes.load import load_sae

CLUSTER_COSINES = (0.2, 0.5)


@dataclass(frozen=True)
class Clusters:
    """Groups of decoder directions linked by cosines above a threshold.

    Two directions are in one cluster when a chain of cosines above the threshold joins them
    (single linkage). A direction without such a neighbour is a cluster of one.
    """

    cosine: float
    sizes: list[int]  # number of directions in each cluster, largest first

    @property
    def largest(self) -> int:
        """Directions in the largest; 0 for an empty decoder."""
        return self.sizes[0] if self.sizes else 0

    @property
    def single(self) -> int:
        """Directions without a neighbour above the threshold."""
        return sum(size == 1 for size in self.sizes)


@dataclass(frozen=True)
class DecoderDiversity:
    """Overlap, rank and clusters of the directions of one decoder."""

    d_sae: int  # rows of the decoder
    d_in: int
    zero_rows: int  # rows without a direction; left out of everything else
    mean_max_cosine: float  # mean over directions of the cosine to the nearest other one
    max_cosines: torch.Tensor  # (directions,) those cosines
    # exp of the entropy of the directions' singular values, normalised to sum 1 (Roy and
    # Vetterli 2007): between 1 and min(d_in, d_sae).
    effective_rank: float
    norms: tuple[float, float, float]  # smallest, median and largest norm of the rows
    clusters: tuple[Clusters, ...]  # one per threshold


@torch.no_grad()
def decoder_diversity(
    W_dec: torch.Tensor,
    thresholds: Sequence[float] = CLUSTER_COSINES,
    block_elements: int = BLOCK_ELEMENTS,
) -> DecoderDiversity:
    """Overlap, rank and clusters of W_dec (d_sae, d_in), rows of any norm.

    Raises ValueError for a decoder that is no matrix, or holds NaN or infinite values.
    """
    if W_dec.ndim != 2:
        raise ValueError(f"a decoder is (d_sae, d_in); got shape {tuple(W_dec.shape)}")
    rows = W_dec.detach().float()
    norms = rows.norm(dim=1)
    if not torch.isfinite(norms).all():
        raise ValueError("the decoder holds NaN or infinite values")
    directions = rows[norms > 0] / norms[norms > 0, None]
    nearest, labels = _walk(directions, thresholds, block_elements)
    clusters = [
        Clusters(cosine, sorted((int(n) for n in np.bincount(label) if n), reverse=True))
        for cosine, label in zip(thresholds, labels, strict=True)
    ]
    ends = [f(norms).item() if len(norms) else 0.0 for f in (torch.min, torch.median, torch.max)]
    return DecoderDiversity(
        d_sae=rows.shape[0],
        d_in=rows.shape[1],
        zero_rows=int((norms == 0).sum()),
        mean_max_cosine=nearest.double().mean().item() if nearest.numel() else 0.0,
        max_cosines=nearest.cpu(),
        effective_rank=effective_rank(directions),
        norms=(ends[0], ends[1], ends[2]),
        clusters=tuple(clusters),
    )


@torch.no_grad()
def effective_rank(directions: torch.Tensor, rows_at_a_time: int = 8192) -> float:
    """exp(entropy) of the normalised singular values of (n, d_in): dimensions used evenly.

    The spectrum is that of the Gram matrix in float64. Between 1 and min(n, d_in); 0 for zeros.
    """
    gram = torch.zeros(directions.shape[1], directions.shape[1], dtype=torch.float64)
    for block in directions.split(rows_at_a_time):
        exact = block.double().cpu()
        gram += exact.T @ exact
    eigenvalues = torch.linalg.eigvalsh(gram)
    largest = eigenvalues.max().item() if eigenvalues.numel() else 0.0
    if largest <= 0:
        return 0.0
    # Rounding leaves about 1e-16 of the largest where the rank is exhausted; its square root would
    # count.
    values = eigenvalues[eigenvalues > 1e-12 * largest].sqrt()
    shares = values / values.sum()
    return (-(shares * shares.log()).sum()).exp().item()


def _walk(
    directions: torch.Tensor, thresholds: Sequence[float], block_elements: int
) -> tuple[torch.Tensor, list[Any]]:
    """Nearest cosines, and a label of each direction's cluster by threshold."""
    count = len(directions)
    labels = [np.arange(count) for _ in thresholds]
    nearest = [directions.new_zeros(0)]
    for start, cosines in cosines_to_others(directions, block_elements) if count > 1 else ():
        nearest.append(cosines.amax(dim=1))
        for index, cosine in enumerate(thresholds):
            left, right = (cosines > cosine).nonzero().T.cpu().numpy()
            # Links of this block between the clusters so far: never the links of all blocks.
            label = labels[index]
            ends = label[left + start], label[right]
            links = coo_array((np.ones(len(left)), ends), shape=(count, count))
            labels[index] = connected_components(links, directed=False)[1][label]
    return torch.cat(nearest), labels


# SAELens stores log10(frequency + 1e-10): this is "never".
NEVER_FIRED = 1e-9
COSINE_EDGES = (-1.0, -0.3, -0.1, 0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class FiringDensity:
    """How often latents fire."""

    never: int  # latents that fired on none of the counted tokens
    edges: list[float]  # edges of the bins, in log10 of the share of tokens
    counts: list[int]  # latents in each bin
    median: float | None  # median share of tokens among latents that fire; None when none does


def firing_density(
    frequencies: torch.Tensor, lowest: float = -6.0, bins: int = 24
) -> FiringDensity:
    """A histogram of log10 of the (d_sae,) shares; below `lowest` counts in the first bin."""
    fires = frequencies > NEVER_FIRED
    logs = frequencies[fires].double().log10().clamp(lowest, 0.0)
    edges = torch.linspace(lowest, 0.0, bins + 1, dtype=torch.float64)
    counts = torch.histc(logs, bins, lowest, 0.0) if logs.numel() else torch.zeros(bins)
    return FiringDensity(
        never=int((~fires).sum()),
        edges=edges.tolist(),
        counts=[int(count) for count in counts.tolist()],
        median=frequencies[fires].median().item() if logs.numel() else None,
    )


@dataclass(frozen=True)
class ScaleFiring:
    """The latents that one nested prefix adds to the one before it."""

    first: int  # index of the first latent
    end: int  # index behind the last
    active: float  # active latents per token among them
    share: float  # of all active latents
    never: int  # how many never fired


def firing_by_scale(
    frequencies: torch.Tensor, prefix_fractions: Sequence[float]
) -> list[ScaleFiring]:
    """How the active latents of a token spread over the nested prefixes.

    `frequencies` are in the exported order, in which prefixes are contiguous; the fractions are the
    inner prefixes', and the whole dictionary is added.
    """
    d_sae = frequencies.numel()
    ends = sorted({max(1, round(share * d_sae)) for share in prefix_fractions if share < 1})
    total = frequencies.double().sum().item()
    bands: list[ScaleFiring] = []
    for first, end in zip([0, *ends], [*ends, d_sae], strict=True):
        band = frequencies[first:end].double()
        active = band.sum().item()
        bands.append(
            ScaleFiring(
                first=first,
                end=end,
                active=active,
                share=active / total if total > 0 else 0.0,
                never=int((band <= NEVER_FIRED).sum()),
            )
        )
    return bands


@dataclass(frozen=True)
class CosineBin:
    """Pairs of latents whose decoder directions have a cosine between two values."""

    low: float
    high: float
    pairs: int  # how many, among latents that fired
    # Mean over the pairs of sum f_i f_j / sqrt(sum f_i^2 sum f_j^2): what the co-activation
    # penalty weighs; None without a pair.
    coactivation: float | None
    # Share of the pairs that fired together at least once; None without a pair.
    together: float | None


@torch.no_grad()
def coactivation_by_cosine(
    latents: torch.Tensor,
    W_dec: torch.Tensor,
    edges: Sequence[float] = COSINE_EDGES,
    block_elements: int = BLOCK_ELEMENTS,
) -> list[CosineBin]:
    """Whether latents that point alike also fire together, over all pairs, in blocks.

    `latents` is (tokens, d_sae); the first and last bin take the cosines outside of `edges`.
    """
    fired = (latents != 0).any(0)
    activity = latents[:, fired].float()
    activity = activity / activity.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    directions = torch.nn.functional.normalize(W_dec[fired].float(), dim=1)
    count = directions.shape[0]
    n_bins = len(edges) - 1
    pairs = torch.zeros(n_bins, dtype=torch.int64)
    strength = torch.zeros(n_bins, dtype=torch.float64)
    together = torch.zeros(n_bins, dtype=torch.int64)
    inner = torch.tensor(edges[1:-1])
    height = max(1, block_elements // max(1, count))
    later = torch.arange(count)
    for start in range(0, count, height):
        rows = slice(start, start + height)
        # Every pair once: the partner comes later.
        once = later[None, :] > later[rows, None]
        cosines = (directions[rows] @ directions.T)[once]
        shared = (activity[:, rows].T @ activity)[once]
        place = torch.bucketize(cosines, inner, right=True)
        pairs += torch.bincount(place, minlength=n_bins)
        strength += torch.bincount(place, shared.double(), minlength=n_bins)
        together += torch.bincount(place[shared != 0], minlength=n_bins)
    return [
        CosineBin(
            low=edges[i],
            high=edges[i + 1],
            pairs=n,
            coactivation=strength[i].item() / n if n else None,
            together=int(together[i]) / n if n else None,
        )
        for i, n in enumerate(pairs.tolist())
    ]


Fate = Literal["alive", "dead", "revived again", "not judged"]
FATES: tuple[Fate, ...] = ("alive", "dead", "revived again", "not judged")


@dataclass(frozen=True)
class Revival:
    """One revival and what followed."""

    step: int
    latent: int  # which, in the order of training
    fate: Fate  # `revived again` died before it was judged; `not judged`: the run ended first
    old_cosine: float | None  # cosine to the live latent that it interfered with, before
    distance: float | None  # 1 minus the cosine between its old and its new direction
    firing_rate: float | None  # share of tokens from the revival to the judgement


def revivals(events: Sequence[Mapping[str, Any]]) -> list[Revival]:
    """Join every revival with its outcome; KeyError for an event that lacks a field."""
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
        fate: Fate = "revived again" if last[latent] > step else "not judged"
        if outcome is not None:
            fate = "alive" if outcome["survived"] else "dead"
        distance, old_cosine = event.get("distance_travelled"), event.get("old_cosine")
        rate = None if outcome is None else outcome.get("firing_rate")
        found.append(Revival(step, latent, fate, old_cosine, distance, rate))
    return found


def revival_numbers(found: Sequence[Revival], steps: int) -> dict[str, float | None]:
    """Totals of a run; None for what cannot be said of it."""
    fates = Counter(item.fate for item in found)
    judged = len(found) - fates["not judged"]
    per_latent = Counter(item.latent for item in found)
    return {
        "revivals": len(found),
        "frequency": 1000 * len(found) / steps if steps > 0 else None,  # per thousand steps
        "survival": fates["alive"] / judged if judged else None,
        # Found dead, or died before the judgement and were revived once more.
        "re_death": (fates["dead"] + fates["revived again"]) / judged if judged else None,
        "not_judged": fates["not judged"],
        "repeated": sum(count > 1 for count in per_latent.values()),
        "distance": _median(item.distance for item in found),
        "old_cosine": _median(item.old_cosine for item in found),
        "firing_rate": _median(item.firing_rate for item in found),
    }


def _median(values: Iterable[float | None]) -> float | None:
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
    revives: bool  # whether it was trained with revival

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
        if self.revives:
            found |= revival_numbers(self.found_revivals, self.sae.steps)
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


def analyse(trained: Sequence[TrainedSAE], report: Report) -> list[SAEAnalysis]:
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
    return SAEAnalysis(
        sae=sae,
        diversity=diversity,
        density=None if frequencies is None else firing_density(frequencies),
        scales=firing_by_scale(frequencies, fractions)
        if frequencies is not None and fractions
        else (),
        found_revivals=events,
        revives=bool(events) or bool(sae.training.get("revival_every")),
    )


def grouped(analyses: Sequence[SAEAnalysis]) -> list[AnalysedGroup]:
    """By method and target L0, lowest L0 first."""
    by_key: dict[tuple[str, float | None], list[SAEAnalysis]] = {}
    for item in analyses:
        by_key.setdefault((item.sae.method, item.sae.l0_target), []).append(item)
    groups = [AnalysedGroup(method, l0, saes) for (method, l0), saes in by_key.items()]
    return sorted(groups, key=lambda g: float("inf") if g.l0_target is None else g.l0_target)


def pairs_by_switch(
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
        # The first of several pairs_by_switch, in the order of the data.
        keyed.setdefault(key, {}).setdefault(bool(settings[switch]), group)
    return [(pair[True], pair[False]) for pair in keyed.values() if len(pair) == 2]


def coactivation(sae: TrainedSAE) -> tuple[int, list[CosineBin]] | None:
    """Co-activation against decoder cosine on the activations that the run kept."""
    activations = sae.activations()
    if activations is None or sae.export is None:
        return None
    loaded = load_sae(LocatedSAE(str(sae.export), sae.name, sae.export), "cpu")[0]
    try:
        with torch.no_grad():
            latents = loaded.encode(activations)
    except RuntimeError as error:
        raise InputError(
            f"{str(sae.export)!r} cannot be run on its activations: {first_line(error)}"
        ) from error
    return activations.shape[0], coactivation_by_cosine(latents, loaded.W_dec)
