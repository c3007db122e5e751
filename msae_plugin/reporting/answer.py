"""The answer that a report begins with: which SAE to use for what, and what is not shown.

Every sentence is made of paired differences to the reference. A difference whose interval holds
zero is "level"; with one training seed nothing is told of a method, only of these SAEs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from msae_plugin.common.table import digits_for_difference, signed
from msae_plugin.reporting.document import Answer, Section, cell, table_of
from msae_plugin.reporting.results import (
    HEADLINES,
    Difference,
    PairedDifference,
    Results,
    differences,
    sentence,
    wording,
)
from msae_plugin.reporting.sources import Source, Sources

MOST_NAMED = 3
"""Names in a sentence; the others are counted."""


@dataclass(frozen=True)
class Finding:
    """One way in which an SAE failed to learn."""

    where: str
    sae: str
    message: str
    setting: str


def interval(found: PairedDifference) -> str:
    """A mean difference and its 95 % interval."""
    if found.low is None or found.high is None:
        return signed(found.mean, digits_for_difference([found.mean]))
    digits = digits_for_difference([found.mean, found.low, found.high])
    return (
        f"{signed(found.mean, digits)} [{signed(found.low, digits)}, {signed(found.high, digits)}]"
    )


def listed(names: Sequence[str]) -> str:
    """`a, b and c`, or `a, b, c and 4 more`."""
    rest = len(names) - MOST_NAMED
    shown = [*names[:MOST_NAMED], f"{rest} more"] if rest > 1 else list(names)
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def answers(measured: Sequence[Results], findings: Sequence[Finding]) -> list[Answer]:
    """What each table of results says, or that there is none."""
    if not measured:
        return [
            Answer(
                [
                    "Nothing here says which SAE to use: training runs alone measure nothing on "
                    "text that they were not trained on. Give the folder of `msae eval` too."
                ]
            )
        ]
    return [
        answer_of(results, _failing(results, findings), titled=len(measured) > 1)
        for results in measured
    ]


def _failing(results: Results, findings: Sequence[Finding]) -> list[str]:
    """Methods of which an SAE failed to learn, and how many of its SAEs."""
    methods = dict(zip(results.saes["name"], results.saes["method"], strict=True))
    if not results.over_training_seeds:  # named as their runs name them
        methods |= {method: method for method in results.saes["method"]}
    failed = {
        item.sae: methods[item.sae]
        for item in findings
        if item.sae in methods and (item.where == results.source or not results.over_training_seeds)
    }
    if not results.over_training_seeds:  # a row is an evaluation seed there
        return list(dict.fromkeys(failed.values()))
    total, bad = Counter(results.saes["method"]), Counter(failed.values())
    return [
        method if total[method] == 1 else f"{n} of {total[method]} SAEs of {method}"
        for method, n in bad.items()
    ]


def answer_of(results: Results, failing: Sequence[str], *, titled: bool) -> Answer:
    """What one table of results says; `failing` did not learn, `titled` names the table first."""
    sentences, basis = _choice(results)
    if failing:
        sentences.insert(0, f"Failed to learn, see the warnings: {listed(failing)}.")
    if titled:
        sentences.insert(0, f"{results.title}:")
    unmeasured = results.unfilled()
    told = [listed(unmeasured)] if unmeasured else []
    if results.missing:
        told.append(f"{len(results.missing)} listed at the end")
    return Answer(sentences, [*basis, *([f"Not measured: {'; '.join(told)}."] if told else [])])


def _choice(results: Results) -> tuple[list[str], list[str]]:
    """What to use for what and where that loses; and what this rests on."""
    methods = list(dict.fromkeys(group.method for group in results.candidates))
    reference = results.reference_method
    if not results.over_training_seeds:
        said = f"{len(methods)} SAEs, each trained once: no choice between methods is shown."
        return [said], ["The spread is over evaluation seeds."]
    if len(methods) < 2 or reference is None:
        alone = listed(methods) if methods else "No method"
        return [f"{alone} alone: nothing to choose between."], []
    missed = {group.method for group in results.candidates if group.missed_its_l0}
    compared = _over_all_l0s(results, missed)
    told: dict[str, list[str]] = {}
    winners: dict[str, None] = {}
    for key, metric in results.headlines().items():
        if HEADLINES[key].purpose:
            verdict, winner, text = _verdict(results, key, metric, compared, reference)
            winners |= {} if winner is None else {winner: None}
            told.setdefault(verdict, []).append(text)
    said = [f"{sentence(verdict)} {listed(texts)}." for verdict, texts in told.items()]
    others = [method for method in methods if method != reference and method not in missed]
    for method in list(winners) or others[:1]:
        said += _losses(results, compared, method, reference)
    basis = [_extent(results, list(compared.values()))]
    if missed:
        basis.append(f"Left out, for they missed the target L0: {listed(sorted(missed))}.")
    return said or [f"Nothing can be told from {reference}: no seed or L0 in common."], basis


Compared = dict[tuple[str, str], Difference]


def _over_all_l0s(results: Results, missed: set[str]) -> Compared:
    """The difference to the reference over every L0 in common, by method and metric."""
    methods = {group.method for group in results.candidates} - missed
    metrics = [*results.headlines("judged").values()]
    return {
        # The one over all L0s comes last, and is what is kept.
        (item.ours, item.metric): item
        for item in differences(results, metrics)
        if item.ours in methods and item.theirs == results.reference_method and not item.l0_note
    }


def _verdict(
    results: Results, key: str, metric: str, compared: Compared, reference: str
) -> tuple[str, str | None, str]:
    """The beginning of a sentence, who is recommended, and its end, for one purpose."""
    entry, higher = HEADLINES[key], results.higher_is_better(metric)
    found = [item for (_, name), item in compared.items() if name == metric]
    if higher is None or not found:
        why = "no seed in common, or measured L0s more than 10 % apart"
        return f"not compared with {reference}, for {why}:", None, entry.purpose
    # Whoever is shown to be better is named before one that is further ahead in one lucky pair.
    words = {item.ours: wording(item.found, higher) for item in found}
    better = [item for item in found if words[item.ours] == "better"]
    best = max(better or found, key=lambda item: item.found.mean if higher else -item.found.mean)
    word, gain = words[best.ours], interval(best.found)
    if word == "better":
        text = f"{entry.purpose} ({entry.heading} {gain} on {reference})"
        return f"use {best.ours} for", best.ours, text
    start = f"{entry.purpose} ({entry.heading}"
    if word == "worse":
        return f"use {reference} for", None, f"{start}, the next is {best.ours} {gain})"
    if word == "one pair":
        ahead = f"{best.ours} in {start}, {gain} on {reference})"
        if (best.found.mean > 0) is not higher:
            ahead = f"{reference} in {start}, the next is {best.ours} {gain})"
        return "one seed decides nothing. Ahead in this run:", None, ahead
    behind = [method for method, said in words.items() if said == "worse"]
    worse = f"; {listed(behind)} behind" if behind else ""
    return f"level with {reference} in", None, f"{start}, at best {best.ours} {gain}{worse})"


def _losses(results: Results, compared: Compared, method: str, reference: str) -> list[str]:
    """Where a method is shown to be worse than the reference."""
    headings = {metric: HEADLINES[key].heading for key, metric in results.headlines().items()}
    items = [item for (ours, _), item in compared.items() if ours == method]
    items = [item for item in items if results.higher_is_better(item.metric) is not None]
    lost = [
        f"{headings[item.metric]} {interval(item.found)}"
        for item in items
        if wording(item.found, results.higher_is_better(item.metric)) == "worse"
    ]
    if lost:
        return [f"Against {reference}, {method} loses in {listed(lost)}."]
    if any(item.found.low is not None for item in items):
        return [f"Against {reference}, {method} is worse in none of {len(items)} metrics."]
    return []


def _extent(results: Results, compared: Sequence[Difference]) -> str:
    """What the differences rest on."""
    seeds = len(set(results.saes["seed"].dropna()))
    targets = len(set(results.saes["l0_target"].dropna()))
    parts = [f"{seeds} training seed{'s' * (seeds != 1)}"]
    parts += [f"{targets} target L0{'s' * (targets != 1)}"] if targets else []
    sets = {item.found.n_pairs for item in compared if item.over == "data sets"}
    parts += [f"{max(sets)} data sets of an evaluation"] if sets else []
    shown = any(item.found.low is not None for item in compared)
    brackets = "; in brackets 95 % intervals, and level where one holds zero" if shown else ""
    alone = "; what another seed would give is not known" if seeds == 1 else ""
    return f"Paired over {listed(parts)}{brackets}{alone}."


def findings_of(sources: Sources) -> list[Finding]:
    """The health findings of every SAE."""
    recorded: list[tuple[Source, str, object]] = [
        (run, name, sae.get("health"))
        for run in sources.runs
        for name, sae in run.content["saes"].items()
    ]
    recorded += [
        (source, str(row["name"]), row.get("health"))
        for source in sources.comparisons
        for row in source.content["rows"]
    ]
    return [
        Finding(source.label, name, str(item["message"]), str(item.get("setting") or "–"))
        for source, name, health in recorded
        for item in (health if isinstance(health, list) else [])
    ]


def health_section(findings: Sequence[Finding]) -> Section | None:
    """SAEs that failed to learn, a line each; None when all are healthy."""
    if not findings:
        return None
    table = table_of(
        "health",
        "Each with the likely cause and the setting to change first.",
        findings,
        [
            cell("sae", "SAE"),
            cell("where", "of"),
            cell("finding", "what was found", "message"),
            cell("setting", "setting"),
        ],
    )
    return Section("health-section", "Read this first: SAEs that failed to learn", [table])
