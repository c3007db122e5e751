"""The source's ladder: what each rung claims, what it measures, and a verdict in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from msae_plugin.common.table import (
    CellValue,
    Table,
    columns,
    digits_for_difference,
    number,
    signed,
)
from msae_plugin.comparison.ladder import BASELINE
from msae_plugin.reporting.document import Block, Section, Text
from msae_plugin.reporting.figures import (
    Panel,
    Style,
    axis_label,
    difference_plot,
    panels,
    seeds_shown,
)
from msae_plugin.reporting.measurements import (
    BY_KEY,
    LADDER,
    LADDER_PLOTS,
    Difference,
    Group,
    Results,
    differences,
    l0_note,
    sentence,
    wording,
)
from msae_plugin.reporting.sections.results import by_chance, column_of

THE_SOURCE = (
    "The source is an experiment log of ten runs on Gemma-2-2B, each one mechanism more than the "
    "one before. Nine report results, and each of these reads training_steps: 0 and final_loss: "
    "None: no SAE in it was ever trained, so a claim below is what a mechanism is for, not a "
    "number. Its \"87 % sparsity\" is an L0 of 87 active latents, and its explained variance is "
    "negative throughout. Everything measured here is measured on trained SAEs."
)  # fmt: skip
_PARTS = {
    "cumulative": "the source's runs, cumulative",
    "alone": "each mechanism alone on BatchTopK",
    "default": "the default preset with one mechanism removed or added",
}
_READING = {
    "default": " It is on the variant: `harmful` of a default without a mechanism speaks for the "
    "mechanism."
}
# Not judged by a verdict: L0 is matched, and losses of different objectives are not comparable.
_NOT_JUDGED = ("l0", "final_loss")
_DRAWN = ("explained_variance", "f1", "loss_recovered", "probing_1")


def ladder_section(results: Results, styles: Mapping[str, Style]) -> Section | None:
    """The ladder of a comparison; None when no rung was measured."""
    groups = results.groups
    if not any(group.is_variant for group in groups):
        return None
    roles = results.roles(LADDER[results.kind])
    found = differences(results, list(roles.values()))
    blocks: list[Block] = [Text(THE_SOURCE), Text(by_chance(found))]
    for part, title in _PARTS.items():
        members = [group for group in groups if _belongs(group, part)]
        if not any(group.is_variant for group in members):
            continue
        name = f"{results.name}-ladder-{part}"
        blocks += [
            _measured(name, f"{results.title}: {title}", results, members, roles),
            _verdicts(part, f"{results.title}: {title}", results, members, roles, found),
        ]
        if part == "cumulative":
            blocks += _evolution(name, results, members, roles)
        else:
            methods = {group.method for group in members if group.is_variant}
            blocks += _drawn_differences(name, methods, results, found, roles, styles)
    return Section(f"{results.name}-ladder", f"{results.title}: the source's ladder", blocks)


def _belongs(group: Group, part: str) -> bool:
    return group.fact("part") == part


def _measured(
    name: str, title: str, results: Results, members: Sequence[Group], roles: Mapping[str, str]
) -> Table:
    rows: list[list[CellValue]] = [
        [
            group.method,
            group.l0_target,
            len(group.saes),
            group.fact("training_steps"),
            *(group.spread(metric) for metric in roles.values()),
        ]
        for group in members
    ]
    return Table(
        name,
        f"{title}. Mean ± one standard deviation over seeds. Final losses of different "
        "objectives are not comparable.",
        [
            *columns(
                ("method", "variant"),
                ("l0_target", "target L0"),
                ("seeds", "seeds"),
                ("training_steps", "steps"),
            ),
            *(column_of(role, metric, results.definitions) for role, metric in roles.items()),
        ],
        rows,
    )


def _verdicts(
    part: str,
    title: str,
    results: Results,
    members: Sequence[Group],
    roles: Mapping[str, str],
    found: Sequence[Difference],
) -> Table:
    groups = {(group.method, group.l0_target): group for group in results.groups}
    rows: list[list[CellValue]] = []
    for group in members:
        against = group.fact("against")
        other = groups.get((str(against), group.l0_target))
        items = [
            item
            for item in found
            if (item.ours, item.theirs, item.l0_target) == (group.method, against, group.l0_target)
        ]
        rows.append(
            [
                group.method,
                group.l0_target,
                group.fact("mechanism") or "not recorded",
                group.fact("claim") or "not in the source",
                against or "–",
                "–" if other is None else _cost(group, other),
                _verdict(results, group, other, against, items, roles),
            ]
        )
    headings = (
        ("method", "variant"), ("l0_target", "target L0"), ("mechanism", "what it is"),
        ("claim", "what it is for in the source"), ("against", "compared with"),
        ("cost", "training time"), ("verdict", "verdict"),
    )  # fmt: skip
    return Table(
        f"{results.name}-ladder-{part}-verdicts",
        f"{title}: verdicts. A verdict rests on paired differences within seeds with 95 % "
        "intervals; training time is a multiple of the compared variant's."
        + _READING.get(part, ""),
        columns(*headings),
        rows,
    )


def _cost(group: Group, other: Group) -> str:
    """Ratio of training times within seeds."""
    base = other.seconds()
    ratios = [value / base[seed] for seed, value in group.seconds().items() if base.get(seed)]
    return f"{fmean(ratios):.2f} ×" if ratios else "not recorded"


def _verdict(
    results: Results,
    group: Group,
    other: Group | None,
    against: str | None,
    items: Sequence[Difference],
    roles: Mapping[str, str],
) -> str:
    if against is None:
        return "reference"
    if other is None:
        return f"not judged: {against} was not measured at this L0"
    headings = {metric: BY_KEY[role].heading for role, metric in roles.items()}
    judged = {metric for role, metric in roles.items() if role not in _NOT_JUDGED}
    better: list[str] = []
    worse: list[str] = []
    neutral: list[str] = []
    single: list[str] = []
    undirected: list[str] = []
    for item in items:
        higher = results.higher_is_better(item.metric)
        if item.metric not in judged:
            continue
        word = wording(item.found, higher)
        change = signed(item.found.mean, digits_for_difference([item.found.mean]))
        if higher is None:
            if word in ("higher", "lower"):
                undirected.append(f"{headings[item.metric]} {word}, {change}")
            continue
        target = {"better": better, "worse": worse, "one pair": single}.get(word, neutral)
        target.append(f"{headings[item.metric]} {change}")
    # What no direction judges is told all the same: lower overlap is what some mechanisms are for.
    beside = f"; beside that: {', '.join(undirected)}" if undirected else ""
    note = l0_note(results, [(group, other)])
    if single:
        return f"one pair, not judged: {', '.join(single)}{f' ({note})' if note else ''}"
    if not better and not worse:
        if not neutral:
            return f"not judged: no seed in common with {against}"
        if not note:
            count = f"{len(neutral)} metric{'s' * (len(neutral) > 1)}"
            return f"neutral: no difference shown in {count}{beside}"
    parts = ([f"better in {', '.join(better)}"] if better else []) + (
        [f"worse in {', '.join(worse)}"] if worse else []
    )
    if neutral:
        parts.append(f"no difference shown in {len(neutral)} other{'s' * (len(neutral) > 1)}")
    word = "mixed" if better and worse else "helps" if better else "harmful"
    if note:
        # What L0 alone would change is no merit of the mechanism.
        word = f"not judged, {note}; at these"
    return f"{word}: {'; '.join(parts)}{beside}"


def _evolution(
    name: str, results: Results, members: Sequence[Group], roles: Mapping[str, str]
) -> list[Block]:
    """The source's plots: a metric along the runs, one by one and together, for each L0."""
    chosen = dict(list(roles.items())[:LADDER_PLOTS])
    blocks: list[Block] = []
    targets = list(dict.fromkeys(group.l0_target for group in members))
    for l0 in targets:
        rungs = [group for group in members if group.l0_target == l0]
        if len(rungs) < 2:
            continue
        labels = [
            "base" if group.method == BASELINE else group.method.removeprefix("source-run-")
            for group in rungs
        ]
        where = "" if l0 is None else f" at L0 {number(l0, 0)}"
        suffix = f"-l0-{l0:g}" if len(targets) > 1 and l0 is not None else ""
        shown = {
            role: Panel(
                axis_label(BY_KEY[role].heading, results.definitions.get(metric)),
                BY_KEY[role].heading,
                [list(group.values(metric).values()) for group in rungs],
            )
            for role, metric in chosen.items()
        }
        drawn = [
            panels(
                f"{name}{suffix}-{role.replace('_', '-')}",
                f"{sentence(panel.told)} along the source's runs{where}.{seeds_shown(results)}",
                labels, [panel], "baseline and the source's runs",
            )
            for role, panel in shown.items()
        ] + [
            panels(
                f"{name}{suffix}-combined",
                f"The ladder{where}: all metrics along the source's runs.{seeds_shown(results)}",
                labels, list(shown.values()), "baseline and the source's runs",
            )
        ]  # fmt: skip
        blocks += [figure for figures in drawn for figure in figures]
    return blocks


def _drawn_differences(
    name: str,
    members: Collection[str],
    results: Results,
    found: Sequence[Difference],
    roles: Mapping[str, str],
    styles: Mapping[str, Style],
) -> list[Block]:
    blocks: list[Block] = []
    for role in _DRAWN:
        if role not in roles:
            continue
        items = [
            item
            for item in found
            if item.metric == roles[role] and item.l0_target is not None and item.ours in members
        ]
        blocks += difference_plot(
            results, items, role, styles, name=f"{name}-{role.replace('_', '-')}"
        )
    return blocks
