"""A report as one self-contained HTML page, as Markdown and as CSV.

Figures are embedded; the style sheet and the few lines of script are in the file, and a content
security policy forbids everything else. Without scripts it reads the same, unsorted.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from urllib.parse import quote

from msae_plugin.comparison.statistics import Spread
from msae_plugin.reporting.document import (
    Block,
    Bullets,
    CellValue,
    Document,
    Facts,
    Figure,
    LatentContexts,
    Links,
    Section,
    Subheading,
    Table,
    Text,
)

_GOOD, _BAD = ("better",), ("worse",)
WORDS_FROM = 24
"""A text this long may wrap."""
LONG_FROM = 80
"""One this long gets a column of its own width."""
SHORT_NAME = 26
"""A row's name of at most so many letters stays on one line, but for a phone."""


def table_html(table: Table) -> str:
    """A table in a region that scrolls sideways, folded when the table says so."""
    name = escape(table.name)
    numbers = [table.is_number(column) for column in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{_classes("number") if is_number else ""}>'
        f'<span class="label">{escape(column.heading)}</span>'
        + (f"<small>{escape(column.detail)}</small>" if column.detail else "")
        + "</th>"
        for column, is_number in zip(table.columns, numbers, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            _cell(value, text, is_first=place == 0, is_number=numbers[place])
            for place, (value, text) in enumerate(zip(row, shown, strict=True))
        )
        + "</tr>\n"
        for row, shown in zip(table.rows, table.shown(), strict=True)
    )
    first, rest = _sentences(table.caption)
    caption = f'<p class="caption" id="{name}-caption"><strong>{first}</strong>{rest}</p>\n'
    region = (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-caption">\n'
        f'<table id="{name}" aria-labelledby="{name}-caption">\n'
        f"<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )
    if not table.folded:
        return f'<div class="table">\n{caption}{region}</div>\n'
    rows = f"{len(table.rows)} row{'' if len(table.rows) == 1 else 's'}"
    return (
        f"<details>\n<summary>{first.rstrip('.')} ({rows})</summary>\n"
        f'<div class="table">\n{caption}{region}</div>\n</details>\n'
    )


def _sentences(text: str) -> tuple[str, str]:
    """The first sentence and the rest, escaped."""
    first, stop, rest = text.partition(". ")
    return (f"{escape(first)}.", f" {escape(rest)}") if stop else (escape(text), "")


def _cell(value: CellValue, text: str, *, is_first: bool, is_number: bool) -> str:
    classes = "number" if is_number else ""
    if value is None:
        classes = "none"
    elif not is_number and text in _GOOD:
        classes = "good"
    elif not is_number and text in _BAD:
        classes = "bad"
    elif not is_number and len(text) >= WORDS_FROM:
        classes = "words long" if len(text) >= LONG_FROM else "words"
    sorted_by = _sorted_by(value)
    data = "" if sorted_by is None else f' data-value="{escape(sorted_by)}"'
    if is_first:
        short = _classes("short") if len(text) <= SHORT_NAME else ""
        return f'<th scope="row"{short}{data}>{_breakable(text)}</th>'
    return f"<td{_classes(classes)}{data}>{escape(text)}</td>"


def _breakable(text: str) -> str:
    """Names may break where a reader would break them."""
    return escape(text).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _sorted_by(value: CellValue) -> str | None:
    """The value with all its digits; a mean sorts by itself."""
    if value is None:
        return None
    if isinstance(value, Spread):
        return repr(value.mean)
    return value if isinstance(value, str) else repr(value)


def _classes(names: str) -> str:
    return f' class="{names}"' if names else ""


POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


def asset(name: str) -> str:
    """A style sheet or script that comes with the package."""
    return (files("msae_plugin.reporting") / "assets" / name).read_text(encoding="utf-8")


def page(document: Document) -> str:
    """The whole page."""
    links = "\n".join(
        f'<li><a href="#{escape(section.name)}">{escape(section.title)}</a></li>'
        for section in document.sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(document.title)}</title>
<link rel="icon" href="data:,">
<style>
{asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{escape(document.title)}</h1>
<p>{escape(document.lead)}</p>
</header>
<nav class="contents" aria-label="Contents">
<div>
<ul>
{links}
</ul>
</div>
</nav>
<main id="main">
{"".join(_section(section) for section in document.sections)}</main>
<footer>
<p>{escape(document.origin)}</p>
</footer>
<script>
{asset("page.js")}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    name = escape(section.name)
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(section.title)}</h2>\n'
        f"{''.join(_blocks(section.blocks))}</section>\n"
    )


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    # Figures that follow one another stand side by side where there is room.
    for are_figures, group in groupby(blocks, key=lambda block: isinstance(block, Figure)):
        inside = "".join(_block(block) for block in group)
        yield f'<div class="figures">\n{inside}</div>\n' if are_figures else inside


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>\n"
    if isinstance(block, Subheading):
        return f"<h3>{escape(block.text)}</h3>\n"
    if isinstance(block, Bullets):
        items = "".join(f"<li>{escape(item)}</li>\n" for item in block.items)
        return f"<ul>\n{items}</ul>\n"
    if isinstance(block, Facts):
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in block.rows
        )
        listed = f"<dl>\n{rows}</dl>\n"
        if block.folded:
            heading = f"<summary>{escape(block.folded)}</summary>\n"
            return f"<details>\n{heading}{listed}</details>\n"
        return listed
    if isinstance(block, Links):
        items = "".join(
            f'<li><a href="{escape(quote(target))}">{escape(text)}</a></li>\n'
            for text, target in block.items
        )
        return f"<ul>\n{items}</ul>\n"
    if isinstance(block, Table):
        return table_html(block)
    if isinstance(block, Figure):
        return _figure(block)
    return _contexts(block)


def _figure(figure: Figure) -> str:
    width, height = figure.size
    data = base64.b64encode(figure.png).decode("ascii")
    return (
        f'<figure id="{escape(figure.name)}">\n'
        f'<img width="{width}" height="{height}" alt="{escape(figure.alt)}" '
        f'src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>\n"
    )


def _contexts(block: LatentContexts) -> str:
    lines = "".join(
        f'<li><span class="value">{context.activation:.3g}</span>'
        f'<span class="text">{_words(context.before).lstrip()}<mark>{_words(context.token)}</mark>'
        f"{_words(context.after)}</span></li>\n"
        for context in block.contexts
    )
    return f'<div class="latent">\n<h3>{escape(block.heading)}</h3>\n<ul>\n{lines}</ul>\n</div>\n'


def _words(text: str) -> str:
    return escape(text.replace("\r", "").replace("\n", "⏎").replace("\t", " "))


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
    """The report in Markdown, figures linked."""
    parts = [f"# {escaped(document.title)}", escaped(document.lead)]
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [_markdown_block(block, figures_folder) for block in section.blocks]
    parts.append(escaped(document.origin))
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block, figures_folder: str) -> str:
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
    return _markdown_contexts(block)


def _markdown_contexts(block: LatentContexts) -> str:
    lines = [f"**{escaped(block.heading)}**", ""]
    for context in block.contexts:
        token = escaped(context.token) or "␣"
        lines.append(
            f"- {context.activation:.3g}: …{escaped(context.before)} **{token}** "
            f"{escaped(context.after)}…"
        )
    return "\n".join(lines)
