"""Real signals to real processes.

Processes are forked from this one, which has everything imported: starting Python anew for each
would take ten seconds. `tests/test_cli.py` does that once.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.training.checkpoints import CheckpointStore
from msae_plugin.training.runner import RunResult

Train = Callable[..., RunResult]
FOREVER = ("training.tokens=50_000_000", "logging.every_steps=1", "training.n_checkpoints=20000")


def train_until_stopped(train: Train, out: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        train(Path(out), *FOREVER)
    except InterruptedBySignalError as interruption:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        restored = handlers == [signal.default_int_handler, signal.SIG_DFL]
        os._exit(interruption.exit_status if restored else 1)


def stop(train: Train, out: Path, number: int) -> int:
    """Start a run, send it a signal once it has written two checkpoints, return its status."""
    process = multiprocessing.get_context("fork").Process(
        target=train_until_stopped, args=(train, str(out))
    )
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 30
    folder = out / "checkpoints"
    while time.monotonic() < deadline:
        if folder.exists() and sum(path.name.isdigit() for path in folder.iterdir()) >= 2:
            break
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(30)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the signal did not end the run")
    return process.exitcode


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_stopped_run_can_be_continued(
    train: Train, tmp_path: Path, number: int, status: int, read_rows: Any
) -> None:
    out = tmp_path / "out"
    assert stop(train, out, number) == status
    newest = CheckpointStore(out / "checkpoints", keep=2).newest()
    assert newest is not None
    if number != signal.SIGKILL:  # Which may leave half a line.
        # The checkpoint is of the very step at which the run stopped.
        log = read_rows(out / "metrics.jsonl")
        assert log[-1]["step"] == newest.step
        assert json.loads((out / "run.json").read_text())["status"] == "interrupted"

    with pytest.raises(InterruptedBySignalError) as caught, stop_soon():
        train(out, *FOREVER, resume="auto")
    assert caught.value.checkpoint is not None
    steps = [row["step"] for row in read_rows(out / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > newest.step


class stop_soon:  # noqa: N801 - reads as a statement
    """Interrupt this process, by a real signal, two seconds from now."""

    def __enter__(self) -> None:
        self._timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def test_a_signal_waits_for_the_end_of_a_step() -> None:
    done = False
    with InterruptionGuard() as guard:
        os.kill(os.getpid(), signal.SIGINT)
        done = True
        with pytest.raises(InterruptedBySignalError) as caught:
            guard.check()
    assert done
    assert caught.value.exit_status == 130
    assert str(caught.value) == "stopped by SIGINT"


def test_a_signal_ends_waiting_at_once() -> None:
    with InterruptionGuard() as guard:
        started = time.monotonic()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(InterruptedBySignalError) as caught, guard.interruptible():
            time.sleep(20)
        assert time.monotonic() - started < 2
    assert caught.value.exit_status == 143


def test_a_library_that_swallows_exceptions_cannot_swallow_it() -> None:
    def load_data(guard: InterruptionGuard) -> None:
        with guard.interruptible():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except Exception:  # noqa: BLE001 - what data loaders do
                pass

    with InterruptionGuard() as guard, pytest.raises(InterruptedBySignalError):
        load_data(guard)


def test_a_second_signal_insists() -> None:
    with InterruptionGuard():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="second SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_previous_handlers_come_back(error: type[BaseException] | None) -> None:
    def mine(*_: object) -> None:
        pass

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, mine)
    try:
        try:
            with InterruptionGuard():
                assert signal.getsignal(signal.SIGTERM) is not mine
                if error is not None:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_the_guard_does_nothing() -> None:
    seen: list[object] = []

    def body() -> None:
        with InterruptionGuard() as guard:
            guard.check()
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]
