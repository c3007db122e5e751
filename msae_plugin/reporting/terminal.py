"""Tables for a terminal: of an evaluation, and of a comparison with its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.text import Text

from msae_plugin.common.table import Column, Table
from msae_plugin.evaluation.contexts import ContextsForTerminal, LatentProfile, TokenContext
from msae_plugin.evaluation.summary import standings, unmeasured
from msae_plugin.reporting.answer import answers, findings_of
from msae_plugin.reporting.document import Answer
from msae_plugin.reporting.results import HEADLINES, Results
from msae_plugin.reporting.results import Group as MeasuredGroup
from msae_plugin.reporting.rows import results_of
from msae_plugin.reporting.sections.results import best_shown
from msae_plugin.reporting.sources import TrainedSAE, read_sources
from msae_plugin.saes.load import is_told_apart

_MOST_COLUMNS = 6
_NUMBER_WIDTH = len(" 12.3±4.56 ")


def columns_of(evaluation: str, entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Metric and heading of an evaluation's columns: the headlines measured, else the first ones.

    `summary.csv` holds all metrics.
    """
    measured: dict[str, None] = {}
    for entry in entries:
        measured.update(dict.fromkeys(entry["metrics"]))
    found: list[tuple[str, str]] = []
    for headline in HEADLINES.values():
        # The first of its names alone: the others are poorer versions of it.
        where, _, metric = headline.names[0].rpartition("/")
        if where == evaluation and metric in measured:
            found.append((metric, headline.short or headline.heading))
    return found or [(name, name) for name in list(measured)[:_MOST_COLUMNS]]


def _cell(mean: float, std: float | None) -> str:
    """Mean and spread, six of them side by side in a terminal of 80: `.957±.024`."""
    digits = 1 if abs(mean) >= 10 else 3
    text = f"{mean:.{digits}f}" + ("" if std is None else f"±{std:.{digits}f}")
    return re.sub(r"(?<!\d)0\.", ".", text)


def _table(evaluation: str, entries: Sequence[Mapping[str, Any]]) -> Table | None:
    """The measured SAEs of an evaluation; None without any metric."""
    shown = columns_of(evaluation, entries)

    def cell(value: Mapping[str, Any] | None) -> str:
        return "-" if value is None else _cell(float(value["mean"]), value["std"])

    rows = [
        [str(entry["sae"]), *(cell(entry["metrics"].get(name)) for name, _ in shown)]
        for entry in entries
        if entry["metrics"]
    ]
    numbers = [Column(name, heading, is_number=True) for name, heading in shown]
    return Table(evaluation, "", [Column("sae", "SAE"), *numbers], rows) if shown else None


def summary_for_terminal(summary: Mapping[str, Any]) -> RenderableType:
    """A table per evaluation; what was not measured is named with its reason below.

    A name that was made to tell two SAEs apart leads back to what the user gave.
    """
    by_evaluation: dict[str, list[Mapping[str, Any]]] = {}
    for entry in summary["results"]:
        by_evaluation.setdefault(str(entry["evaluation"]), []).append(entry)
    parts: list[RenderableType] = []
    for evaluation, entries in by_evaluation.items():
        table = _table(evaluation, entries)
        parts += [] if table is None else [table.terminal(title=evaluation, dense=True)]
        parts += [Text(line) for line in unmeasured_lines(entries)]
        parts += [
            Text(f"{evaluation} of {entry['sae']}: {entry['note']}")
            for entry in entries
            if entry.get("note")
        ]
    given = [
        Text(f"{name} is {entry['reference']}")
        for name, entry in summary["saes"].items()
        if is_told_apart(name, entry.get("weights_sha256"))
    ]
    among = [Text(line) for standing in standings(summary) for line in standing.lines()]
    return Group(*parts, *among, *given)


def unmeasured_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each SAE without numbers; one for all where the reason is the same."""
    return [
        f"{evaluation} {status} for {', '.join(names) if len(names) < len(entries) else 'all SAEs'}"
        f": {reason}"
        for (evaluation, status, reason), names in unmeasured(entries).items()
    ]


def answer_for_terminal(found: Sequence[Answer]) -> RenderableType:
    """The sentences that everything else is there to support."""
    return Group(
        *(
            Padding(
                Text.assemble((" ".join(answer.sentences), "bold"), "\n", " ".join(answer.basis)),
                (0, 0, 1, 0),
            )
            for answer in found
        )
    )


def comparison_for_terminal(folder: Path) -> RenderableType:
    """A comparison's answer, its means over seeds by method and L0, warnings, what is missing."""
    sources = read_sources([folder])
    measured, findings = results_of(sources, []), findings_of(sources)
    parts = [answer_for_terminal(answers(measured, findings))]
    for results in measured:
        if len(measured) > 1:
            parts.append(Text(results.title, style="bold"))
        parts.append(_Means(results))
    parts += [Text(f"warning: {item.sae}: {item.message}") for item in findings]
    missing = [item for results in measured for item in results.missing]
    parts += [Text(f"{item.status}: {item.what}: {item.reason}") for item in missing]
    return Group(*parts)


class _Means:
    """The headline metrics for a terminal, in as many tables as its width asks for."""

    def __init__(self, results: Results) -> None:
        self._groups = [group for group in results.groups if not group.is_variant]
        self._headlines = results.headlines("terminal")
        self._best = best_shown(results, self._groups)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def cell(group: MeasuredGroup, metric: str) -> str:
            found = group.spread(metric)
            return "-" if found is None else _cell(found.mean, found.std)

        names = [
            group.label + (" (missed its L0)" if group.missed_its_l0 else "")
            for group in self._groups
        ]
        room = options.max_width - max(map(len, ["method", *names])) - len(" target seeds")
        per = max(1, room // _NUMBER_WIDTH)
        every = list(self._headlines.items())
        for start in range(0, len(every), per):
            shown = dict(every[start : start + per])
            rows = [
                [
                    name,
                    "-" if group.l0_target is None else f"{group.l0_target:g}",
                    str(len(group.saes)),
                    *(cell(group, metric) for metric in shown.values()),
                ]
                for name, group in zip(names, self._groups, strict=True)
            ]
            numbers = [Column(key, key, is_number=True) for key in ("target", "seeds")]
            numbers += [
                Column(key, HEADLINES[key].terminal or HEADLINES[key].heading, is_number=True)
                for key in shown
            ]
            best = {(y, 3 + x) for y, k in self._best for x, key in enumerate(shown) if k == key}
            columns = [Column("method", "method"), *numbers]
            yield Table("means", "", columns, rows, best=frozenset(best)).terminal(dense=True)


def contexts_for_terminal(sae: TrainedSAE) -> RenderableType:
    """The latents in context that a comparison stored of an SAE."""
    return ContextsForTerminal([_profile(latent) for latent in sae.contexts()])


def _profile(latent: Mapping[str, Any]) -> LatentProfile:
    contexts = [TokenContext(**context) for context in latent["contexts"]]
    numbers = {key: value for key, value in latent.items() if key != "contexts"}
    return LatentProfile(**numbers, contexts=contexts)
