"""What an evaluation lacks, found before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Missing:
    """Something an evaluation needs and does not have.

    Args:
        what: What is missing, and which setting asks for it.
        how: How to get it.
    """

    what: str
    how: str
