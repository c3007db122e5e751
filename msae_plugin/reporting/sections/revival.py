"""Effects of revival and AuxK: how often, who survived, how far, and what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msae_plugin.common.table import (
    CellValue,
    Table,
    columns,
    digits_for,
    mean_and_std,
    number,
)
from msae_plugin.reporting.analyses.per_sae import AnalysedGroup, SAEAnalysis, grouped, twins
from msae_plugin.reporting.analyses.revival import FATES, Fate, timeline
from msae_plugin.reporting.document import Block, Bullets, Place, Section, Text, slug
from msae_plugin.reporting.figures import Panel, bars, panels
from msae_plugin.reporting.measurements import difference_of, percent, sentence
from msae_plugin.reporting.sections.results import described_difference


@dataclass(frozen=True)
class Quantity:
    """A number of an SAE that revival may change."""

    name: str  # in `SAEAnalysis.numbers`
    heading: str  # with its unit
    higher_is_better: bool

    @property
    def headed(self) -> str:
        """The heading and which way is better."""
        return f"{self.heading} {'↑' if self.higher_is_better else '↓'}"


QUANTITIES = (
    Quantity("dead", "dead latents at the end", False),
    Quantity("uniqueness", "uniqueness (share)", True),
    Quantity("effective_rank", "effective rank of the decoder (dimensions)", True),
    Quantity("mean_max_cosine", "mean max decoder cosine", False),
    Quantity("largest_cluster_0.2", "largest cluster at cos > 0.2 (latents)", False),
    Quantity("largest_cluster_0.5", "largest cluster at cos > 0.5 (latents)", False),
    Quantity("single_share_0.5", "latents without a neighbour at cos > 0.5 (share)", True),
)


def effect_blocks(
    place: Place, mechanism: str, pairs: Sequence[tuple[AnalysedGroup, AnalysedGroup]]
) -> list[Block]:
    """A sentence per pair, the numbers, and a figure; nothing when nothing is recorded."""
    rows: list[list[CellValue]] = []
    told: list[str] = []
    for on, off in pairs:
        parts: list[str] = []
        for quantity in QUANTITIES:
            with_it, without = on.spread(quantity.name), off.spread(quantity.name)
            if with_it is None or without is None:
                continue
            found = difference_of(on.values(quantity.name), off.values(quantity.name))
            shown = (
                "no seed in common"
                if found is None
                else described_difference(found, quantity.higher_is_better)
            )
            digits = digits_for([with_it.mean, without.mean])
            rows.append(
                [
                    on.label, off.label, quantity.headed,
                    mean_and_std(with_it, digits), mean_and_std(without, digits), shown,
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
    return [Bullets(told), table, *_figure(place, mechanism, pairs)]


def _figure(
    place: Place, mechanism: str, pairs: Sequence[tuple[AnalysedGroup, AnalysedGroup]]
) -> Sequence[Block]:
    """Every pair side by side, without the mechanism on the left."""
    several = len({on.l0_target for on, _ in pairs}) > 1
    groups = [group for on, off in pairs for group in (off, on)]
    categories = [group.label if several else group.method for group in groups]
    shown = [
        Panel(
            quantity.headed,
            quantity.heading,
            [
                list(group.values(quantity.name).values())
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
    numbers = (
        ("revivals", "revivals", "per run"), ("frequency", "frequency", "per 1000 steps"),
        ("survival", "survival", "share of known fates"),
        ("re_death", "re-death", "share of known fates"),
        ("not_judged", "not judged", "the run ended first"),
        ("repeated", "revived again", "latents"),
        ("distance", "distance travelled", "1 - cosine, median"),
        ("old_cosine", "old overlap", "cosine, median"),
        ("firing_rate", "firing rate after", "share of tokens, median"),
    )  # fmt: skip
    rows = [
        [
            group.method,
            group.l0_target,
            _on_off(group.saes[0].auxk),
            *(group.spread(name) for name, _, _ in numbers),
        ]
        for group in groups
    ]
    return Table(
        place.named("revival-totals"),
        "Revivals. Survival: alive when judged, among revivals whose fate is known; re-death: dead "
        "when judged, or revived once more before that.",
        columns(("method", "method"), ("l0_target", "target L0"), ("auxk", "AuxK"), *numbers),
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
