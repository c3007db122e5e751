"""The two kinds of failure a user of the package can meet.

Every message is one line that says what is wrong, where, and what to do. The command line turns
[`InputError`][msae_plugin.common.errors.InputError] into exit status 2 and
[`RunFailure`][msae_plugin.common.errors.RunFailure] into exit status 1 (docs/cli.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

_SHOWN_DIGITS, _SHOWN_CHARACTERS = 20, 200


class InputError(ValueError):
    """The user's input cannot work: a wrong field, file, shape or name.

    Args:
        what: What is wrong, and where.
        how: What to do about it, behind a colon in the message; None where `what` says all.
    """

    def __init__(self, what: str, how: str | None = None) -> None:
        super().__init__(what if how is None else f"{what}: {how}")
        self.what = what
        self.how = how


class MissingInputError(InputError):
    """Several things that are needed are not there.

    Args:
        items: Each of them and how to get it, one line each.
        advice: What can be done at once.

    Attributes:
        items: As given.
        summary: How many, and the advice: what follows the items where each has a line of its own.
    """

    def __init__(self, items: Sequence[str], advice: str) -> None:
        self.items = tuple(items)
        count = "1 thing is" if len(self.items) == 1 else f"{len(self.items)} things are"
        self.summary = f"{count} missing; {advice}"
        super().__init__(f"not everything is there ({'; '.join(self.items)}); {advice}")


class RunFailure(RuntimeError):
    """The input was fine, yet the run could not finish or its result is not valid."""


def shown(value: object) -> str:
    """A value as a message shows it: in short form where its own is long."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_DIGITS:
        return f"{Decimal(value):.3e}"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def in_one_line(error: BaseException) -> str:
    """An error of ours as it is, any other by its type and first line."""
    ours = isinstance(error, (InputError, RunFailure))
    return str(error) if ours else f"{type(error).__name__}: {first_line(error)}"


@dataclass(frozen=True)
class Problem:
    """Something an evaluation needs and does not have."""

    what: str  # is missing, and which setting asks for it
    how: str  # to get it
    evaluation: str = "all"  # that needs it, or every one
    sae: str | None = None  # whose fault alone it is

    @classmethod
    def of(cls, error: InputError, otherwise: str) -> Problem:
        """A refusal as a problem; `otherwise` is what to do where the refusal does not say."""
        return cls(" ".join(error.what.split()), error.how or otherwise)

    def __str__(self) -> str:
        return f"{self.evaluation}: {self.what} - {self.how}"
