"""Tables as CSV, and the whole report in Markdown."""

from __future__ import annotations

import csv
import io
from urllib.parse import quote

from msae_plugin.comparison.statistics import Spread
from msae_plugin.reporting.document import (
    Block,
    Bullets,
    Document,
    Facts,
    Figure,
    LatentContexts,
    Links,
    Subheading,
    Table,
    Text,
)


def table_csv(table: Table) -> str:
    """All values unrounded. A mean over seeds has its spread and count in columns of their own."""
    spreads = {
        place
        for place in range(len(table.columns))
        if any(isinstance(row[place], Spread) for row in table.rows)
    }
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    header: list[str] = []
    for place, column in enumerate(table.columns):
        header.append(column.key)
        if place in spreads:
            header += [f"{column.key} std", f"{column.key} n"]
    writer.writerow(header)
    for row in table.rows:
        cells: list[object] = []
        for place, value in enumerate(row):
            if isinstance(value, Spread):
                cells += [value.mean, "" if value.std is None else value.std, value.n]
            else:
                cells.append("" if value is None else value)
                cells += ["", ""] if place in spreads else []
        writer.writerow(cells)
    return stream.getvalue()


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    flat = " ".join(text.split())
    for character in "\\`*_[]<>|#":
        flat = flat.replace(character, "\\" + character)
    return flat


def table_markdown(table: Table) -> str:
    """A table with its caption."""
    headings = [
        f"{escaped(column.heading)} ({escaped(column.detail)})"
        if column.detail
        else escaped(column.heading)
        for column in table.columns
    ]
    rules = ["---:" if table.is_number(i) else "---" for i in range(len(table.columns))]
    lines = [
        f"{escaped(table.caption)}",
        "",
        f"| {' | '.join(headings)} |",
        f"|{'|'.join(rules)}|",
        *(f"| {' | '.join(escaped(cell) for cell in row)} |" for row in table.shown()),
    ]
    return "\n".join(lines)


def markdown(document: Document, figures_folder: str) -> str:
    """The report in Markdown, figures linked.

    Args:
        document: The report.
        figures_folder: Where the figures are, relative to the file.
    """
    parts = [f"# {escaped(document.title)}", escaped(document.lead)]
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [_block(block, figures_folder) for block in section.blocks]
    parts.append(escaped(document.origin))
    return "\n\n".join(parts) + "\n"


def _block(block: Block, figures_folder: str) -> str:
    if isinstance(block, Text):
        return escaped(block.text)
    if isinstance(block, Subheading):
        return f"### {escaped(block.text)}"
    if isinstance(block, Bullets):
        return "\n".join(f"- {escaped(item)}" for item in block.items)
    if isinstance(block, Facts):
        heading = f"**{escaped(block.folded)}**\n\n" if block.folded else ""
        return heading + "\n".join(
            f"- {escaped(name)}: {escaped(value)}" for name, value in block.rows
        )
    if isinstance(block, Links):
        return "\n".join(f"- [{escaped(text)}]({quote(target)})" for text, target in block.items)
    if isinstance(block, Table):
        return table_markdown(block)
    if isinstance(block, Figure):
        image = f"![{escaped(block.alt)}]({figures_folder}/{block.name}.png)"
        return f"{image}\n\n*{escaped(block.caption)}*"
    return _contexts(block)


def _contexts(block: LatentContexts) -> str:
    lines = [f"**{escaped(block.heading)}**", ""]
    for context in block.contexts:
        token = escaped(context.token) or "␣"
        lines.append(
            f"- {context.activation:.3g}: …{escaped(context.before)} **{token}** "
            f"{escaped(context.after)}…"
        )
    return "\n".join(lines)
