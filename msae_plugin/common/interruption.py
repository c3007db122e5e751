"""Ctrl-C and SIGTERM that never hit the middle of a step.

SAELens raises from its signal handler wherever the program happens to be, and leaves its handlers
installed. Here a signal takes effect between steps, or at once while the run waits for data; the
handlers that were there before come back on every way out.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedBySignalError(KeyboardInterrupt):
    """A signal asked the run to stop; `checkpoint` was written on the way out, if anything was.

    A KeyboardInterrupt, so that a library's `except Exception` cannot swallow it.
    """

    def __init__(self, signal_number: int, checkpoint: Path | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint

    @property
    def exit_status(self) -> int:
        """Exit status that a shell expects after this signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal_number


class InterruptionGuard:
    """Turns SIGINT and SIGTERM into `InterruptedBySignalError` at safe moments.

    The first signal is noted and raised by the next `check` or inside `interruptible`. A second
    one raises KeyboardInterrupt at once: someone insists. Python delivers signals to the main
    thread only; in any other thread the guard does nothing.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._requested: int | None = None
        self._may_raise = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python: it cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._requested is not None:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}")
        self._requested = number
        if self._may_raise:
            raise InterruptedBySignalError(number)

    @property
    def requested(self) -> int | None:
        """The signal that has arrived, None without one."""
        return self._requested

    def check(self) -> None:
        """Raise InterruptedBySignalError if a signal has arrived."""
        if self._requested is not None:
            raise InterruptedBySignalError(self._requested)

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """Let a signal end the block at once: for waiting, never for changing state."""
        self.check()
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False
