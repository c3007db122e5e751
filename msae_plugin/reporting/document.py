"""A report free of how it looks (sections, tables, figures, contexts), and as HTML and Markdown.

Methods of two comparisons may share their names and target L0s without having anything in common:
sections on weights and logs are made cohort by cohort.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from msae_plugin.common.table import CellValue, Column, Spread, Table, one_line
from msae_plugin.evaluation.contexts import TokenContext
from msae_plugin.evaluation.contexts import one_line as visible


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Answer:
    """What the numbers say of one comparison, before any of them."""

    sentences: Sequence[str]  # what to use for what
    basis: Sequence[str] = ()  # what that rests on, and what was not measured


@dataclass(frozen=True)
class Subheading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names with values."""

    rows: Sequence[tuple[str, str]]
    # Heading under which they are closed at first, on the page; empty leaves them open.
    folded: str = ""


HoverPoint = tuple[int, float, float, str]
"""A point that tells its value: series or -1, x and y in the SVG, and the text."""


@dataclass(frozen=True)
class Figure:
    """A drawing."""

    name: str  # file name, and id on the page
    caption: str  # what is drawn, in which units, and what the marks mean
    alt: str  # what a person who does not see it would be told
    png: bytes = field(repr=False)
    svg: str = field(repr=False)  # the same for the page, in its colours
    points: Sequence[HoverPoint] = field(default=(), repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header."""
        return int.from_bytes(self.png[16:20], "big"), int.from_bytes(self.png[20:24], "big")

    @property
    def is_wide(self) -> bool:
        """Whether it takes the width of the page."""
        return self.size[0] > 2 * self.size[1]


@dataclass(frozen=True)
class LatentContexts:
    """A latent and where it fires most."""

    heading: str  # which, how often and how strongly
    contexts: Sequence[TokenContext]


@dataclass(frozen=True)
class Links:
    """Files beside the page."""

    items: Sequence[tuple[str, str]]  # what each is, and where it lies relative to the page


Block = Text | Answer | Subheading | Bullets | Facts | Table | Figure | LatentContexts | Links


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    name: str  # id on the page
    title: str
    blocks: Sequence[Block]  # what it says


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str  # of the page
    lead: str  # one or two sentences under it
    sections: Sequence[Section]
    origin: str  # what made it, for the foot of the page
    files_only: Sequence[Table] = ()  # tables that are written as files and too long for the page

    def __post_init__(self) -> None:
        """Ids are unique, or links and labels would point at the wrong thing."""
        names = [section.name for section in self.sections]
        names += [block.name for block in self.blocks() if isinstance(block, (Table, Figure))]
        names += [table.name for table in self.files_only]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(f"names used twice in the report: {sorted(repeated)}")

    def blocks(self) -> Iterator[Block]:
        """Every block, in order."""
        for section in self.sections:
            yield from section.blocks

    def tables(self) -> list[Table]:
        """Every table on the page, in order."""
        return [block for block in self.blocks() if isinstance(block, Table)]

    def figures(self) -> list[Figure]:
        """Every figure, in order."""
        return [block for block in self.blocks() if isinstance(block, Figure)]

    def answers(self) -> list[Answer]:
        """Every answer, in order."""
        return [block for block in self.blocks() if isinstance(block, Answer)]


_SLUG_LENGTH = 60


def slug(text: str) -> str:
    """Letters, digits and single hyphens: safe as a part of a file name and as an id."""
    short = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"
    if len(short) <= _SLUG_LENGTH:
        return short
    return f"{short[:_SLUG_LENGTH]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


Item = TypeVar("Item")
Cells = tuple[Column, Callable[[Any], CellValue]]


def cell(
    key: str,
    heading: str,
    value: str | Callable[[Any], CellValue] = "",
    detail: str = "",
    **options: Any,
) -> Cells:
    """A column of `table_of`, from an attribute of the items (`key` unless named) or a function.

    A target L0 that is absent is none; anything else was not measured.
    """
    if key == "l0_target":
        options["absent"] = "none"
    read = attrgetter(value or key) if isinstance(value, str) else value
    return Column(key, heading, detail, **options), read


def spread_cell(key: str, heading: str, detail: str = "") -> Cells:
    """A column of means over seeds, of groups that have `spread(key)`."""
    return cell(key, heading, methodcaller("spread", key), detail)


def table_of(
    name: str, caption: str, items: Sequence[Item], cells: Sequence[Cells], *, folded: bool = False
) -> Table:
    """A table with a row per item."""
    rows = [[value(item) for _, value in cells] for item in items]
    return Table(name, caption, [column for column, _ in cells], rows, folded)


@dataclass(frozen=True)
class Cohort:
    """SAEs that may be compared: those of one comparison and hook, or the training runs."""

    title: str = ""  # as headings name it; empty where a report has a single cohort

    def named(self, name: str) -> str:
        """A file name or id that no other cohort has."""
        return f"{slug(self.title)}-{name}" if self.title else name

    def titled(self, heading: str) -> str:
        """A heading that says which cohort it is about."""
        return f"{heading} ({self.title})" if self.title else heading


def cohorts(
    items: Sequence[Item], cohort_of: Callable[[Item], str]
) -> list[tuple[Cohort, list[Item]]]:
    """Items by cohort, in the order of the data."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(cohort_of(item), []).append(item)
    if len(found) < 2:
        return [(Cohort(), members) for members in found.values()]
    return [(Cohort(name or "training runs"), members) for name, members in found.items()]


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
    for y, (row, shown) in enumerate(zip(table.rows, table.shown(), strict=True)):
        yield [
            Cell(
                text,
                _classes(value, text, is_first=not x, is_number=numbers[x])
                + (" best" if (y, x) in table.best else ""),
                _order(value),
            )
            for x, (value, text) in enumerate(zip(row, shown, strict=True))
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


def data_url(figure: Figure) -> str:
    """The picture inside of a page."""
    return f"data:image/png;base64,{base64.b64encode(figure.png).decode('ascii')}"


_TEMPLATES = Environment(
    loader=PackageLoader("msae_plugin.reporting"),
    autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
cast("dict[str, Any]", _TEMPLATES.filters).update(
    breakable=_breakable, cells=_cells, md=one_line, quote=quote,
    kind=_kind, sentences=_sentences, visible=visible,
)  # fmt: skip


def page(document: Document) -> str:
    """The whole page, one self-contained file."""
    return _TEMPLATES.get_template("page.html.j2").render(document=document, asset=asset)


def markdown(document: Document, figures_folder: str) -> str:
    """The report in Markdown, figures linked."""
    template = _TEMPLATES.get_template("report.md.j2")
    return template.render(document=document, figures_folder=figures_folder)
