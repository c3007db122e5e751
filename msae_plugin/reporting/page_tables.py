"""Tables in HTML: headings with scope, exact values for sorting, words marked by what they say."""

from __future__ import annotations

from html import escape

from msae_plugin.comparison.statistics import Spread
from msae_plugin.reporting.document import CellValue, Table

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
