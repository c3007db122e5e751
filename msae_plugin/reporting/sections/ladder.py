"""The source's ladder: what each rung claims, what it measures, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from msae_plugin.common.table import Table, digits_for_difference, number, signed
from msae_plugin.comparison.ladder import BASELINE
from msae_plugin.reporting.document import Block, Section, Text, cell, table_of
from msae_plugin.reporting.figures import Style, difference_plot, panel_of, panels, seeds_shown
from msae_plugin.reporting.results import (
    HEADLINES,
    Difference,
    Group,
    Results,
    differences,
    l0_note,
    sentence,
    wording,
)
from msae_plugin.reporting.sections.results import by_chance, headline_cells

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
MOST_PLOTS = 7
"""As many as the source drew."""


def ladder_section(results: Results, styles: Mapping[str, Style]) -> Section | None:
    """The ladder of a comparison; None when no rung was measured."""
    if not results.variants:
        return None
    headlines = results.headlines("ladder")
    found = differences(results, list(headlines.values()))
    blocks: list[Block] = [Text(THE_SOURCE), Text(by_chance(found))]
    for part, members_are in _PARTS.items():
        members = [group for group in results.groups if group.fact("part") == part]
        methods = {group.method for group in members if group.is_variant}
        if not methods:
            continue
        name, title = f"{results.name}-ladder-{part}", f"{results.title}: {members_are}"
        blocks.append(_measured(name, title, results, members, headlines))
        blocks.append(_verdicts(part, title, results, members, headlines, found))
        if part == "cumulative":
            blocks += _evolution(name, results, members, headlines)
            continue
        for key, metric in results.headlines("drawn").items():
            items = [
                item
                for item in found
                if item.metric == metric and item.l0_target is not None and item.ours in methods
            ]
            figure = f"{name}-{key.replace('_', '-')}"
            blocks += difference_plot(results, items, key, styles, name=figure)
    return Section(f"{results.name}-ladder", f"{results.title}: the source's ladder", blocks)


def _measured(
    name: str, title: str, results: Results, members: Sequence[Group], headlines: Mapping[str, str]
) -> Table:
    return table_of(
        name,
        f"{title}. Mean ± one standard deviation over seeds. Final losses of different "
        "objectives are not comparable.",
        members,
        [
            cell("method", "variant"),
            cell("l0_target", "target L0"),
            cell("seeds", "seeds", lambda group: len(group.saes)),
            cell("training_steps", "steps", lambda group: group.fact("training_steps")),
            *headline_cells(results, headlines),
        ],
    )


def _verdicts(
    part: str,
    title: str,
    results: Results,
    members: Sequence[Group],
    headlines: Mapping[str, str],
    found: Sequence[Difference],
) -> Table:
    groups = {(group.method, group.l0_target): group for group in results.groups}

    def other(group: Group) -> Group | None:
        return groups.get((str(group.fact("against")), group.l0_target))

    def cost(group: Group) -> str:
        against = other(group)
        return "–" if against is None else _cost(group, against)

    def verdict(group: Group) -> str:
        key = group.method, group.fact("against"), group.l0_target
        items = [item for item in found if (item.ours, item.theirs, item.l0_target) == key]
        return _verdict(results, group, other(group), items, headlines)

    return table_of(
        f"{results.name}-ladder-{part}-verdicts",
        f"{title}: verdicts. A verdict rests on paired differences within seeds with 95 % "
        "intervals; training time is a multiple of the compared variant's."
        + _READING.get(part, ""),
        members,
        [
            cell("method", "variant"),
            cell("l0_target", "target L0"),
            cell("mechanism", "what it is", lambda g: g.fact("mechanism") or "not recorded"),
            cell(
                "claim",
                "what it is for in the source",
                lambda group: group.fact("claim") or "not in the source",
            ),
            cell("against", "compared with", lambda group: group.fact("against") or "–"),
            cell("cost", "training time", cost),
            cell("verdict", "verdict", verdict),
        ],
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
    items: Sequence[Difference],
    headlines: Mapping[str, str],
) -> str:
    against = group.fact("against")
    if against is None:
        return "reference"
    if other is None:
        return f"not judged: {against} was not measured at this L0"
    headings = {
        metric: HEADLINES[key].heading
        for key, metric in headlines.items()
        if key not in _NOT_JUDGED
    }
    by_word: dict[str, list[str]] = {}
    for item in items:
        if item.metric not in headings:
            continue
        higher = results.higher_is_better(item.metric)
        word = wording(item.found, higher)
        change = signed(item.found.mean, digits_for_difference([item.found.mean]))
        if higher is not None:
            by_word.setdefault(word, []).append(f"{headings[item.metric]} {change}")
        elif word in ("higher", "lower"):
            told = f"{headings[item.metric]} {word}, {change}"
            by_word.setdefault("undirected", []).append(told)
    better, worse, single, undirected = (
        by_word.get(word, []) for word in ("better", "worse", "one pair", "undirected")
    )
    neutral = by_word.get("no difference shown", [])
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
    parts = [f"better in {', '.join(better)}"] if better else []
    parts += [f"worse in {', '.join(worse)}"] if worse else []
    if neutral:
        parts.append(f"no difference shown in {len(neutral)} other{'s' * (len(neutral) > 1)}")
    word = "mixed" if better and worse else "helps" if better else "harmful"
    if note:
        # What L0 alone would change is no merit of the mechanism.
        word = f"not judged, {note}; at these"
    return f"{word}: {'; '.join(parts)}{beside}"


def _evolution(
    name: str, results: Results, members: Sequence[Group], headlines: Mapping[str, str]
) -> list[Block]:
    """The source's plots: a metric along the runs, one by one and together, for each L0."""
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
            key: panel_of(results, key, metric, rungs)
            for key, metric in list(headlines.items())[:MOST_PLOTS]
        }
        runs, seeds = "baseline and the source's runs", seeds_shown(results)
        for key, panel in shown.items():
            figure = f"{name}{suffix}-{key.replace('_', '-')}"
            caption = f"{sentence(panel.told)} along the source's runs{where}.{seeds}"
            blocks += panels(figure, caption, labels, [panel], runs)
        caption = f"The ladder{where}: all metrics along the source's runs.{seeds}"
        blocks += panels(f"{name}{suffix}-combined", caption, labels, list(shown.values()), runs)
    return blocks
