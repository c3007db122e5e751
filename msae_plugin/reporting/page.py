"""A report as one self-contained HTML page and as Markdown, from the files in `templates/`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, NamedTuple, cast
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from msae_plugin.common.table import CellValue, Spread, Table, one_line
from msae_plugin.evaluation.contexts import one_line as visible
from msae_plugin.reporting.document import Block, Document

WORDS_FROM = 24
"""A text this long may wrap."""
LONG_FROM = 80
"""One this long gets a column of its own width."""
SHORT_NAME = 26
"""A row's name of at most so many letters stays on one line, but for a phone."""


def asset(name: str) -> Markup:
    """A style sheet or script that comes with the package."""
    path = files("msae_plugin.reporting") / "templates" / name
    return Markup(path.read_text(encoding="utf-8"))


class Cell(NamedTuple):
    """A cell of a table on the page."""

    text: str
    classes: str
    sorted_by: str | None  # the value with all its digits; a mean sorts by itself


def _cells(table: Table) -> Iterator[list[Cell]]:
    numbers = table.numbers()
    for row, shown in zip(table.rows, table.shown(), strict=True):
        yield [
            Cell(text, _classes(value, text, is_first=not place, is_number=right), _order(value))
            for place, (value, text, right) in enumerate(zip(row, shown, numbers, strict=True))
        ]


def _classes(value: CellValue, text: str, *, is_first: bool, is_number: bool) -> str:
    if is_first:
        return "short" if len(text) <= SHORT_NAME else ""
    if value is None:
        return "none"
    if is_number:
        return "number"
    if text in ("better", "worse"):
        return "good" if text == "better" else "bad"
    if len(text) < WORDS_FROM:
        return ""
    return "words long" if len(text) >= LONG_FROM else "words"


def _order(value: CellValue) -> str | None:
    if isinstance(value, Spread):
        return repr(value.mean)
    return value if value is None or isinstance(value, str) else repr(value)


def _sentences(text: str) -> tuple[str, str]:
    """The first sentence and the rest."""
    first, stop, rest = text.partition(". ")
    return (f"{first}.", f" {rest}") if stop else (text, "")


def _breakable(text: str) -> Markup:
    """Names may break where a reader would break them."""
    return Markup(str(escape(text)).replace("_", "_<wbr>").replace("/", "/<wbr>"))


def _kind(block: Block) -> str:
    return type(block).__name__


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


_TEMPLATES = Environment(
    loader=PackageLoader("msae_plugin.reporting"),
    autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
cast("dict[str, Any]", _TEMPLATES.filters).update(
    base64=_base64, breakable=_breakable, cells=_cells, kind=_kind, md=one_line, quote=quote,
    sentences=_sentences, visible=visible,
)  # fmt: skip


def page(document: Document) -> str:
    """The whole page."""
    return _TEMPLATES.get_template("page.html.j2").render(document=document, asset=asset)


def markdown(document: Document, figures_folder: str) -> str:
    """The report in Markdown, figures linked."""
    template = _TEMPLATES.get_template("report.md.j2")
    return template.render(document=document, figures_folder=figures_folder)
