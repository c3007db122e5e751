"""Where the command line writes: results on standard output, everything else on standard error."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from importlib import import_module

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from typing_extensions import override

from msae_plugin.common.interruption import InterruptedBySignalError

# What would move the cursor, colour the line or turn it round stands as a symbol, and so do halves
# of characters, which no terminal takes: names come from files that others wrote.
_TURNING = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_HALVES = range(0xD800, 0xE000)
_SYMBOLS = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10)},
    **dict.fromkeys((*_TURNING, *_HALVES), 0xFFFD),
    127: 0x2421,
}


class Terminal(Console):
    """Prints text as text."""

    @override
    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(segment.text.translate(_SYMBOLS), segment.style)


errors = Terminal(stderr=True, highlight=False)
results = Terminal(highlight=False)
_quiet = False


def be_quiet() -> None:
    """Show no progress from here on."""
    global _quiet  # noqa: PLW0603 - one process, one command line
    _quiet = True


def progress() -> Console | bool:
    """Where a command shows its progress, as the functions of `msae_plugin.api` take it."""
    return not _quiet and errors


def import_first(*modules: str) -> None:
    """Import what a command needs, and say so meanwhile on a terminal.

    SAELens and torch take eight seconds of processor time.
    """
    waits = errors.is_terminal and not _quiet
    with errors.status("loading SAELens and torch") if waits else nullcontext():
        for module in modules:
            import_module(module)


def other_rank() -> str | None:
    """Number of this process when torchrun started several and it is not the first one."""
    rank = os.environ.get("RANK", "0")
    return None if rank == "0" or "TORCHELASTIC_RUN_ID" not in os.environ else rank


def say(message: str) -> None:
    """Print one line on standard error, whatever characters are in it."""
    rank = other_rank()
    line = " ".join(message.splitlines())
    errors.print(Text(f"rank {rank}: {line}" if rank else line), soft_wrap=True)


def show(line: str) -> None:
    """Print one line on standard output, whatever characters are in it."""
    results.print(Text(line), soft_wrap=True)


@contextmanager
def continued_later(advice: str = "the same command continues from here") -> Generator[None]:
    """Turn a signal that stopped the work into one line and its exit status."""
    try:
        yield
    except InterruptedBySignalError as interruption:
        say(f"{interruption}; {advice}")
        raise typer.Exit(interruption.exit_status) from interruption
