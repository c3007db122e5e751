"""Progress displays: a live bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import functools
import io
import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

import tqdm.std
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
NOTEBOOK_LINE_SECONDS = 1.0
NARROW = 80
"""Columns below which a display abbreviates."""
SHORT_BAR_SECONDS = 1.0
"""Bars of libraries that are done by then are not told of."""
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


def describe_row(row: Mapping[str, float], short: bool = False) -> str:
    """The four numbers to watch, in one short line."""
    parts = [
        f"loss {row['loss']:.4g}",
        f"L0 {row['l0']:.1f}",
        f"{'EV' if short else 'explained variance'} {row['explained_variance']:.3f}",
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
            BarColumn(bar_width=24 if console.width >= NARROW else 4),
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
        self._print = _printer(console)

    @override
    def start(self, total_tokens: int, done_tokens: int, names: list[str]) -> None:
        self._total, self._done_before = total_tokens, done_tokens
        self._rows = dict.fromkeys(names, "")
        self._started = time.perf_counter()
        self._next_line = self._started + _line_seconds(self.console)
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
        detail = f"{done_tokens:,}/{self._total:,}  {speed:,.0f} tokens/s"
        if self._live is not None and self._task is not None:
            self._bar.update(self._task, completed=done_tokens, detail=detail)
            return
        now = time.perf_counter()
        if now >= self._next_line or done_tokens >= self._total:
            self._next_line = now + _line_seconds(self.console)
            rows = "".join(f" | {name}: {row}" for name, row in self._rows.items() if row)
            self._print(f"{100 * done_tokens / self._total:3.0f} %  {detail}{rows}")

    @override
    def metrics(self, name: str, row: Mapping[str, float]) -> None:
        self._rows[name] = describe_row(row, short=self.console.width < NARROW)

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

            with bars_of_libraries_told(update):
                yield update
        return
    lines = _plain_lines(console)
    with bars_of_libraries_told(lines):
        yield lines


def _printer(console: Console) -> Callable[[str], None]:
    """Print a line; in a notebook it takes the place of the one before."""
    if not console.is_jupyter:
        return lambda text: console.print(Text(text), soft_wrap=True)
    # A dependency of notebooks, not of this package.
    display: Any = import_module("IPython.display").display
    place: Any = None

    def replace(text: str) -> None:
        nonlocal place
        if place is None:
            place = display({"text/plain": text}, raw=True, display_id=True)
        else:
            place.update({"text/plain": text}, raw=True)

    return replace


def _line_seconds(console: Console) -> float:
    return NOTEBOOK_LINE_SECONDS if console.is_jupyter else PLAIN_LINE_SECONDS


def _plain_lines(console: Console) -> Report:
    last, next_line, print_line = "", 0.0, _printer(console)

    def lines(message: str, done: int | None = None, total: int | None = None) -> None:
        nonlocal last, next_line
        now = time.perf_counter()
        if message.startswith(WARNING_PREFIX):
            console.print(Text(message), soft_wrap=True)
            return
        if message == last and now < next_line:
            return
        last, next_line = message, now + _line_seconds(console)
        print_line(message if done is None or total is None else f"{message} {done}/{total}")

    return lines


@contextmanager
def bars_of_libraries_told(tell: Report) -> Generator[None]:
    """Tell how far libraries' tqdm bars are, which would be drawn over the display otherwise."""
    bars: Any = tqdm.std.tqdm
    start = bars.__init__
    before = {name: vars(bars)[name] for name in ("__init__", "display")}

    @functools.wraps(start)
    def not_drawn(bar: Any, *arguments: Any, **options: Any) -> None:
        # Notebooks' bars draw themselves. None stands for "off outside of a terminal".
        draws_itself = type(bar).display is not told
        options["disable"] = bool(options.get("disable")) or draws_itself
        start(bar, *arguments, **{**options, "file": io.StringIO()})

    def told(bar: Any, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG001
        started = getattr(bar, "start_t", None)  # not yet set where a bar is drawn first
        if started is not None and time.time() - started > SHORT_BAR_SECONDS:
            tell((bar.desc or "working").removesuffix(": "), bar.n, bar.total)

    bars.__init__, bars.display = not_drawn, told
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(bars, name, value)


@contextmanager
def training_display(progress: bool | Console) -> Generator[ProgressDisplay]:
    """The display of a training run: on a console, on standard error (True), or silent (False)."""
    if not progress:
        yield ProgressDisplay()
        return
    console = _console(progress)
    shown = ConsoleProgress(console)
    try:
        with bars_of_libraries_told(_plain_lines(console)):
            yield shown
    finally:
        shown.stop()


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
