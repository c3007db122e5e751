"""What a person sees while a run trains: a live bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_LINE_SECONDS = 15.0


class ProgressDisplay(Protocol):
    """Shows how far a run is."""

    def start(self, total_tokens: int, done_tokens: int, names: list[str]) -> None:
        """Training begins (or continues at `done_tokens`)."""
        ...

    def message(self, text: str) -> None:
        """Say one thing outside the bar."""
        ...

    def advance(self, done_tokens: int) -> None:
        """So many tokens are done in all."""
        ...

    def metrics(self, name: str, row: Mapping[str, float]) -> None:
        """An SAE has a new log row."""
        ...

    def stop(self) -> None:
        """Training has ended, for whatever reason; harmless when called twice."""
        ...


class SilentProgress:
    """Shows nothing: the default of the library."""

    def start(self, total_tokens: int, done_tokens: int, names: list[str]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def advance(self, done_tokens: int) -> None:
        """Nothing."""

    def metrics(self, name: str, row: Mapping[str, float]) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


def describe_row(row: Mapping[str, float]) -> str:
    """The four numbers to watch, in one short line."""
    parts = [
        f"loss {row['loss']:.4g}",
        f"L0 {row['l0']:.1f}",
        f"explained variance {row['explained_variance']:.3f}",
        f"dead {row['dead_latents']:.0f}",
    ]
    return "  ".join(parts)


class ConsoleProgress:
    """A bar with one line per SAE in a terminal; a line every few seconds anywhere else.

    Args:
        console: Where to show it; standard error leaves standard output to results.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._lines: dict[str, TaskID] = {}
        self._rows: dict[str, str] = {}
        self._total = 0
        self._started_at = 0
        self._start = time.perf_counter()
        self._next_line = 0.0

    def start(self, total_tokens: int, done_tokens: int, names: list[str]) -> None:
        """Show the bar."""
        self._total, self._started_at = total_tokens, done_tokens
        self._start = time.perf_counter()
        self._next_line = self._start + PLAIN_LINE_SECONDS
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar = self._progress.add_task(
            "training", total=total_tokens, completed=done_tokens, detail=""
        )
        self._progress.start()

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        # Text, not markup: a path with brackets is not a style.
        self.console.print(Text(text), soft_wrap=True)

    def advance(self, done_tokens: int) -> None:
        """Move the bar, or print a line when one is due."""
        detail = (
            f"{done_tokens:,}/{self._total:,} tokens  {self._tokens_per_second(done_tokens):,.0f}/s"
        )
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=done_tokens, detail=detail)
            return
        now = time.perf_counter()
        if now >= self._next_line or done_tokens >= self._total:
            self._next_line = now + PLAIN_LINE_SECONDS
            rows = "".join(f" | {name}: {row}" for name, row in self._rows.items())
            self.message(f"{100 * done_tokens / self._total:3.0f} %  {detail}{rows}")

    def _tokens_per_second(self, done_tokens: int) -> float:
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        return (done_tokens - self._started_at) / elapsed

    def metrics(self, name: str, row: Mapping[str, float]) -> None:
        """Refresh the SAE's line."""
        self._rows[name] = describe_row(row)
        if self._progress is None:
            return
        text = f"  {name}: {self._rows[name]}"
        if name not in self._lines:
            self._lines[name] = self._progress.add_task(text, total=None, detail="", start=False)
        self._progress.update(self._lines[name], description=text)

    def stop(self) -> None:
        """Leave the last state on the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
