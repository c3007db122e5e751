"""Where the command line writes: results on standard output, everything else on standard error."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

errors = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def say(message: str) -> None:
    """Print one line on standard error, whatever characters are in it."""
    errors.print(Text(" ".join(message.splitlines())), soft_wrap=True)
