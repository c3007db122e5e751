"""Results of a comparison: protocol, headline table, fronts, paired differences, definitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import methodcaller
from typing import Any

import pandas as pd

from msae_plugin.common.table import CellValue, Column, Table, digits_for_difference, signed, spread
from msae_plugin.evaluation.outcomes import MetricDefinition
from msae_plugin.reporting.answer import interval
from msae_plugin.reporting.document import (
    Block,
    Cells,
    Facts,
    Figure,
    Section,
    Subheading,
    Text,
    cell,
    table_of,
)
from msae_plugin.reporting.figures import (
    Style,
    difference_plot,
    panel_of,
    panels,
    pareto,
    seeds_shown,
)
from msae_plugin.reporting.results import (
    CONFIDENCE,
    HEADLINES,
    Difference,
    Group,
    Lead,
    Missing,
    PairedDifference,
    Results,
    column_of,
    differences,
    leads,
    wording,
)

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
        blocks += [Subheading(results.title), Text(_extent(results)), *_facts(results)]
        blocks += [_methods_table(results)] if len(results.frame) else []
    return Section("compared", "What was compared", blocks)


def _facts(results: Results) -> list[Facts]:
    """The most important facts, and the others folded."""
    first = [
        fact for fact in results.facts if fact[0] in _FIRST or fact[0].startswith(_FIRST_PARTS)
    ]
    rest = [fact for fact in results.facts if fact not in first]
    heading = f"{results.title}: configuration and versions ({len(rest)} entries)"
    return [*([Facts(first)] if first else []), *([Facts(rest, heading)] if rest else [])]


def _extent(results: Results) -> str:
    saes = results.saes
    seeds = sorted(saes["seed"].dropna().unique())
    targets = sorted(saes["l0_target"].dropna().unique())
    methods = saes["method"].nunique()
    parts = [
        f"{len(saes)} {'SAEs' if results.over_training_seeds else 'rows'}",
        f"{methods} method{'s' * (methods != 1)}",
        f"{results.seeds_are} {', '.join(map(str, seeds))}" if seeds else "no seed recorded",
        f"target L0 {', '.join(f'{l0:g}' for l0 in targets)}" if targets else "no target L0",
    ]
    return "; ".join(parts) + "."


def _methods_table(results: Results) -> Table:
    searched = any(results.saes["search_tokens"])
    by_method: dict[str, list[pd.DataFrame]] = {}
    for group in results.groups:
        by_method.setdefault(group.method, []).append(group.saes)
    saes = {method: pd.concat(parts) for method, parts in by_method.items()}

    def told(fact: str, heading: str, key: str = "") -> Any:
        return cell(key or fact, heading, lambda method: _distinct(saes[method][fact]))

    def counted(key: str, heading: str) -> Any:
        def value(method: str) -> CellValue:
            column = saes[method][key]
            if key == "search_tokens":
                return _recorded([n or 0 for n in column]) if searched else None
            return _recorded(column)

        return cell(key, heading, value)

    table = table_of(
        f"{results.name}-methods",
        f"{results.title}: methods and their budgets. Per SAE; where SAEs differ, mean ± one "
        "standard deviation.",
        list(saes),
        [
            cell("method", "method", str),
            told("architecture", "architecture"),
            told("preset", "preset"),
            told("control", "control for"),
            told("l0_target", "target L0"),
            told("seed", "seeds", "seeds"),
            told("lr", "learning rate"),
            counted("training_steps", "steps"),
            counted("training_tokens", "tokens"),
            counted("search_tokens", "tokens of the search"),
            counted("seconds", "seconds"),
        ],
        folded=len(saes) > MOST_METHODS_OPEN,
    )
    # Columns about which the data says nothing are left out.
    kept = [
        place
        for place in range(len(table.columns))
        if any(row[place] not in (None, "–") for row in table.rows)
    ]
    seconds = " Seconds are those of the machine at hand."
    return replace(
        table,
        caption=table.caption + (seconds if len(table.columns) - 1 in kept else ""),
        columns=[table.columns[place] for place in kept],
        rows=[[row[place] for place in kept] for row in table.rows],
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
    blocks: list[Block] = []
    if results.over_training_seeds:
        found = leads(results, "drawn")
        blocks += [_leads_table(results, found)] if found else []
    else:
        blocks.append(Text(EVALUATION_SEEDS_ONLY))
    blocks.append(headline_table(results))
    if unfilled := results.unfilled():
        blocks.append(Text(f"Not measured in this data: {', '.join(unfilled)}."))
    blocks += measured_figures(results, results.headlines("front"), styles)
    blocks.append(_single_saes(results))
    return Section(f"{results.name}-results", f"{results.title}: results", blocks)


def measured_figures(
    results: Results, fronts: Mapping[str, str], styles: Mapping[str, Style]
) -> list[Figure]:
    """Headline metrics against L0, or method by method where none has a second L0."""
    groups = [group for group in results.groups if not group.is_variant]
    if len(groups) < 2:
        return []
    l0 = results.headlines().get("l0")
    drawn = [pareto(results, key, metric, l0, styles) for key, metric in fronts.items()]
    return list(chain(*drawn)) or panels(
        f"{results.name}-metrics",
        f"{results.title}: metrics by method, at a single L0 each.{seeds_shown(results)}",
        [group.label for group in groups],
        [panel_of(results, key, metric, groups) for key, metric in fronts.items()],
        "",
        colours=[styles[group.method].colour for group in groups],
    )


def headline_cells(results: Results, headlines: Mapping[str, str]) -> list[Cells]:
    """Columns of means over seeds, of groups."""
    return [
        (column_of(key, metric, results.definitions), methodcaller("spread", metric))
        for key, metric in headlines.items()
    ]


def headline_table(results: Results) -> Table:
    """Means over seeds by method and L0; the best of a column where that is shown."""
    groups = [group for group in results.groups if not group.is_variant]
    headlines = results.headlines()
    best = best_shown(results, groups)
    marked = {(y, 3 + x) for y, key in best for x, name in enumerate(headlines) if name == key}
    again = _measured_twice(results, headlines.values())
    caption = f"{results.title}: mean ± one standard deviation over {results.seeds_are}."
    if best:
        caption += " Bold: the best at its L0, by a paired difference to the next that is shown."
    if again:
        caption += (
            f" Some columns were measured in two ways: shown is {again}; the other value is in the "
            "list of every metric."
        )
    table = table_of(
        f"{results.name}-headline",
        caption,
        groups,
        [
            cell("method", "method", "label"),
            cell("l0_target", "target L0"),
            cell("seeds", "seeds", lambda group: len(group.saes)),
            *headline_cells(results, headlines),
        ],
    )
    return replace(table, best=frozenset(marked))


def best_shown(results: Results, groups: Sequence[Group]) -> set[tuple[int, str]]:
    """Place among the groups and headline, of every best whose lead over the next is shown."""
    found = leads(results, "judged") if results.over_training_seeds else []
    return {(groups.index(lead.best), lead.key) for lead in found if lead.shown}


def _measured_twice(results: Results, shown: Iterable[str]) -> str:
    """What another evaluation here measured too, with the evaluation whose number is shown."""
    others = {
        metric.rpartition("/")[2]
        for metric in set(results.metrics) - set(shown)
        if not metric.startswith("training/")
    }
    again: dict[str, list[str]] = {}
    for key, metric in results.headlines().items():
        if others.intersection(HEADLINES[key].names):
            again.setdefault(metric.partition("/")[0], []).append(HEADLINES[key].heading)
    return " and ".join(f"{name}'s {', '.join(headings)}" for name, headings in again.items())


def _single_saes(results: Results) -> Table:
    headlines = results.headlines()
    measured = [column_of(key, metric, results.definitions) for key, metric in headlines.items()]
    rows = [
        (frame[["name", "method", "l0_target", "seed"]].iloc[0], frame.set_index("metric")["value"])
        for _, frame in results.frame.groupby("row")
    ]
    return Table(
        f"{results.name}-saes",
        f"{results.title}: every row. All its metrics are in "
        f"tables/{results.name}-all-metrics.csv.",
        [
            Column("name", "SAE"),
            Column("method", "method"),
            Column("l0_target", "target L0", absent="none"),
            Column("seed", "seed", absent="none"),
            *measured,
        ],
        [
            [*facts, *(values.get(metric) for metric in headlines.values())]
            for facts, values in rows
        ],
        folded=True,
    )


def all_metrics_table(results: Results) -> Table:
    """Every number of every SAE, one per line."""
    keys = ["name", "method", "l0_target", "seed", "metric", "value", "unit"]
    return Table(
        f"{results.name}-all-metrics",
        f"{results.title}: all metrics.",
        [Column(key, key) for key in keys],
        results.frame[keys].to_numpy().tolist(),
    )


def _leads_table(results: Results, found: Sequence[Lead]) -> Table:
    """For each target L0 and metric who has the best mean, and whether it differs from the next."""

    def shown(lead: Lead) -> str:
        if lead.found is None:
            return "no seed in common"
        text = described_difference(lead.found.found, results.higher_is_better(lead.metric))
        return f"{text}; {lead.found.l0_note}" if lead.found.l0_note else text

    return table_of(
        f"{results.name}-leaders",
        f"{results.title}: who is ahead, and whether it is shown. Difference of best and next "
        "within seeds, with its 95 % interval. Methods that missed the target L0 are left out.",
        found,
        [
            cell("metric", "metric", lambda lead: HEADLINES[lead.key].heading),
            cell(
                "l0_target",
                "target L0",
                lambda lead: None if lead.l0_target is None else f"{lead.l0_target:g}",
            ),
            cell("best", "best mean", "best.method"),
            cell("mean", "value", lambda lead: lead.best.mean(lead.metric)),
            cell("next", "next", "second.method"),
            cell("next_mean", "value", lambda lead: lead.second.mean(lead.metric)),
            cell("lead", "is the lead shown?", shown),
        ],
    )


def described_difference(found: PairedDifference, higher_is_better: bool | None) -> str:
    """A word, the mean difference and its interval."""
    if found.low is None:
        return f"one pair, hence no interval ({interval(found)})"
    return f"{wording(found, higher_is_better)}, {interval(found)}"


def differences_section(results: Results, styles: Mapping[str, Style]) -> Section | None:
    """Paired differences to the reference; None where seeds do not pair methods."""
    headlines = results.headlines("judged")
    if not results.over_training_seeds or not headlines:
        return None
    found = differences(results, list(headlines.values()))
    if not any(item.found.low is not None for item in found):
        return None
    main = [item for item in found if item.ours not in results.variants]
    others = list(dict.fromkeys(item.theirs for item in main)) or ["what it is compared with"]
    over_sets = any(item.over == "data sets" for item in found)
    blocks: list[Block] = [
        Text(
            f"Each method minus {' or '.join(others)}, within pairs of the same seed and target "
            f"L0, with Student's intervals at 95 %. A difference whose interval holds "
            f"zero is no win and no loss. {by_chance(found)}"
            + (" With one seed, the pairs are the data sets of an evaluation: that says which of "
               "these SAEs is better, not which method." if over_sets else "")
        ),
    ]  # fmt: skip
    blocks += [_scorecard(results, main, headlines)] if main else []
    for key, metric in results.headlines("drawn").items():
        drawn = [item for item in main if item.metric == metric]
        blocks += difference_plot(results, drawn, key, styles)
    blocks.append(_difference_table(results, found, headlines))
    return Section(f"{results.name}-differences", f"{results.title}: paired differences", blocks)


def by_chance(found: Sequence[Difference]) -> str:
    """How many differences an interval of this confidence shows where there is none."""
    tried = sum(item.found.low is not None for item in found)
    return (
        f"Intervals are not corrected for the number of comparisons: of {tried} here about "
        f"{(1 - CONFIDENCE) * tried:.0f} would be shown by chance if no method differed from any."
    )


def _scorecard(
    results: Results, found: Sequence[Difference], headlines: Mapping[str, str]
) -> Table:
    """A word per method and metric, over all L0s where there are several."""
    # The one over all L0s comes last, and is what is kept.
    chosen = {(item.ours, item.theirs, item.metric): item for item in found}

    def word(pair: tuple[str, str], metric: str) -> str | None:
        item = chosen.get((*pair, metric))
        if item is None or item.l0_note:
            return None if item is None else "L0 not matched"
        return wording(item.found, results.higher_is_better(metric))

    return table_of(
        f"{results.name}-scorecard",
        f"{results.title}: what the differences show. Over all target L0s that two methods share. "
        "L0 not matched: measured more than 10 % apart. One pair: no interval, nothing is shown.",
        list(dict.fromkeys((item.ours, item.theirs) for item in found)),
        [
            cell("method", "method", lambda pair: pair[0]),
            cell("against", "against", lambda pair: pair[1]),
            *(
                (column_of(key, metric, results.definitions),
                 lambda pair, metric=metric: word(pair, metric))
                for key, metric in headlines.items()
                if any(item.metric == metric for item in found)
            ),
        ],
    )  # fmt: skip


def _difference_table(
    results: Results, found: Sequence[Difference], headlines: Mapping[str, str]
) -> Table:
    headings = {metric: HEADLINES[key].heading for key, metric in headlines.items()}

    def ends(item: Difference) -> str:
        low, high, mean = item.found.low, item.found.high, item.found.mean
        if low is None or high is None:
            return "no interval: one pair"
        digits = digits_for_difference([mean, low, high])
        return f"[{signed(low, digits)}, {signed(high, digits)}]"

    noted = any(item.l0_note for item in found)
    return table_of(
        f"{results.name}-difference-table",
        f"{results.title}: every paired difference.",
        found,
        [
            cell("method", "method", "ours"),
            cell("against", "against", "theirs"),
            cell(
                "l0_target",
                "target L0",
                lambda item: "all" if item.l0_target is None else f"{item.l0_target:g}",
            ),
            cell("metric", "metric", lambda item: headings[item.metric]),
            cell("difference", "difference", "found.mean", signed=True),
            cell("interval", "95 % interval", ends),
            cell("pairs", "pairs", "found.n_pairs"),
            cell(
                "shown",
                "what is shown",
                lambda item: wording(item.found, results.higher_is_better(item.metric)),
            ),
            *([cell("note", "note", lambda item: item.l0_note or "–")] if noted else []),
        ],
        folded=True,
    )


def missing_section(missing: Sequence[Missing], gaps: Sequence[str]) -> Section:
    """What was asked for and is not there, with reasons; `gaps` were not given at all."""
    blocks: list[Block] = []
    if missing:
        columns = [cell(key, key) for key in ("where", "what", "status", "reason")]
        caption = "What was to be measured and was not."
        blocks.append(table_of("not-measured", caption, missing, columns))
    else:
        blocks.append(Text("Nothing that was asked for failed or was skipped."))
    if gaps:
        blocks.append(Text(f"No data was given for: {', '.join(gaps)}."))
    return Section("missing", "What was not measured", blocks)


def definitions_section(measured: Sequence[Results]) -> Section | None:
    """Every metric that appears, defined once; None without metrics."""
    found: dict[tuple[str, MetricDefinition], list[str]] = {}
    undefined: dict[tuple[str, MetricDefinition], None] = {}
    for results in measured:
        for metric in results.metrics:
            definition = results.definitions.get(metric)
            if definition is None:
                undefined[metric, MetricDefinition()] = None
            else:
                found.setdefault((metric, definition), []).append(results.title)
    if not found and not undefined:
        return None
    unknown = "not recorded"

    def part(key: str, heading: str) -> Cells:
        return cell(key, heading, lambda row: getattr(row[1], key) or unknown)

    table = table_of(
        "definitions",
        "Every metric of this report. `saebench` numbers are SAEBench's own under its names; "
        "`msae` numbers are computed by msae_plugin.",
        [*found, *undefined],
        [
            cell("metric", "metric", lambda row: row[0]),
            part("definition", "definition"),
            part("unit", "unit"),
            cell("better", "better is", lambda r: unknown if r in undefined else r[1].direction),
            part("tokens", "measured on"),
            part("source", "whose number"),
            cell("where", "in", lambda row: "; ".join(found.get(row, [])) or unknown),
        ],
    )
    return Section("definitions-section", "Definitions", [table])
