"""Results of a comparison: protocol, headline table, fronts, paired differences, definitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from msae_plugin.common.table import (
    CellValue,
    Column,
    Table,
    columns,
    digits_for_difference,
    signed,
    spread,
)
from msae_plugin.comparison.statistics import CONFIDENCE, PairedDifference
from msae_plugin.reporting.document import Block, Facts, Section, Subheading, Text
from msae_plugin.reporting.figures import (
    Panel,
    Style,
    axis_label,
    difference_plot,
    panels,
    pareto,
    seeds_shown,
)
from msae_plugin.reporting.measurements import (
    BY_KEY,
    PARETO,
    ROLES,
    Definition,
    Difference,
    Group,
    Missing,
    Results,
    difference,
    differences,
    wording,
)

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


def described(item: Difference, higher_is_better: bool | None) -> str:
    """A difference in words, with its interval and what must be known of it."""
    text = described_difference(item.found, higher_is_better)
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


def differences_section(results: Results, styles: Mapping[str, Style]) -> Section | None:
    """Paired differences to the reference; None where seeds do not pair methods."""
    roles = results.roles(JUDGED)
    if results.seeds_are == "evaluation seeds" or not roles:
        return None
    found = differences(results, list(roles.values()))
    if not any(item.found.low is not None for item in found):
        return None
    variants = results.variants()
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
    blocks += [_scorecard(results, main, by_metric)] if main else []
    for role in DRAWN:
        if role in roles:
            drawn = [item for item in main if item.metric == roles[role]]
            blocks += difference_plot(results, drawn, role, styles)
    blocks.append(_difference_table(results, found, by_metric))
    return Section(f"{results.name}-differences", f"{results.title}: paired differences", blocks)


def by_chance(found: Sequence[Difference]) -> str:
    """How many differences an interval of this confidence shows where there is none."""
    tried = sum(item.found.low is not None for item in found)
    return (
        f"Intervals are not corrected for the number of comparisons: of {tried} here about "
        f"{(1 - CONFIDENCE) * tried:.0f} would be shown by chance if no method differed from any."
    )


def _scorecard(results: Results, found: Sequence[Difference], roles: Mapping[str, str]) -> Table:
    """A word per method and metric, over all L0s where there are several."""
    metrics = list(dict.fromkeys(item.metric for item in found))
    # The one over all L0s comes last, and is what is kept.
    chosen = {(item.ours, item.theirs, item.metric): item for item in found}
    rows: list[list[CellValue]] = []
    for ours, theirs in dict.fromkeys((item.ours, item.theirs) for item in found):
        cells: list[CellValue] = [ours, theirs]
        for metric in metrics:
            item = chosen.get((ours, theirs, metric))
            if item is None:
                cells.append(None)
            elif item.l0_note:
                cells.append("L0 not matched")
            else:
                cells.append(wording(item.found, results.higher_is_better(metric)))
        rows.append(cells)
    return Table(
        f"{results.name}-scorecard",
        f"{results.title}: what the differences show. Over all target L0s that two methods share. "
        "L0 not matched: measured more than 10 % apart. One pair: no interval, nothing is shown.",
        [
            *columns(("method", "method"), ("against", "against")),
            *(column_of(roles[metric], metric, results.definitions) for metric in metrics),
        ],
        rows,
    )


def _difference_table(
    results: Results, found: Sequence[Difference], roles: Mapping[str, str]
) -> Table:
    rows: list[list[CellValue]] = []
    for item in found:
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
                wording(item.found, results.higher_is_better(item.metric)),
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
        f"{results.name}-difference-table",
        f"{results.title}: every paired difference.",
        [replace(column, signed=column.key == "difference") for column in columns(*headings)],
        rows,
        folded=True,
    )


HEADLINE = tuple(role.key for role in ROLES)
_FIRST = ("model.name", "seeds", "device")
_FIRST_PARTS = ("data.", "protocol.")
MOST_METHODS_OPEN = 14
"""A longer table of methods is folded."""
EVALUATION_SEEDS_ONLY = (
    "Each SAE was trained once: the spread is over evaluation seeds and says nothing of what "
    "another training seed would give. No differences between methods are claimed from it."
)


def protocol_section(measured: Sequence[Results]) -> Section:
    """Who was compared, on what, with how much."""
    blocks: list[Block] = []
    for results in measured:
        blocks += [Subheading(results.title), Text(_extent(results))]
        blocks += _facts(results)
        blocks += [_methods_table(results)] if len(results.frame) else []
    return Section("compared", "What was compared", blocks)


def _facts(results: Results) -> list[Facts]:
    """The most important facts, and the others folded."""
    first = [
        fact for fact in results.facts if fact[0] in _FIRST or fact[0].startswith(_FIRST_PARTS)
    ]
    rest = [fact for fact in results.facts if fact not in first]
    found = [Facts(first)] if first else []
    heading = f"{results.title}: configuration and versions ({len(rest)} entries)"
    return found + ([Facts(rest, heading)] if rest else [])


def _extent(results: Results) -> str:
    saes = results.saes
    seeds, targets = (
        sorted(saes["seed"].dropna().unique()),
        sorted(saes["l0_target"].dropna().unique()),
    )
    parts = [
        f"{len(saes)} {'rows' if results.seeds_are == 'evaluation seeds' else 'SAEs'}",
        f"{saes['method'].nunique()} methods",
        f"{results.seeds_are} {', '.join(map(str, seeds))}" if seeds else "no seed recorded",
        f"target L0 {', '.join(f'{l0:g}' for l0 in targets)}" if targets else "no target L0",
    ]
    return "; ".join(parts) + "."


def _methods_table(results: Results) -> Table:
    by_method: dict[str, list[pd.DataFrame]] = {}
    for group in results.groups:
        by_method.setdefault(group.method, []).append(group.saes)
    told = ("architecture", "preset", "control", "l0_target", "seed", "lr")
    counted = ("training_steps", "training_tokens", "search_tokens", "seconds")
    rows: list[list[CellValue]] = []
    for method, groups in by_method.items():
        saes = pd.concat(groups)
        if any(results.saes["search_tokens"]):
            saes = saes.assign(search_tokens=[n or 0 for n in saes["search_tokens"]])
        else:
            saes = saes.assign(search_tokens=None)
        texts = [_distinct(saes[fact]) for fact in told]
        rows.append([method, *texts, *(_recorded(saes[fact]) for fact in counted)])
    headings = (
        ("method", "method"), ("architecture", "architecture"), ("preset", "preset"),
        ("control", "control for"), ("l0_target", "target L0"), ("seeds", "seeds"),
        ("lr", "learning rate"), ("training_steps", "steps"), ("training_tokens", "tokens"),
        ("search_tokens", "tokens of the search"), ("seconds", "seconds"),
    )  # fmt: skip
    # Columns about which the data says nothing are left out.
    kept = [i for i in range(len(headings)) if any(row[i] not in (None, "–") for row in rows)]
    return Table(
        f"{results.name}-methods",
        f"{results.title}: methods and their budgets. Per SAE; where SAEs differ, mean ± one "
        "standard deviation."
        + (" Seconds are those of the machine at hand." if len(headings) - 1 in kept else ""),
        columns(*(headings[place] for place in kept)),
        [[row[place] for place in kept] for row in rows],
        folded=len(rows) > MOST_METHODS_OPEN,
    )


def _distinct(values: Iterable[Any]) -> str:
    known = (v if isinstance(v, str) else f"{v:g}" for v in values if v is not None and v != "")
    return ", ".join(dict.fromkeys(known)) or "–"


def _recorded(values: Iterable[float | None]) -> CellValue:
    """One number where all are equal, else their mean and spread."""
    known = [value for value in values if value is not None]
    return spread(known) if len(set(known)) > 1 else known[0] if known else None


def results_section(results: Results, styles: Mapping[str, Style]) -> Section:
    """The headline table, the fronts, and the table of single SAEs."""
    roles = results.roles(HEADLINE)
    blocks: list[Block] = []
    if results.seeds_are == "evaluation seeds":
        blocks.append(Text(EVALUATION_SEEDS_ONLY))
    else:
        leaders = _leaders(results)
        blocks += [] if leaders is None else [leaders]
    measured = [column_of(role, metric, results.definitions) for role, metric in roles.items()]
    groups = [group for group in results.groups if not group.is_variant]
    rows: list[list[CellValue]] = [
        [_label(group), group.l0_target, len(group.saes)]
        + [group.spread(metric) for metric in roles.values()]
        for group in groups
    ]
    blocks.append(
        Table(
            f"{results.name}-headline",
            f"{results.title}: mean ± one standard deviation over {results.seeds_are}.",
            [
                *columns(("method", "method"), ("l0_target", "target L0"), ("seeds", "seeds")),
                *measured,
            ],
            rows,
        )
    )
    unfilled = [BY_KEY[key].heading for key in _expected(results) if key not in roles]
    if unfilled:
        blocks.append(Text(f"Not measured in this data: {', '.join(unfilled)}."))
    l0 = roles.get("l0")
    drawn: list[Block] = []
    for role in PARETO:
        if role in roles and len(groups) > 1:
            drawn += pareto(results, role, roles[role], l0, styles)
    if not drawn and len(groups) > 1:
        drawn = _at_one_l0(results, groups, roles)
    blocks += drawn
    blocks.append(_single_saes(results, list(roles.values()), measured))
    return Section(f"{results.name}-results", f"{results.title}: results", blocks)


def _at_one_l0(results: Results, groups: Sequence[Group], roles: Mapping[str, str]) -> list[Block]:
    """Without a second L0 there is no front: the metrics method by method."""
    return [
        *panels(
            f"{results.name}-metrics",
            f"{results.title}: metrics by method, at a single L0 each.{seeds_shown(results)}",
            [_label(group) for group in groups],
            [
                Panel(
                    axis_label(BY_KEY[role].heading, results.definitions.get(roles[role])),
                    BY_KEY[role].heading,
                    [list(group.values(roles[role]).values()) for group in groups],
                )
                for role in PARETO
                if role in roles
            ],
            "",
            connected=False,
        )
    ]


def _label(group: Group) -> str:
    return group.method if group.fact("control") is None else f"{group.method} (control)"


def _expected(results: Results) -> tuple[str, ...]:
    if results.kind == "ground_truth":
        return ("l0", "explained_variance", "f1", "mcc", "uniqueness")
    return ("l0", "explained_variance", "loss_recovered", "probing_1")


def _single_saes(results: Results, metrics: Sequence[str], measured: Sequence[Column]) -> Table:
    return Table(
        f"{results.name}-saes",
        f"{results.title}: every row. All its metrics are in "
        f"tables/{results.name}-all-metrics.csv.",
        [
            *columns(("name", "SAE"), ("method", "method"), ("l0_target", "target L0")),
            Column("seed", "seed", absent="none"),
            *measured,
        ],
        [
            [*facts, *(values.get(metric) for metric in metrics)]
            for facts, values in _by_sae(results)
        ],
        folded=True,
    )


def _by_sae(results: Results) -> Iterator[tuple[Sequence[CellValue], dict[str, float]]]:
    """Name, method, target L0 and seed of each SAE, and its metrics."""
    for _, frame in results.frame.groupby("row"):
        facts = frame[["name", "method", "l0_target", "seed"]].iloc[0].tolist()
        yield facts, dict(zip(frame["metric"], frame["value"], strict=True))


def all_metrics_table(results: Results) -> Table:
    """Every number of every SAE, one per line."""
    keys = ["name", "method", "l0_target", "seed", "metric", "value", "unit"]
    return Table(
        f"{results.name}-all-metrics",
        f"{results.title}: all metrics.",
        [Column(key, key) for key in keys],
        results.frame[keys].to_numpy().tolist(),
    )


def _leaders(results: Results) -> Table | None:
    """For each target L0 and metric who has the best mean, and whether it differs from the next.

    Controls and the ladder's variants are left out: among fifty, one is always ahead by chance. So
    is what missed its L0: whoever fires ten times as often reconstructs better.
    """
    groups = [
        group
        for group in results.groups
        if group.fact("control") is None
        and not group.is_variant
        and all(missed is None for missed in group.saes["l0_missed"])
    ]
    rows: list[list[CellValue]] = []
    for l0 in dict.fromkeys(group.l0_target for group in groups):
        for role, metric in results.roles(DRAWN).items():
            higher = results.higher_is_better(metric)
            if higher is None:
                continue
            known = [group for group in groups if group.l0_target == l0]
            ranked = sorted(
                ((mean, group) for group in known if (mean := group.mean(metric)) is not None),
                key=lambda pair: pair[0],
                reverse=higher,
            )
            if len(ranked) < 2:
                continue
            (mean, best), (next_mean, second) = ranked[:2]
            compared = difference(results, [(best, second)], metric)
            shown = "no seed in common" if compared is None else described(compared, higher)
            where = None if l0 is None else f"{l0:g}"
            rows.append(
                [BY_KEY[role].heading, where, best.method, mean, second.method, next_mean, shown]
            )
    if not rows:
        return None
    headings = (
        ("metric", "metric"), ("l0_target", "target L0"), ("best", "best mean"), ("mean", "value"),
        ("next", "next"), ("next_mean", "value"), ("lead", "is the lead shown?"),
    )  # fmt: skip
    return Table(
        f"{results.name}-leaders",
        f"{results.title}: who is ahead, and whether it is shown. Difference of best and next "
        "within seeds, with its 95 % interval. Methods that missed the target L0 are left out.",
        columns(*headings),
        rows,
    )


def missing_section(missing: Sequence[Missing], absent: Sequence[str]) -> Section:
    """Failed, skipped, not measurable and not recorded, with reasons."""
    blocks: list[Block] = []
    if missing:
        headings = (
            ("where", "where"), ("what", "what"), ("status", "status"), ("reason", "reason"),
        )  # fmt: skip
        table = Table(
            "not-measured",
            "What was to be measured and was not.",
            columns(*headings),
            [[item.where, item.what, item.status, item.reason] for item in missing],
        )
        blocks.append(table)
    else:
        blocks.append(Text("Everything that was to be measured was measured."))
    if absent:
        blocks.append(Text(f"No data was given for: {', '.join(absent)}."))
    return Section("missing", "What was not measured", blocks)


def definitions_section(measured: Sequence[Results]) -> Section | None:
    """Every metric that appears, defined once; None without metrics."""
    found: dict[Definition, list[str]] = {}
    undefined: dict[str, None] = {}
    for results in measured:
        for metric in results.metrics:
            definition = results.definitions.get(metric)
            if definition is None:
                undefined[metric] = None
            else:
                found.setdefault(definition, []).append(results.title)
    if not found and not undefined:
        return None
    rows: list[Sequence[CellValue]] = [
        [d.name, d.definition, d.unit or "not recorded", d.direction, d.tokens or "not recorded",
         d.source or "not recorded", "; ".join(where)]
        for d, where in found.items()
    ]  # fmt: skip
    rows += [[name, "no definition was given", *["not recorded"] * 5] for name in undefined]
    headings = (
        ("metric", "metric"), ("definition", "definition"), ("unit", "unit"),
        ("better", "better is"), ("tokens", "measured on"), ("source", "whose number"),
        ("where", "in"),
    )  # fmt: skip
    table = Table(
        "definitions",
        "Every metric of this report. `saebench` numbers are SAEBench's own under its names; "
        "`msae` numbers are computed by msae_plugin.",
        columns(*headings),
        rows,
    )
    return Section("definitions-section", "Definitions", [table])
