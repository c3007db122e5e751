"""What was not measured, what the metrics mean, and which files hold the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from msae_plugin.reporting.document import Block, CellValue, Section, Table, Text, columns
from msae_plugin.reporting.metrics import Definition
from msae_plugin.reporting.rows import Bench, Missing


def missing_section(missing: Sequence[Missing], absent: Sequence[str]) -> Section:
    """Failed, skipped, not measurable and not recorded, with reasons.

    Args:
        missing: What the data says was not measured.
        absent: Whole parts of a report for which there is no data.
    """
    blocks: list[Block] = []
    if missing:
        headings = (
            ("where", "where"), ("what", "what"), ("status", "status"), ("reason", "reason"),
        )  # fmt: skip
        blocks.append(
            Table(
                "not-measured",
                "What was to be measured and was not.",
                columns(*headings),
                [[item.where, item.what, item.status, item.reason] for item in missing],
            )
        )
    else:
        blocks.append(Text("Everything that was to be measured was measured."))
    if absent:
        blocks.append(Text(f"No data was given for: {', '.join(absent)}."))
    return Section("missing", "What was not measured", blocks)


def definitions_section(benches: Sequence[Bench]) -> Section | None:
    """Every metric that appears, defined once; None without metrics."""
    found: dict[Definition, list[str]] = {}
    undefined: dict[str, None] = {}
    for bench in benches:
        for metric in bench.metrics():
            definition = bench.definitions.get(metric)
            if definition is None:
                undefined[metric] = None
            else:
                found.setdefault(definition, []).append(bench.title)
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
