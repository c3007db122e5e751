"""Effects of revival and AuxK: how often, who survived, how far, and what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msae_plugin.common.table import CellValue, Spread, Table, columns, digits_for, number
from msae_plugin.reporting.analyses.per_sae import AnalysedGroup, SAEAnalysis, grouped, twins
from msae_plugin.reporting.analyses.revival import FATES, Fate, timeline
from msae_plugin.reporting.document import Block, Bullets, Place, Section, Text, slug
from msae_plugin.reporting.figures import Panel, bars, panels
from msae_plugin.reporting.metrics import percent, sentence
from msae_plugin.reporting.rows import difference_of
from msae_plugin.reporting.sections.results import described_difference

_UNIQUENESS = "ground_truth/uniqueness"


@dataclass(frozen=True)
class Quantity:
    """Something that revival may change."""

    heading: str  # with its unit
    higher_is_better: bool | None  # none where neither is
    read: Callable[[SAEAnalysis], float | None]  # its value of an SAE; None when not recorded

    @property
    def arrow(self) -> str:
        """Which way is better."""
        if self.higher_is_better is None:
            return ""
        return " ↑" if self.higher_is_better else " ↓"


def _largest_cluster(place: int) -> Callable[[SAEAnalysis], float | None]:
    def read(analysis: SAEAnalysis) -> float | None:
        return None if analysis.diversity is None else analysis.diversity.clusters[place].largest

    return read


def _single_share(place: int) -> Callable[[SAEAnalysis], float | None]:
    def read(analysis: SAEAnalysis) -> float | None:
        if analysis.diversity is None:
            return None
        clusters = analysis.diversity.clusters[place]
        total = sum(clusters.sizes)
        return clusters.single / total if total else None

    return read


QUANTITIES = (
    Quantity("dead latents at the end", False, lambda a: a.dead),
    Quantity("uniqueness (share)", True, lambda a: a.sae.metrics.get(_UNIQUENESS)),
    Quantity(
        "effective rank of the decoder (dimensions)",
        True,
        lambda a: None if a.diversity is None else a.diversity.effective_rank,
    ),
    Quantity(
        "mean max decoder cosine",
        False,
        lambda a: None if a.diversity is None else a.diversity.mean_max_cosine,
    ),
    Quantity("largest cluster at cos > 0.2 (latents)", False, _largest_cluster(0)),
    Quantity("largest cluster at cos > 0.5 (latents)", False, _largest_cluster(1)),
    Quantity("latents without a neighbour at cos > 0.5 (share)", True, _single_share(1)),
)
"""Dead latents and diversity; thresholds are those of `analysis_decoder.CLUSTER_COSINES`."""


def effect_blocks(
    place: Place, mechanism: str, pairs: Sequence[tuple[AnalysedGroup, AnalysedGroup]]
) -> list[Block]:
    """A sentence per pair, the numbers, and a figure; nothing when nothing is recorded."""
    rows: list[list[CellValue]] = []
    told: list[str] = []
    for on, off in pairs:
        parts: list[str] = []
        for quantity in QUANTITIES:
            with_it, without = on.spread(quantity.read), off.spread(quantity.read)
            if with_it is None or without is None:
                continue
            found = difference_of(on.values(quantity.read), off.values(quantity.read))
            shown = (
                "no seed in common"
                if found is None
                else described_difference(found, quantity.higher_is_better)
            )
            digits = digits_for([with_it.mean, without.mean])
            rows.append(
                [
                    on.label, off.label, quantity.heading + quantity.arrow,
                    _rounded(with_it, digits), _rounded(without, digits), shown,
                ]
            )  # fmt: skip
            parts.append(
                f"{quantity.heading} {number(without.mean, digits)} without and "
                f"{number(with_it.mean, digits)} with it ({shown})"
            )
        if parts:
            told.append(
                f"{sentence(mechanism)}, {off.label} against {on.label}: {'; '.join(parts)}."
            )
    if not rows:
        return []
    headings = (
        ("on", f"{mechanism} on"), ("off", f"{mechanism} off"), ("quantity", "quantity"),
        ("mean_on", "on"), ("mean_off", "off"), ("difference", "on minus off"),
    )  # fmt: skip
    table = Table(
        place.named(f"effect-of-{slug(mechanism)}"),
        f"SAEs that differ in {mechanism} alone. Mean ± one standard deviation over seeds, and "
        "the paired difference with its 95 % interval.",
        columns(*headings),
        rows,
    )
    figure = _figure(place, mechanism, pairs)
    return [Bullets(told), table, *([] if figure is None else [figure])]


def _figure(
    place: Place, mechanism: str, pairs: Sequence[tuple[AnalysedGroup, AnalysedGroup]]
) -> Block | None:
    """Every pair side by side, without the mechanism on the left."""
    several = len({on.l0_target for on, _ in pairs}) > 1
    groups = [group for on, off in pairs for group in (off, on)]
    categories = [group.label if several else group.method for group in groups]
    shown = [
        Panel(
            quantity.heading + quantity.arrow,
            quantity.heading,
            [
                list(group.values(quantity.read).values())
                for on, off in pairs
                for group in (off, on)
            ],
        )
        for quantity in QUANTITIES
    ]
    return panels(
        place.named(f"effect-of-{slug(mechanism)}-figure"),
        f"Pairs of SAEs that differ in {mechanism} alone, the one without it first. Small marks: "
        "single seeds; large ones: their mean.",
        categories,
        shown,
        f"without {mechanism}, with it",
        connected=False,
    )


def _rounded(value: Spread, digits: int) -> str:
    text = number(value.mean, digits)
    return text if value.std is None else f"{text} ± {number(value.std, digits)}"


REVIVAL_FIELDS, AUXK_FIELDS = ("revival_",), ("aux_loss_coefficient",)


def revival_section(place: Place, analyses: Sequence[SAEAnalysis]) -> Section | None:
    """Frequency, survival, distance and effect; None when no SAE was trained with revival."""
    groups = grouped(analyses)
    revived = [group for group in groups if any(a.revival is not None for a in group.saes)]
    pairs = {
        "revival": twins(groups, REVIVAL_FIELDS, "revival_every"),
        "AuxK": twins(groups, AUXK_FIELDS, "aux_loss_coefficient"),
    }
    if not revived and not pairs["AuxK"]:
        return None
    blocks: list[Block] = []
    if revived:
        blocks += [Bullets([_told(group) for group in revived]), _revival_table(place, revived)]
        for group in revived:
            blocks += _revival_figures(place, group)
    else:
        blocks.append(Text("No SAE was trained with revival."))
    for mechanism, found in pairs.items():
        if found:
            blocks += effect_blocks(place, mechanism, found)
        elif mechanism == "revival" and revived:
            blocks.append(
                Text(
                    "The effect of revival on diversity is not measured: no SAE differs from one "
                    "of these in revival alone."
                )
            )
    return Section(place.named("revival"), place.titled("What revival does"), blocks)


def _told(group: AnalysedGroup) -> str:
    found = [a.revival for a in group.saes if a.revival is not None]
    total = sum(item.revivals for item in found)
    settled = sum(item.settled for item in found)
    seeds = f"{len(found)} {'seed' if len(found) == 1 else 'seeds'}"
    start = f"{group.label} ({seeds}): {total:,} revivals"
    if not total:
        return f"{start}."
    alive = sum(item.fates["alive"] for item in found)
    again = sum(item.fates["dead"] + item.fates["revived again"] for item in found)
    rates = [item.per_thousand_steps for item in found if item.per_thousand_steps is not None]
    frequency = f", {sum(rates) / len(rates):,.1f} per 1000 steps" if rates else ""
    outcome = (
        f"of {settled:,} with a known fate {percent(alive / settled)} lived and "
        f"{percent(again / settled)} died again"
        if settled
        else "no fate is known: the run ended before the first judgement"
    )
    distances = [item.distance for item in found if item.distance is not None]
    moved = (
        f"; median distance travelled {sum(distances) / len(distances):.2f} (1 minus the cosine of "
        "the old and the new direction)"
        if distances
        else ""
    )
    return f"{start}{frequency}; {outcome}{moved}."


def _revival_table(place: Place, groups: Sequence[AnalysedGroup]) -> Table:
    rows: list[list[CellValue]] = []
    for group in groups:
        rows.append(
            [
                group.method,
                group.l0_target,
                _on_off(group.saes[0].auxk),
                group.spread(lambda a: a.revival and a.revival.revivals),
                group.spread(lambda a: a.revival and a.revival.per_thousand_steps),
                group.spread(lambda a: a.revival and a.revival.survival),
                group.spread(lambda a: a.revival and a.revival.re_death),
                group.spread(lambda a: a.revival and a.revival.fates["not judged"]),
                group.spread(lambda a: a.revival and a.revival.repeated),
                group.spread(lambda a: a.revival and a.revival.distance),
                group.spread(lambda a: a.revival and a.revival.old_cosine),
                group.spread(lambda a: a.revival and a.revival.firing_rate),
            ]
        )
    headings = (
        ("method", "method", ""), ("l0_target", "target L0", ""), ("auxk", "AuxK", ""),
        ("revivals", "revivals", "per run"), ("frequency", "frequency", "per 1000 steps"),
        ("survival", "survival", "share of known fates"),
        ("re_death", "re-death", "share of known fates"),
        ("not_judged", "not judged", "the run ended first"),
        ("repeated", "revived again", "latents"),
        ("distance", "distance travelled", "1 - cosine, median"),
        ("old_cosine", "old overlap", "cosine, median"),
        ("firing_rate", "firing rate after", "share of tokens, median"),
    )  # fmt: skip
    return Table(
        place.named("revival-totals"),
        "Revivals. Survival: alive when judged, among revivals whose fate is known; re-death: dead "
        "when judged, or revived once more before that.",
        columns(*headings),
        rows,
    )


def _revival_figures(place: Place, group: AnalysedGroup) -> list[Block]:
    """Of the first seed with revivals: when they happened, and how far they went."""
    chosen = next((a for a in group.saes if a.found_revivals), None)
    if chosen is None or chosen.sae.steps < 1:
        return []
    label = group.label
    seed = "" if chosen.sae.seed is None else f", seed {chosen.sae.seed}"
    middles, counts = timeline(chosen.found_revivals, chosen.sae.steps)
    kept: list[Fate] = [fate for fate in FATES if any(counts[fate])]
    present = {str(fate): [float(n) for n in counts[fate]] for fate in kept}
    totals = ", ".join(f"{sum(counts[fate])} {fate}" for fate in kept)
    name = place.named(slug(f"revival {label}"))
    blocks: list[Block] = [
        bars(
            f"{name}-fates",
            f"Revivals over training by what became of them: {label}{seed}.",
            f"Stacked bars of revivals over training steps: {totals}.",
            [f"{middle:,.0f}" for middle in middles],
            present,
            "training step",
            "revivals",
            stacked=True,
        )
    ]
    distances = [r.distance for r in chosen.found_revivals if r.distance is not None]
    if distances:
        edges = [i / 10 for i in range(21)]
        heights = [0.0] * 20
        for distance in distances:
            heights[min(19, max(0, int(distance * 10)))] += 1
        median = sorted(distances)[len(distances) // 2]
        blocks.append(
            bars(
                f"{name}-distance",
                f"How far revived latents were turned: {label}{seed}. 0 is not at all, 1 a right "
                "angle, 2 the opposite direction.",
                f"Histogram of {len(distances)} distances travelled, median {median:.2f}.",
                [f"{edge:.1f}" for edge in edges[:-1]],
                {"revivals": heights},
                "distance travelled (1 - cosine), lower end of the bin",
                "revivals",
            )
        )
    return blocks


def _on_off(value: bool | None) -> str:
    return "not recorded" if value is None else "on" if value else "off"
