"""One table of results, shown as HTML, Markdown, CSV or in a terminal; how its numbers are written.

Values stay unrounded until they are shown. Names are data: no rendering reads markup in them.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Spread:
    """A metric over seeds."""

    mean: float
    # Sample standard deviation (n - 1); None for a single value, which has no spread
    std: float | None
    n: int  # Number of values


def spread(values: Iterable[float]) -> Spread:
    """Mean and sample standard deviation of at least one value."""
    listed = list(values)
    if not listed:
        raise ValueError("a spread needs at least one value")
    deviation = statistics.stdev(listed) if len(listed) > 1 else None
    return Spread(statistics.fmean(listed), deviation, len(listed))


def digits_for(values: Sequence[float]) -> int:
    """Decimal places that suit a column of values; the same for all, so that they line up."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    if not finite or all(value == round(value) for value in finite):
        return 0
    largest = max(finite)
    for bound, digits in ((1000, 0), (100, 1), (10, 2), (1, 3), (0.1, 4)):
        if largest >= bound:
            return digits
    return min(12, 2 - math.floor(math.log10(largest)))


def digits_for_difference(values: Sequence[float]) -> int:
    """Decimal places that leave two or three significant digits of the largest."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 0 if largest >= 100 or largest == 0 else min(12, 2 - math.floor(math.log10(largest)))


def number(value: float | None, digits: int) -> str:
    """A number with so many decimal places; `not measured` for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    text = f"{abs(value):,.{digits}f}"
    # No minus in front of nothing but zeros.
    return f"−{text}" if value < 0 and any(c in "123456789" for c in text) else text


def signed(value: float, digits: int) -> str:
    """A number with its sign."""
    text = number(value, digits)
    return text if text.startswith("−") or value <= 0 else f"+{text}"


def mean_and_std(value: Spread, digits: int) -> str:
    """`mean ± std`; the mean alone for a single value."""
    mean = number(value.mean, digits)
    return mean if value.std is None else f"{mean} ± {number(value.std, digits)}"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows literally, also inside a table."""
    return re.sub(r"[\\`*_\[\]<>|#]", r"\\\g<0>", text)


def one_line(text: str) -> str:
    """The words of a text, single spaces between them, escaped for Markdown."""
    return escape_markdown(" ".join(text.split()))


def markdown_rows(
    headings: Sequence[str], numbers: Sequence[bool], rows: Iterable[Sequence[str]]
) -> str:
    """A Markdown table of cells that are Markdown already; columns of numbers to the right."""
    lines = [headings, *rows]
    shown = [f"| {' | '.join(line)} |" for line in lines]
    shown.insert(1, f"|{'|'.join('---:' if right else '---' for right in numbers)}|")
    return "\n".join(shown)


_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")


def csv_cell(value: object) -> object:
    """A value as a CSV file holds it.

    A spreadsheet executes text that begins with =, +, - or @, of full width too; an apostrophe
    before it says that it is text. Numbers are left as they are, also those that are text already.
    """
    if not isinstance(value, str) or not _FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


CellValue = str | float | int | Spread | None


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str
    heading: str  # Shown above it
    detail: str = ""  # Unit or direction, in small type under the heading
    signed: bool = False  # Numbers carry their sign: differences
    digits: int | None = None  # Decimal places; None chooses those that suit all values
    absent: str = NOT_MEASURED  # Shown in place of None
    is_number: bool | None = None  # Aligned to the right; None leaves it to the values


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first column names the row."""

    name: str  # File name, and id on a page
    caption: str  # One sentence, or several
    columns: Sequence[Column]  # As many as each row has values. The first names the row
    # Text, numbers, means with spreads, or None for what was not measured
    rows: Sequence[Sequence[CellValue]]
    folded: bool = False  # Closed at first, on a page
    # Row and column of the cells to mark: the best of their column, and shown to be
    best: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        """Every row has a value per column."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name}: {len(row)} values, not {len(self.columns)}")

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers."""
        declared = self.columns[column].is_number
        if declared is not None:
            return declared
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and not any(isinstance(value, str) for value in values)

    def numbers(self) -> list[bool]:
        """`is_number` of every column."""
        return [self.is_number(column) for column in range(len(self.columns))]

    def shown(self) -> list[list[str]]:
        """All cells as text, the numbers of a column with the same decimal places."""
        places = [self._digits(column) for column in range(len(self.columns))]
        return [
            [
                column.absent if value is None else _shown(value, digits, column.signed)
                for value, digits, column in zip(row, places, self.columns, strict=True)
            ]
            for row in self.rows
        ]

    def _digits(self, column: int) -> int:
        given = self.columns[column].digits
        if given is not None:
            return given
        values: list[float] = []
        for row in self.rows:
            value = row[column]
            if isinstance(value, Spread):
                values += [value.mean] if value.std is None else [value.mean, value.std]
            elif isinstance(value, (int, float)):
                values.append(value)
        return digits_for(values)

    def markdown(self) -> str:
        """The table without its caption."""
        headings = [
            one_line(column.heading) + (f" ({one_line(column.detail)})" if column.detail else "")
            for column in self.columns
        ]
        cells = [[one_line(cell) for cell in row] for row in self.shown()]
        for row, column in self.best:
            cells[row][column] = f"**{cells[row][column]}**"
        return markdown_rows(headings, self.numbers(), cells)

    def csv(self) -> str:
        """All values unrounded; the spread and count of a mean in columns of their own."""
        spreads = [
            any(isinstance(row[place], Spread) for row in self.rows)
            for place in range(len(self.columns))
        ]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        header: list[str] = []
        for column, has_spread in zip(self.columns, spreads, strict=True):
            key = column.key
            header += [key, f"{key} std", f"{key} n"] if has_spread else [key]
        writer.writerow(map(csv_cell, header))
        for row in self.rows:
            cells: list[object] = []
            for value, has_spread in zip(row, spreads, strict=True):
                if isinstance(value, Spread):
                    cells += [value.mean, value.std, value.n]
                else:
                    cells += [value, None, None] if has_spread else [value]
            writer.writerow(map(csv_cell, cells))  # None is an empty cell
        return stream.getvalue()

    def terminal(self, *, title: str | Text | None = None, dense: bool = False) -> RichTable:
        """For a terminal, names as they are; `dense` leaves one space between columns."""
        padding = (0, 0, 0, 1) if dense else (0, 1)
        table = RichTable(
            title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=padding
        )
        for place, column in enumerate(self.columns):
            right = self.is_number(place)
            table.add_column(
                Text(column.heading),
                justify="right" if right else "left",
                overflow="fold",
                no_wrap=right and dense,
            )
        for y, row in enumerate(self.shown()):
            marks = ("bold" if (y, x) in self.best else "" for x in range(len(row)))
            table.add_row(*(Text(cell, style) for cell, style in zip(row, marks, strict=True)))
        return table


def _shown(value: str | float | Spread, digits: int, with_sign: bool) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Spread):
        return mean_and_std(value, digits)
    return signed(value, digits) if with_sign else number(value, digits)
