"""Paired differences: in words, as a scorecard, drawn, and one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from msae_plugin.comparison.statistics import CONFIDENCE, PairedDifference
from msae_plugin.reporting.document import Block, CellValue, Column, Section, Table, Text, columns
from msae_plugin.reporting.figure_style import Look
from msae_plugin.reporting.figures import difference_plot
from msae_plugin.reporting.metrics import BY_KEY, Definition, digits_for_difference, signed
from msae_plugin.reporting.rows import Bench, Difference, differences
from msae_plugin.reporting.statistics import wording

JUDGED = (
    "explained_variance", "loss_recovered", "kl", "f1", "mcc", "uniqueness", "alive", "dead",
    "decoder_cosine", "probing_1", "probing_5", "sae_probes_1", "unlearning",
)  # fmt: skip
"""Roles that are compared pairwise."""
DRAWN = ("explained_variance", "loss_recovered", "f1", "mcc", "probing_1")
"""Roles whose differences are drawn too."""


def column_of(role: str, metric: str, definitions: Mapping[str, Definition]) -> Column:
    """The column of a metric: heading by its role, unit and direction under it."""
    definition = definitions.get(metric)
    if definition is None:
        return Column(metric, BY_KEY[role].heading)
    detail = f"{definition.unit} {definition.arrow}".strip()
    return Column(metric, BY_KEY[role].heading, "" if detail == "none" else detail)


def described(item: Difference, definition: Definition | None) -> str:
    """A difference in words, with its interval and what must be known of it."""
    higher = None if definition is None else definition.higher_is_better
    text = described_difference(item.found, higher)
    return f"{text}; {item.l0_note}" if item.l0_note else text


def described_difference(found: PairedDifference, higher_is_better: bool | None) -> str:
    """A word, the mean difference and its interval."""
    if found.low is None or found.high is None:
        digits = digits_for_difference([found.mean])
        return f"one pair, hence no interval ({signed(found.mean, digits)})"
    digits = digits_for_difference([found.mean, found.low, found.high])
    return (
        f"{wording(found, higher_is_better)}, {signed(found.mean, digits)} "
        f"[{signed(found.low, digits)}, {signed(found.high, digits)}]"
    )


def differences_section(bench: Bench, looks: Mapping[str, Look]) -> Section | None:
    """Paired differences to the reference; None where seeds do not pair methods."""
    roles = bench.roles(JUDGED)
    if bench.seeds_are == "evaluation seeds" or not roles:
        return None
    found = differences(bench, list(roles.values()))
    if not any(item.found.low is not None for item in found):
        return None
    variants = bench.variants()
    main = [item for item in found if item.ours not in variants]
    by_metric = {metric: role for role, metric in roles.items()}
    others = list(dict.fromkeys(item.theirs for item in main)) or ["what it is compared with"]
    blocks: list[Block] = [
        Text(
            f"Each method minus {' or '.join(others)}, within pairs of the same seed and target "
            f"L0, with Student's intervals at 95 %. A difference whose interval holds "
            f"zero is no win and no loss. {by_chance(found)}"
        ),
    ]
    blocks += [_scorecard(bench, main, by_metric)] if main else []
    for role in DRAWN:
        if role in roles:
            drawn = [item for item in main if item.metric == roles[role]]
            figure = difference_plot(bench, drawn, role, looks)
            blocks += [] if figure is None else [figure]
    blocks.append(_difference_table(bench, found, by_metric))
    return Section(f"{bench.name}-differences", f"{bench.title}: paired differences", blocks)


def by_chance(found: Sequence[Difference]) -> str:
    """How many differences an interval of this confidence shows where there is none."""
    tried = sum(item.found.low is not None for item in found)
    return (
        f"Intervals are not corrected for the number of comparisons: of {tried} here about "
        f"{(1 - CONFIDENCE) * tried:.0f} would be shown by chance if no method differed from any."
    )


def _scorecard(bench: Bench, found: Sequence[Difference], roles: Mapping[str, str]) -> Table:
    """A word per method and metric, over all L0s where there are several."""
    metrics = list(dict.fromkeys(item.metric for item in found))
    # The one over all L0s comes last, and is what is kept.
    chosen = {(item.ours, item.theirs, item.metric): item for item in found}
    rows: list[list[CellValue]] = []
    for ours, theirs in dict.fromkeys((item.ours, item.theirs) for item in found):
        cells: list[CellValue] = [ours, theirs]
        for metric in metrics:
            item = chosen.get((ours, theirs, metric))
            definition = bench.definitions.get(metric)
            higher = None if definition is None else definition.higher_is_better
            if item is None:
                cells.append(None)
            else:
                cells.append("L0 not matched" if item.l0_note else wording(item.found, higher))
        rows.append(cells)
    return Table(
        f"{bench.name}-scorecard",
        f"{bench.title}: what the differences show. Over all target L0s that two methods share. "
        "L0 not matched: measured more than 10 % apart. One pair: no interval, nothing is shown.",
        [
            *columns(("method", "method"), ("against", "against")),
            *(column_of(roles[metric], metric, bench.definitions) for metric in metrics),
        ],
        rows,
    )


def _difference_table(bench: Bench, found: Sequence[Difference], roles: Mapping[str, str]) -> Table:
    rows: list[list[CellValue]] = []
    for item in found:
        definition = bench.definitions.get(item.metric)
        higher = None if definition is None else definition.higher_is_better
        low, high, mean = item.found.low, item.found.high, item.found.mean
        values = [mean] if low is None or high is None else [mean, low, high]
        digits = digits_for_difference(values)
        interval = (
            "no interval: one pair"
            if low is None or high is None
            else f"[{signed(low, digits)}, {signed(high, digits)}]"
        )
        rows.append(
            [
                item.ours,
                item.theirs,
                "all" if item.l0_target is None else f"{item.l0_target:g}",
                BY_KEY[roles[item.metric]].heading,
                mean,
                interval,
                item.found.n_pairs,
                wording(item.found, higher),
                item.l0_note or "–",
            ]
        )
    headings = (
        ("method", "method"), ("against", "against"), ("l0_target", "target L0"),
        ("metric", "metric"), ("difference", "difference"), ("interval", "95 % interval"),
        ("pairs", "pairs"), ("shown", "what is shown"), ("note", "note"),
    )  # fmt: skip
    if all(row[-1] == "–" for row in rows):
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    return Table(
        f"{bench.name}-difference-table",
        f"{bench.title}: every paired difference.",
        [replace(column, signed=column.key == "difference") for column in columns(*headings)],
        rows,
        folded=True,
    )
