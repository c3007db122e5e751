"""Progress displays: a live bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typing_extensions import override

logger = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 15.0
WARNING_PREFIX = "warning: "
"""What begins with it stays on the screen."""


class ProgressDisplay:
    """Shows how far a run is; by itself nothing, but warnings are logged: the library's default."""

    def start(self, total_tokens: int, done_tokens: int, names: list[str]) -> None:
        """Training begins (or continues at `done_tokens`)."""

    def message(self, text: str) -> None:
        """Say one thing outside the bar."""
        warnings_alone(text)

    def advance(self, done_tokens: int) -> None:
        """So many tokens are done in all."""

    def metrics(self, name: str, row: Mapping[str, float]) -> None:
        """An SAE has a new log row."""

    def stop(self) -> None:
        """Training has ended, for whatever reason; harmless when called twice."""


def describe_row(row: Mapping[str, float]) -> str:
    """The four numbers to watch, in one short line."""
    parts = [
        f"loss {row['loss']:.4g}",
        f"L0 {row['l0']:.1f}",
        f"explained variance {row['explained_variance']:.3f}",
        f"dead {row['dead_latents']:.0f}",
    ]
    return "  ".join(parts)


class ConsoleProgress(ProgressDisplay):
    """A bar with one line per SAE in a terminal; a line every few seconds anywhere else."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        self._rows: dict[str, str] = {}
        self._total = 0
        self._done_before = 0
        self._started = time.perf_counter()
        self._next_line = 0.0

    @override
    def start(self, total_tokens: int, done_tokens: int, names: list[str]) -> None:
        self._total, self._done_before = total_tokens, done_tokens
        self._rows = dict.fromkeys(names, "")
        self._started = time.perf_counter()
        self._next_line = self._started + PLAIN_LINE_SECONDS
        if self.console.is_terminal:
            self._task = self._bar.add_task(
                "", total=total_tokens, completed=done_tokens, detail="filling the buffer"
            )
            self._live = Live(get_renderable=self._render, console=self.console)
            self._live.start()

    def _render(self) -> Group:
        width = max(map(len, self._rows), default=0)
        lines = [Text(f"  {name:<{width}}  {row}") for name, row in self._rows.items() if row]
        return Group(self._bar, *lines)

    @override
    def message(self, text: str) -> None:
        # Text, not markup: a path with brackets is not a style.
        self.console.print(Text(text), soft_wrap=True)

    @override
    def advance(self, done_tokens: int) -> None:
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        speed = (done_tokens - self._done_before) / elapsed
        detail = f"{done_tokens:,}/{self._total:,} tokens  {speed:,.0f} tokens/s"
        if self._live is not None and self._task is not None:
            self._bar.update(self._task, completed=done_tokens, detail=detail)
            return
        now = time.perf_counter()
        if now >= self._next_line or done_tokens >= self._total:
            self._next_line = now + PLAIN_LINE_SECONDS
            rows = "".join(f" | {name}: {row}" for name, row in self._rows.items() if row)
            self.message(f"{100 * done_tokens / self._total:3.0f} %  {detail}{rows}")

    @override
    def metrics(self, name: str, row: Mapping[str, float]) -> None:
        self._rows[name] = describe_row(row)

    @override
    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class Report(Protocol):
    """Called with what is being done, and how much of it is done."""

    def __call__(self, message: str, done: int | None = None, total: int | None = None) -> None:
        """Show it."""


def warnings_alone(message: str, done: int | None = None, total: int | None = None) -> None:
    """A `Report` that shows nothing, and logs warnings."""
    del done, total
    if message.startswith(WARNING_PREFIX):
        logger.warning(message.removeprefix(WARNING_PREFIX))


@contextmanager
def step_reporter(console: Console) -> Generator[Report]:
    """Show steps whose names and lengths are not known beforehand.

    In a terminal on a line that changes; elsewhere on a line when the message is new, and now and
    then. A warning stays.
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


def training_display(progress: bool | Console) -> ProgressDisplay:
    """The display of a training run: on a console, on standard error (True), or silent (False)."""
    return ConsoleProgress(_console(progress)) if progress else ProgressDisplay()


@contextmanager
def shown_steps(progress: bool | Console) -> Generator[Report]:
    """As `step_reporter`, with the choice of `training_display`."""
    if not progress:
        yield warnings_alone
        return
    with step_reporter(_console(progress)) as report:
        yield report


def _console(progress: bool | Console) -> Console:
    if isinstance(progress, Console):
        return progress
    return Console(stderr=True, highlight=False)
