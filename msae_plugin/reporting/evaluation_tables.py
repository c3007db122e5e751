"""The summary of an evaluation as tables: for the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

HEADLINES: Mapping[str, Sequence[tuple[str, str]]] = {
    "core": (
        ("l0", "L0"),
        ("explained_variance_streaming", "expl. var."),
        ("ce_loss_score", "loss rec."),
        ("kl_div_with_sae_float32", "KL (nats)"),
        ("frac_alive", "alive"),
        ("average_max_decoder_cosine_sim", "dec. cos."),
    ),
    "sparse_probing": (
        ("sae_top_1_test_accuracy", "top-1"),
        ("sae_top_2_test_accuracy", "top-2"),
        ("sae_top_5_test_accuracy", "top-5"),
        ("sae_test_accuracy", "all latents"),
        ("llm_top_1_test_accuracy", "LLM top-1"),
        ("llm_test_accuracy", "LLM"),
    ),
    "sparse_probing_sae_probes": (
        ("sae_top_1_test_accuracy", "top-1"),
        ("sae_top_5_test_accuracy", "top-5"),
        ("sae_top_1_test_auc", "AUC top-1"),
        ("sae_top_5_test_auc", "AUC top-5"),
        ("llm_test_accuracy", "LLM"),
    ),
    "unlearning": (("unlearning_score", "score"),),
}
"""Metrics that a table shows, with their headings; `summary.csv` holds all of them."""

_MOST_COLUMNS = 6


def columns_of(evaluation: str, entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The metrics to show of an evaluation: the known ones that were measured, else the first."""
    measured: dict[str, None] = {}
    for entry in entries:
        measured.update(dict.fromkeys(entry["metrics"]))
    known = [pair for pair in HEADLINES.get(evaluation, ()) if pair[0] in measured]
    return known or [(name, name) for name in list(measured)[:_MOST_COLUMNS]]


def cell(value: Mapping[str, Any] | None, digits: int = 4) -> str:
    """Mean and spread of one metric."""
    if value is None:
        return "-"
    mean, std = float(value["mean"]), value["std"]
    digits = 1 if abs(mean) >= 10 else digits
    text = f"{mean:.{digits}f}"
    return text if std is None else f"{text} ± {float(std):.{digits}f}"


def _narrow(value: Mapping[str, Any] | None) -> str:
    """Six columns side by side in a terminal of 80: `.957±.024`."""
    return re.sub(r"(?<!\d)0\.", ".", cell(value, digits=3).replace(" ± ", "±"))


def _by_evaluation(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in summary["results"]:
        found.setdefault(str(entry["evaluation"]), []).append(entry)
    return found


def summary_for_terminal(summary: Mapping[str, Any]) -> RenderableType:
    """A table per evaluation; what was not measured is named with its reason below."""
    parts: list[RenderableType] = []
    for evaluation, entries in _by_evaluation(summary).items():
        columns = columns_of(evaluation, entries)
        if columns:
            table = Table(title=evaluation, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
            table.add_column("SAE", overflow="fold")
            for _, heading in columns:
                table.add_column(f" {heading}", justify="right", no_wrap=True)
            for entry in entries:
                if entry["metrics"]:
                    cells = [f" {_narrow(entry['metrics'].get(name))}" for name, _ in columns]
                    table.add_row(Text(str(entry["sae"])), *cells)
            parts.append(table)
        parts += [Text(line) for line in unmeasured(evaluation, entries)]
        parts += [
            Text(f"{evaluation} of {entry['sae']}: {entry['note']}")
            for entry in entries
            if entry.get("note")
        ]
    return Group(*parts)


def unmeasured(evaluation: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each SAE without numbers; one for all where the reason is the same."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        if entry["status"] != "measured":
            key = (str(entry["status"]).replace("_", " "), str(entry["reason"]))
            reasons.setdefault(key, []).append(str(entry["sae"]))
    return [
        f"{evaluation} {status} for {', '.join(names) if len(names) < len(entries) else 'all SAEs'}"
        f": {reason}"
        for (status, reason), names in reasons.items()
    ]


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """The same tables in Markdown."""
    blocks: list[str] = []
    for evaluation, entries in _by_evaluation(summary).items():
        columns = columns_of(evaluation, entries)
        lines = [f"### {evaluation}", ""]
        if columns:
            lines.append("| SAE | " + " | ".join(heading for _, heading in columns) + " |")
            lines.append("|---|" + "---:|" * len(columns))
            lines += [
                f"| {entry['sae']} | "
                + " | ".join(cell(entry["metrics"].get(name)) for name, _ in columns)
                + " |"
                for entry in entries
                if entry["metrics"]
            ]
            lines.append("")
        lines += unmeasured(evaluation, entries)
        blocks.append("\n".join(lines).rstrip())
    return "\n\n".join(blocks) + "\n"
