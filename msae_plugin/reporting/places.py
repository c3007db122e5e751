"""SAEs that are shown together: those of one comparison and hook, or of all training runs.

Methods of two comparisons may share their names and target L0s without having anything in common:
sections on weights and logs are made place by place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from msae_plugin.reporting.document import slug

Item = TypeVar("Item")


@dataclass(frozen=True)
class Place:
    """Where some SAEs of a report are from.

    Args:
        title: As headings name it; empty where a report has a single place.
    """

    title: str = ""

    def named(self, name: str) -> str:
        """A file name or id that no other place has."""
        return f"{slug(self.title)}-{name}" if self.title else name

    def titled(self, heading: str) -> str:
        """A heading that says which place it is about."""
        return f"{heading} ({self.title})" if self.title else heading


def places(
    items: Sequence[Item], place_of: Callable[[Item], str]
) -> list[tuple[Place, list[Item]]]:
    """Items by place, in the order of the data.

    Args:
        items: SAEs, or what is known of them.
        place_of: Gives an item's place; empty for training runs.
    """
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(place_of(item), []).append(item)
    if len(found) < 2:
        return [(Place(), members) for members in found.values()]
    return [(Place(name or "training runs"), members) for name, members in found.items()]
