"""The contents of a report, free of how they look: sections, tables, figures, contexts.

Methods of two comparisons may share their names and target L0s without having anything in common:
sections on weights and logs are made place by place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from msae_plugin.common.table import Table


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


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


@dataclass(frozen=True)
class Figure:
    """A drawing."""

    name: str  # file name, and id on the page
    caption: str  # what is drawn, in which units, and what the marks mean
    alt: str  # what a person who does not see it would be told
    png: bytes = field(repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header."""
        return int.from_bytes(self.png[16:20], "big"), int.from_bytes(self.png[20:24], "big")


@dataclass(frozen=True)
class Context:
    """An activating token with the words around it."""

    before: str
    token: str
    after: str
    activation: float


@dataclass(frozen=True)
class LatentContexts:
    """A latent and where it fires most."""

    heading: str  # which, how often and how strongly
    contexts: Sequence[Context]


@dataclass(frozen=True)
class Links:
    """Files beside the page."""

    items: Sequence[tuple[str, str]]  # what each is, and where it lies relative to the page


Block = Text | Subheading | Bullets | Facts | Table | Figure | LatentContexts | Links


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


def slug(text: str) -> str:
    """Letters, digits and single hyphens: safe as a file name and as an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


Item = TypeVar("Item")


@dataclass(frozen=True)
class Place:
    """Origin of some SAEs of a report."""

    title: str = ""  # as headings name it; empty where a report has a single place

    def named(self, name: str) -> str:
        """A file name or id that no other place has."""
        return f"{slug(self.title)}-{name}" if self.title else name

    def titled(self, heading: str) -> str:
        """A heading that says which place it is about."""
        return f"{heading} ({self.title})" if self.title else heading


def places(
    items: Sequence[Item], place_of: Callable[[Item], str]
) -> list[tuple[Place, list[Item]]]:
    """Items by place, in the order of the data."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(place_of(item), []).append(item)
    if len(found) < 2:
        return [(Place(), members) for members in found.values()]
    return [(Place(name or "training runs"), members) for name, members in found.items()]
