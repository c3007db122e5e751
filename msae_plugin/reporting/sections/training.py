"""Training: the runs, their curves, and what revival and AuxK do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msae_plugin.common.table import CellValue, Column, Table, digits_for, mean_and_std, number
from msae_plugin.reporting.analyses import (
    FATES,
    AnalysedGroup,
    Fate,
    SAEAnalysis,
    grouped,
    pairs_by_switch,
    timeline,
)
from msae_plugin.reporting.document import (
    Block,
    Bullets,
    Cells,
    Cohort,
    Section,
    Text,
    cell,
    slug,
    spread_cell,
    table_of,
)
from msae_plugin.reporting.figures import COLOURS, Panel, Style, bars, curves, panels
from msae_plugin.reporting.results import Missing, difference_of, percent, sentence
from msae_plugin.reporting.sections.results import described_difference
from msae_plugin.reporting.sources import Source, TrainedSAE, is_variant, run_l0_target

MOST_CURVES_OF_L0 = 3
CURVES = {
    "explained_variance": ("explained variance ↑", 0.0, 1.0),
    "dead_latents": ("dead latents ↓", None, None),
}
"""Of a training log: heading, and where the axis begins and ends."""


RunSAE = tuple[Source, str]


def runs_section(runs: Sequence[Source]) -> Section | None:
    """A row per SAE of every run; None without runs."""
    if not runs:
        return None

    def sae(row: RunSAE) -> Mapping[str, Any]:
        return row[0].content["saes"][row[1]]

    def of_run(key: str) -> Callable[[RunSAE], CellValue]:
        return lambda row: row[0].content.get(key)

    def speed(row: RunSAE) -> CellValue:
        return sae(row).get("tokens_per_second")

    def recorded(part: str, key: str, heading: str, detail: str = "", name: str = "") -> Cells:
        def value(row: RunSAE) -> CellValue:
            return (sae(row).get(part) or {}).get(key)

        return cell(name or key, heading, value, detail)

    table = table_of(
        "training-runs",
        "Training runs. Explained variance and loss are those of the training batches of the last "
        "log window, at the L0 of training; they are no evaluation.",
        [(run, name) for run in runs for name in run.content["saes"]],
        [
            cell("name", "SAE", lambda r: r[1] if len(runs) == 1 else f"{r[0].label}/{r[1]}"),
            cell("architecture", "architecture", lambda r: _text(sae(r).get("architecture"))),
            cell("status", "run", lambda r: _text(r[0].content.get("status"))),
            cell("seed", "seed", of_run("seed")),
            recorded("final", "step", "steps", name="steps"),
            recorded("final", "tokens", "tokens"),
            cell("l0_target", "target L0", lambda r: run_l0_target(*r)),
            recorded("export", "l0_exported", "L0 of the export"),
            recorded("final", "explained_variance", "explained variance", "last log window"),
            recorded("final", "loss", "final loss", "last log window", "final_loss"),
            recorded("final", "dead_latents", "dead", "latents, at the end"),
            cell("tokens_per_second", "speed", speed, "tokens/s, SAE alone"),
            cell("wall_seconds", "time of the run", of_run("wall_seconds"), "s, all its SAEs"),
        ],
    )
    return Section("runs", "Training runs", [table])


def _text(value: object) -> str:
    return str(value or "not recorded")


def missing_of_runs(runs: Sequence[Source], *, evaluated: bool) -> list[Missing]:
    """Unfinished and unmeasured parts of runs."""
    found: list[Missing] = []
    for run in runs:
        status, saes = _text(run.content.get("status")), run.content["saes"]
        if status != "complete":
            reason = str(run.content.get("failure") or "the run did not reach its end")
            found.append(Missing(run.label, "the whole run", status, reason))
        for name in saes:
            if status == "complete" and not saes[name].get("export"):
                found.append(Missing(run.label, name, "not exported", "no export is recorded"))
        if run.content.get("steps") == 0:
            found.append(Missing(run.label, "all SAEs", "never trained", "0 training steps"))
        if not evaluated:
            reason = "a training run measures none: give the folder of `msae eval` too"
            found.append(Missing(run.label, "held-out metrics", "not measured", reason))
    return found


def curves_section(
    cohort: Cohort, trained: Sequence[TrainedSAE], styles: Mapping[str, Style]
) -> Section | None:
    """Explained variance and dead latents over training; None without logs."""
    logged = [sae for sae in trained if len(sae.rows) > 1]
    if not logged:
        return None
    # Fifty lines would hide one another; a ladder's references are no variants.
    methods = [sae for sae in logged if not is_variant(sae.method)]
    variants = len(logged) > len(methods) > 0
    logged = methods or logged
    targets = list(dict.fromkeys(sae.l0_target for sae in logged))
    blocks: list[Block] = [
        Text(
            "Values of training batches, one line per SAE. Where k is annealed, early values are "
            "at a higher L0 and are not comparable with others."
            + (" Variants of the ladder are left out." if variants else "")
        )
    ]
    for l0 in targets[:MOST_CURVES_OF_L0]:
        where = "" if l0 is None else f", target L0 {l0:g}"
        tag = "" if l0 is None else f"-l0-{slug(f'{l0:g}')}"
        for key, (heading, bottom, top) in CURVES.items():
            lines = [_line(sae, key) for sae in logged if sae.l0_target == l0]
            blocks += curves(
                cohort.named(f"training-{key.replace('_', '-')}{tag}"),
                heading,
                f"{heading[:-2].capitalize()} during training{where}.",
                [line for line in lines if line is not None],
                styles,
                bottom=bottom,
                top=top,
            )
    if len(targets) > MOST_CURVES_OF_L0:
        left = ", ".join(f"{l0:g}" for l0 in targets[MOST_CURVES_OF_L0:] if l0 is not None)
        blocks.append(Text(f"Not drawn: target L0 {left}; each SAE's metrics.jsonl has them."))
    return Section(cohort.named("training"), cohort.titled("Training curves"), blocks)


def _line(sae: TrainedSAE, key: str) -> tuple[str, list[float], list[float]] | None:
    points = [
        (float(row["tokens"]), float(row[key]))
        for row in sae.rows
        if row.get(key) is not None and row.get("tokens") is not None
    ]
    return (sae.method, [x for x, _ in points], [y for _, y in points]) if points else None


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
REVIVAL_FIELDS, AUXK_FIELDS = ("revival_",), ("aux_loss_coefficient",)


def revival_section(cohort: Cohort, analyses: Sequence[SAEAnalysis]) -> Section | None:
    """Frequency, survival, distance and effect; None when no SAE was trained with revival."""
    groups = grouped(analyses)
    revived = [group for group in groups if any(a.revives for a in group.saes)]
    pairs = {
        "revival": pairs_by_switch(groups, REVIVAL_FIELDS, "revival_every"),
        "AuxK": pairs_by_switch(groups, AUXK_FIELDS, "aux_loss_coefficient"),
    }
    if not revived and not pairs["AuxK"]:
        return None
    blocks: list[Block] = []
    if revived:
        blocks += [Bullets([_told(group) for group in revived]), _revival_table(cohort, revived)]
        for group in revived:
            blocks += _revival_figures(cohort, group)
    else:
        blocks.append(Text("No SAE was trained with revival."))
    for mechanism, found in pairs.items():
        if found:
            blocks += _effect_blocks(cohort, mechanism, found)
        elif mechanism == "revival" and revived:
            blocks.append(
                Text(
                    "The effect of revival on diversity is not measured: no SAE differs from one "
                    "of these in revival alone."
                )
            )
    return Section(cohort.named("revival"), cohort.titled("What revival does"), blocks)


def _effect_blocks(
    cohort: Cohort, mechanism: str, pairs: Sequence[tuple[AnalysedGroup, AnalysedGroup]]
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
            shown = "no seed in common"
            if found is not None:
                shown = described_difference(found, quantity.higher_is_better)
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
        Column("on", f"{mechanism} on"), Column("off", f"{mechanism} off"),
        Column("quantity", "quantity"), Column("mean_on", "on"), Column("mean_off", "off"),
        Column("difference", "on minus off"),
    )  # fmt: skip
    table = Table(
        cohort.named(f"effect-of-{slug(mechanism)}"),
        f"SAEs that differ in {mechanism} alone. Mean ± one standard deviation over seeds, and "
        "the paired difference with its 95 % interval.",
        headings,
        rows,
    )
    # Every pair side by side, without the mechanism on the left.
    several = len({on.l0_target for on, _ in pairs}) > 1
    groups = [group for on, off in pairs for group in (off, on)]
    figure = panels(
        cohort.named(f"effect-of-{slug(mechanism)}-figure"),
        f"Pairs of SAEs that differ in {mechanism} alone, the one without it first. Small marks: "
        "single seeds; large ones: their mean.",
        [group.label if several else group.method for group in groups],
        [
            Panel(q.headed, q.heading, [list(group.values(q.name).values()) for group in groups])
            for q in QUANTITIES
        ],
        f"without {mechanism}, with it",
        colours=[COLOURS[0]] * len(groups),
    )
    return [Bullets(told), table, *figure]


def _told(group: AnalysedGroup) -> str:
    revived = [analysis for analysis in group.saes if analysis.revives]
    fates = Counter(item.fate for analysis in revived for item in analysis.found_revivals)
    total = fates.total()
    seeds = f"{len(revived)} {'seed' if len(revived) == 1 else 'seeds'}"
    start = f"{group.label} ({seeds}): {total:,} revivals"
    if not total:
        return f"{start}."
    settled, outcome = total - fates["not judged"], "no fate is known"
    if settled:
        outcome = f"of {settled:,} with a known fate {percent(fates['alive'] / settled)} lived and "
        outcome += f"{percent((fates['dead'] + fates['revived again']) / settled)} died again"
    else:
        outcome += ": the run ended before the first judgement"
    rate, distance = group.spread("frequency"), group.spread("distance")
    frequency = "" if rate is None else f", {rate.mean:,.1f} per 1000 steps"
    moved = (
        ""
        if distance is None
        else f"; median distance travelled {distance.mean:.2f} (1 minus the cosine of the old and "
        "the new direction)"
    )
    return f"{start}{frequency}; {outcome}{moved}."


def _revival_table(cohort: Cohort, groups: Sequence[AnalysedGroup]) -> Table:
    on_off = {None: "not recorded", True: "on", False: "off"}
    return table_of(
        cohort.named("revival-totals"),
        "Revivals. Survival: alive when judged, among revivals whose fate is known; re-death: dead "
        "when judged, or revived once more before that.",
        groups,
        [
            cell("method", "method"),
            cell("l0_target", "target L0"),
            cell("auxk", "AuxK", lambda group: on_off[group.saes[0].auxk]),
            spread_cell("revivals", "revivals", "per run"),
            spread_cell("frequency", "frequency", "per 1000 steps"),
            spread_cell("survival", "survival", "share of known fates"),
            spread_cell("re_death", "re-death", "share of known fates"),
            spread_cell("not_judged", "not judged", "the run ended first"),
            spread_cell("repeated", "revived again", "latents"),
            spread_cell("distance", "distance travelled", "1 - cosine, median"),
            spread_cell("old_cosine", "old overlap", "cosine, median"),
            spread_cell("firing_rate", "firing rate after", "share of tokens, median"),
        ],
    )


def _revival_figures(cohort: Cohort, group: AnalysedGroup) -> list[Block]:
    """Of the first seed with revivals: when they happened, and how far they went."""
    chosen = next((a for a in group.saes if a.found_revivals), None)
    if chosen is None or chosen.sae.steps < 1:
        return []
    label = group.label
    seed = "" if chosen.sae.seed is None else f", seed {chosen.sae.seed}"
    middles, counts = timeline(chosen.found_revivals, chosen.sae.steps)
    kept: list[Fate] = [fate for fate in FATES if any(counts[fate])]
    totals = ", ".join(f"{sum(counts[fate])} {fate}" for fate in kept)
    name = cohort.named(slug(f"revival {label}"))
    blocks: list[Block] = [
        bars(
            f"{name}-fates",
            f"Revivals over training by what became of them: {label}{seed}.",
            f"Stacked bars of revivals over training steps: {totals}.",
            [f"{middle:,.0f}" for middle in middles],
            {str(fate): [float(n) for n in counts[fate]] for fate in kept},
            "training step",
            "revivals",
            stacked=True,
        )
    ]
    distances = [r.distance for r in chosen.found_revivals if r.distance is not None]
    if distances:
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
                [f"{i / 10:.1f}" for i in range(20)],
                {"revivals": heights},
                "distance travelled (1 - cosine), lower end of the bin",
                "revivals",
            )
        )
    return blocks
