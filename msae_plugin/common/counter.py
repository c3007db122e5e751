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
WARNING_PREFIX = "warning: "


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


class Report(Protocol):
    """Called with what is being done, and how much of it is done."""

    def __call__(self, message: str, done: int | None = None, total: int | None = None) -> None:
        """Show it."""
        ...


@contextmanager
def step_reporter(console: Console) -> Generator[Report]:
    """Show steps whose names and lengths are not known beforehand.

    Args:
        console: Where to show them: a line that changes in a terminal, elsewhere a line when the
            message is new and now and then. A warning stays.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)

            def update(message: str, done: int | None = None, total: int | None = None) -> None:
                if message.startswith(WARNING_PREFIX):
                    bar.console.print(Text(message), soft_wrap=True)
                    return
                bar.update(task, description=message, total=total, completed=done or 0)

            yield update
        return
    last, next_line = "", 0.0

    def lines(message: str, done: int | None = None, total: int | None = None) -> None:
        nonlocal last, next_line
        now = time.perf_counter()
        if message == last and now < next_line:
            return
        last, next_line = message, now + PLAIN_LINE_SECONDS
        count = "" if done is None or total is None else f" {done}/{total}"
        console.print(Text(message + count), soft_wrap=True)

    yield lines
