"""Progress counted in tokens: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_LINE_SECONDS = 15.0


class Advance(Protocol):
    """Called with the number of tokens done since the last call."""

    def __call__(self, tokens: int, /) -> None:
        """Count them."""
        ...


@contextmanager
def token_counter(console: Console, title: str, total: int) -> Generator[Advance]:
    """Show how many of `total` tokens are done while the block runs.

    Args:
        console: Where to show it.
        title: What is done with the tokens.
        total: All of them.
    """
    if console.is_terminal:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total)
            yield lambda tokens: bar.update(task, advance=tokens)
        return
    console.print(Text(title), soft_wrap=True)
    done, next_line = 0, time.perf_counter() + PLAIN_LINE_SECONDS

    def advance(tokens: int) -> None:
        nonlocal done, next_line
        done += tokens
        if time.perf_counter() >= next_line:
            next_line = time.perf_counter() + PLAIN_LINE_SECONDS
            console.print(f"{100 * done / total:3.0f} %  {done:,}/{total:,} tokens")

    yield advance
