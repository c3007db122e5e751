"""What a bench says: its protocol, its headline table, fronts, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msae_plugin.comparison.statistics import spread
from msae_plugin.reporting.document import (
    Block,
    CellValue,
    Column,
    Facts,
    Section,
    Subheading,
    Table,
    Text,
    columns,
)
from msae_plugin.reporting.figure_style import Look
from msae_plugin.reporting.figures import Panel, axis_label, panels, pareto, seeds_shown
from msae_plugin.reporting.metrics import BY_KEY, PARETO, ROLES
from msae_plugin.reporting.rows import Bench, Group, Row, difference
from msae_plugin.reporting.sections.difference_sections import DRAWN, column_of, described

HEADLINE = tuple(role.key for role in ROLES)
_FIRST = ("model.name", "seeds", "device")
_FIRST_PARTS = ("data.", "protocol.")
MOST_METHODS_OPEN = 14
"""A longer table of methods is folded."""
EVALUATION_SEEDS_ONLY = (
    "Each SAE was trained once: the spread is over evaluation seeds and says nothing of what "
    "another training seed would give. No differences between methods are claimed from it."
)


def protocol_section(benches: Sequence[Bench]) -> Section:
    """Who was compared, on what, with how much."""
    blocks: list[Block] = []
    for bench in benches:
        blocks += [Subheading(bench.title), Text(_extent(bench))]
        blocks += _facts(bench)
        blocks += [_methods_table(bench)] if bench.rows else []
    return Section("compared", "What was compared", blocks)


def _facts(bench: Bench) -> list[Facts]:
    """What a reader needs first, and everything else closed."""
    first = [fact for fact in bench.facts if fact[0] in _FIRST or fact[0].startswith(_FIRST_PARTS)]
    rest = [fact for fact in bench.facts if fact not in first]
    found = [Facts(first)] if first else []
    heading = f"{bench.title}: configuration and versions ({len(rest)} entries)"
    return found + ([Facts(rest, heading)] if rest else [])


def _extent(bench: Bench) -> str:
    seeds = sorted({row.seed for row in bench.rows if row.seed is not None})
    targets = sorted({row.l0_target for row in bench.rows if row.l0_target is not None})
    parts = [
        f"{len(bench.rows)} {'rows' if bench.seeds_are == 'evaluation seeds' else 'SAEs'}",
        f"{len({row.method for row in bench.rows})} methods",
        f"{bench.seeds_are} {', '.join(map(str, seeds))}" if seeds else "no seed recorded",
        f"target L0 {', '.join(f'{l0:g}' for l0 in targets)}" if targets else "no target L0",
    ]
    return "; ".join(parts) + "."


def _methods_table(bench: Bench) -> Table:
    by_method: dict[str, list[Row]] = {}
    for group in bench.groups():
        by_method.setdefault(group.method, []).extend(group.rows)
    headings = (
        ("method", "method"), ("architecture", "architecture"), ("preset", "preset"),
        ("control", "control for"), ("l0_target", "target L0"), ("seeds", "seeds"),
        ("lr", "learning rate"), ("training_steps", "steps"), ("training_tokens", "tokens"),
        ("search_tokens", "tokens of the search"), ("seconds", "seconds"),
    )  # fmt: skip
    searched = any(row.search_tokens for row in bench.rows)
    rows: list[list[CellValue]] = [
        [
            method,
            _distinct([row.architecture or None for row in rows]),
            _distinct([row.preset for row in rows]),
            _distinct([row.control for row in rows]),
            _distinct([_short(row.l0_target) for row in rows]),
            _distinct([_short(row.seed) for row in rows]),
            _distinct([_short(row.lr) for row in rows]),
            _recorded([row.training_steps for row in rows]),
            _recorded([row.training_tokens for row in rows]),
            _recorded([(row.search_tokens or 0) if searched else None for row in rows]),
            _recorded([row.seconds for row in rows]),
        ]
        for method, rows in by_method.items()
    ]
    # Columns about which the data says nothing are left out.
    kept = [i for i in range(len(headings)) if any(row[i] not in (None, "–") for row in rows)]
    return Table(
        f"{bench.name}-methods",
        f"{bench.title}: methods and their budgets. Per SAE; where SAEs differ, mean ± one "
        "standard deviation."
        + (" Seconds are those of the machine at hand." if len(headings) - 1 in kept else ""),
        columns(*(headings[place] for place in kept)),
        [[row[place] for place in kept] for row in rows],
        folded=len(rows) > MOST_METHODS_OPEN,
    )


def _distinct(values: Sequence[str | None]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value is not None)) or "–"


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _recorded(values: Sequence[float | None]) -> CellValue:
    """One number where all are equal, else their mean and spread."""
    known = [value for value in values if value is not None]
    return spread(known) if len(set(known)) > 1 else known[0] if known else None


def results_section(bench: Bench, looks: Mapping[str, Look]) -> Section:
    """The headline table, the fronts, and the table of single SAEs."""
    roles = bench.roles(HEADLINE)
    blocks: list[Block] = []
    if bench.seeds_are == "evaluation seeds":
        blocks.append(Text(EVALUATION_SEEDS_ONLY))
    else:
        leaders = _leaders(bench)
        blocks += [] if leaders is None else [leaders]
    measured = [column_of(role, metric, bench.definitions) for role, metric in roles.items()]
    groups = [group for group in bench.groups() if not group.is_variant]
    rows: list[list[CellValue]] = [
        [_label(group), group.l0_target, len(group.rows)]
        + [group.spread(metric) for metric in roles.values()]
        for group in groups
    ]
    blocks.append(
        Table(
            f"{bench.name}-headline",
            f"{bench.title}: mean ± one standard deviation over {bench.seeds_are}.",
            [
                *columns(("method", "method"), ("l0_target", "target L0"), ("seeds", "seeds")),
                *measured,
            ],
            rows,
        )
    )
    unfilled = [BY_KEY[key].heading for key in _expected(bench) if key not in roles]
    if unfilled:
        blocks.append(Text(f"Not measured in this data: {', '.join(unfilled)}."))
    l0 = roles.get("l0")
    drawn: list[Block] = []
    for role in PARETO:
        if role in roles and len(groups) > 1:
            figure = pareto(bench, role, roles[role], l0, looks)
            drawn += [] if figure is None else [figure]
    if not drawn and len(groups) > 1:
        drawn = _at_one_l0(bench, groups, roles)
    blocks += drawn
    blocks.append(_single_saes(bench, list(roles.values()), measured))
    return Section(f"{bench.name}-results", f"{bench.title}: results", blocks)


def _at_one_l0(bench: Bench, groups: Sequence[Group], roles: Mapping[str, str]) -> list[Block]:
    """Without a second L0 there is no front: the metrics method by method."""
    figure = panels(
        f"{bench.name}-metrics",
        f"{bench.title}: metrics by method, at a single L0 each.{seeds_shown(bench)}",
        [_label(group) for group in groups],
        [
            Panel(
                axis_label(BY_KEY[role].heading, bench.definitions.get(roles[role])),
                BY_KEY[role].heading,
                [list(group.values(roles[role]).values()) for group in groups],
            )
            for role in PARETO
            if role in roles
        ],
        "",
        connected=False,
    )
    return [] if figure is None else [figure]


def _label(group: Group) -> str:
    return group.method if group.first.control is None else f"{group.method} (control)"


def _expected(bench: Bench) -> tuple[str, ...]:
    if bench.kind == "ground_truth":
        return ("l0", "explained_variance", "f1", "mcc", "uniqueness")
    return ("l0", "explained_variance", "loss_recovered", "probing_1")


def _single_saes(bench: Bench, metrics: Sequence[str], measured: Sequence[Column]) -> Table:
    return Table(
        f"{bench.name}-saes",
        f"{bench.title}: every row. All its metrics are in tables/{bench.name}-all-metrics.csv.",
        [
            *columns(("name", "SAE"), ("method", "method"), ("l0_target", "target L0")),
            Column("seed", "seed", absent="none"),
            *measured,
        ],
        [
            [row.name, row.method, row.l0_target, row.seed]
            + [row.metrics.get(metric) for metric in metrics]
            for row in bench.rows
        ],
        folded=True,
    )


def all_metrics_table(bench: Bench) -> Table:
    """Every number of every row, one per line."""
    rows: list[list[CellValue]] = []
    for row in bench.rows:
        for metric in bench.metrics():
            if metric in row.metrics:
                definition = bench.definitions.get(metric)
                unit = "" if definition is None else definition.unit
                rows.append(
                    [row.name, row.method, row.l0_target, row.seed, metric, row.metrics[metric],
                     unit]
                )  # fmt: skip
    keys = ("name", "method", "l0_target", "seed", "metric", "value", "unit")
    return Table(
        f"{bench.name}-all-metrics",
        f"{bench.title}: all metrics.",
        [Column(key, key) for key in keys],
        rows,
    )


def _leaders(bench: Bench) -> Table | None:
    """For each target L0 and metric who has the best mean, and whether it differs from the next.

    Controls and the ladder's variants are left out: among fifty, one is always ahead by chance. So
    is what missed its L0: whoever fires ten times as often reconstructs better.
    """
    groups = [
        group
        for group in bench.groups()
        if group.first.control is None
        and not group.is_variant
        and all(row.l0_missed is None for row in group.rows)
    ]
    rows: list[list[CellValue]] = []
    for l0 in dict.fromkeys(group.l0_target for group in groups):
        for role, metric in bench.roles(DRAWN).items():
            definition = bench.definitions.get(metric)
            higher = None if definition is None else definition.higher_is_better
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
            compared = difference(bench, best, second, metric)
            shown = "no seed in common" if compared is None else described(compared, definition)
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
        f"{bench.name}-leaders",
        f"{bench.title}: who is ahead, and whether it is shown. Difference of best and next within "
        "seeds, with its 95 % interval. Methods that missed the target L0 are left out.",
        columns(*headings),
        rows,
    )
