"""What revival and AuxK did: how often, who survived, how far, and what it changed."""

from __future__ import annotations

from collections.abc import Sequence

from msae_plugin.reporting.analyses.per_sae import AnalysedGroup, SAEAnalysis, grouped, twins
from msae_plugin.reporting.analyses.revival import FATES, Fate, timeline
from msae_plugin.reporting.document import (
    Block,
    Bullets,
    CellValue,
    Section,
    Table,
    Text,
    columns,
    slug,
)
from msae_plugin.reporting.figures import bars
from msae_plugin.reporting.metrics import percent
from msae_plugin.reporting.places import Place
from msae_plugin.reporting.sections.effects import effect_blocks

REVIVAL_FIELDS, AUXK_FIELDS = ("revival_",), ("aux_loss_coefficient",)


def revival_section(place: Place, analyses: Sequence[SAEAnalysis]) -> Section | None:
    """Frequency, survival, distance and effect; None when no SAE was trained with revival.

    Args:
        place: Where the SAEs are from.
        analyses: Of the SAEs.
    """
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
