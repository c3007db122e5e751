"""A whole run on two ranks: one set of files, the same SAE everywhere, signals, and losses."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import outcome
from sae_lens import SAE
from torch import distributed

from msae_plugin.architecture.ranks import ProcessRanks
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.interruption import InterruptedBySignalError
from msae_plugin.training.checkpoints import CheckpointStore
from msae_plugin.training.data_parallel import load_states, own_batch_size
from msae_plugin.training.runner import RunResult

Train = Callable[..., RunResult]
MSAE = "sae={preset: reconstruction, d_sae: 96, k: 8, revival_every: 10, revival_dead_steps: 5}"
FOREVER = ("training.tokens=50_000_000", "logging.every_steps=1", "training.n_checkpoints=20000")
FAILED, INTERRUPTED = 1, 143


def one_rank(train: Train, rank: int, folder: Path, changes: tuple[str, ...], resume: Any) -> None:
    """Train as one of two processes; what happened goes to a file of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store{bool(resume)}", rank=rank, world_size=2
    )
    status, told = 0, {}
    try:
        result = train(folder / "out", *changes, resume=resume, ranks=ProcessRanks())
        told = {
            "exports": list(result.exports),
            "state": {name: sae.state_dict() for name, sae in result.saes.items()},
            "samples": result.activation_samples,
        }
    except RunFailure as failure:
        status, told = FAILED, {"failure": str(failure)}
    except InterruptedBySignalError as interruption:
        status, told = interruption.exit_status, {"checkpoint": interruption.checkpoint}
    torch.save(told, folder / f"rank{rank}.pt")
    os._exit(status)


@pytest.fixture
def start(train: Train, tmp_path: Path) -> Callable[..., list[Any]]:
    def started(*changes: str, resume: str | None = None) -> list[Any]:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=one_rank, args=(train, rank, tmp_path, changes, resume))
            for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        return processes

    return started


def ended(processes: list[Any], folder: Path) -> tuple[list[int], list[dict[str, Any]]]:
    for process in processes:
        process.join(180)
    files = [folder / f"rank{rank}.pt" for rank in (0, 1)]
    told = [torch.load(file, weights_only=False) if file.exists() else {} for file in files]
    return [process.exitcode for process in processes], told


def wait_for_checkpoints(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if folder.exists() and sum(path.name.isdigit() for path in folder.iterdir()) >= 2:
            return
        time.sleep(0.05)
    raise AssertionError("no checkpoint was written")


def test_two_ranks_leave_one_run(start: Any, tmp_path: Path, read_rows: Any) -> None:
    exit_codes, (first, second) = ended(start(MSAE), tmp_path)
    assert exit_codes == [0, 0]
    assert (first["exports"], second["exports"]) == (["sae"], [])
    for name, value in first["state"]["sae"].items():
        assert torch.equal(value, second["state"]["sae"][name]), name
    for hook, rows in first["samples"].items():
        assert torch.equal(rows, second["samples"][hook])
        # Each rank's share of the text is its own.
        assert not torch.equal(rows[:64], rows[64:128])
    out = tmp_path / "out"
    log = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in log] == [5, 10, 15, 20, 25, 30]
    assert [row["tokens"] for row in log] == [128 * row["step"] for row in log]
    run = json.loads((out / "run.json").read_text())
    assert (run["status"], run["processes"], run["tokens"]) == ("complete", 2, 3840)
    exported = SAE.load_from_disk(out / "sae")
    assert exported.cfg.metadata.l0 == pytest.approx(8, rel=0.02)
    written = json.loads((out / "sae" / "runner_cfg.json").read_text())
    assert written["train_batch_size_tokens"] == 128
    checkpoint = next((out / "checkpoints").iterdir())
    states = load_states(checkpoint)
    # Each rank has its own buffer, and its own place in its share of the text.
    assert not torch.equal(states[0]["batches"]["rows"][:64], states[1]["batches"]["rows"][:64])


@pytest.mark.promise(
    "Resuming is exact: a run that is stopped at any moment and resumed ends with the "
    "bits of the uninterrupted one."
)
def test_two_ranks_go_on_to_the_bit(start: Any, tmp_path: Path) -> None:
    changes = (MSAE, "training.n_checkpoints=3", "training.keep_checkpoints=9")
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert ended(start(*changes), tmp_path)[0] == [0, 0]
    shutil.copytree(out, whole)
    # As a kill of both at the second checkpoint, after two more log rows, leaves it.
    for path in sorted((out / "checkpoints").iterdir(), key=lambda path: int(path.name))[2:]:
        shutil.rmtree(path)
    for name in ("sae", "jumprelu", "export.json"):
        remove = shutil.rmtree if (out / name).is_dir() else Path.unlink
        remove(out / name)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "running"}))
    assert ended(start(*changes, resume="auto"), tmp_path)[0] == [0, 0]
    assert outcome(out) == outcome(whole)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    start: Any, tmp_path: Path, read_rows: Any
) -> None:
    processes = start(MSAE, *FOREVER)
    out = tmp_path / "out"
    wait_for_checkpoints(out / "checkpoints")
    os.kill(processes[1].pid, signal.SIGTERM)
    exit_codes, (first, second) = ended(processes, tmp_path)
    assert exit_codes == [INTERRUPTED, INTERRUPTED]
    newest = CheckpointStore(out / "checkpoints", keep=2).newest()
    assert newest is not None
    assert first["checkpoint"] == second["checkpoint"] == newest.path
    assert read_rows(out / "metrics.jsonl")[-1]["step"] == newest.step
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"

    processes = start(MSAE, *FOREVER, resume="auto")
    deadline = time.monotonic() + 120
    while read_rows(out / "metrics.jsonl")[-1]["step"] < newest.step + 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(processes[0].pid, signal.SIGTERM)
    exit_codes, _ = ended(processes, tmp_path)
    assert exit_codes == [INTERRUPTED, INTERRUPTED]
    steps = [row["step"] for row in read_rows(out / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_rank_that_dies_ends_the_run_with_one_line(start: Any, tmp_path: Path) -> None:
    processes = start(MSAE, *FOREVER)
    wait_for_checkpoints(tmp_path / "out" / "checkpoints")
    os.kill(processes[1].pid, signal.SIGKILL)
    exit_codes, (first, _) = ended(processes, tmp_path)
    assert exit_codes == [FAILED, -signal.SIGKILL]
    message = first["failure"]
    assert message.startswith("rank 0 of 2 has lost another rank")
    assert "the last good checkpoint is" in message
    assert "\n" not in message
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


def test_divergence_is_one_failure_of_all(start: Any, tmp_path: Path) -> None:
    exit_codes, (first, second) = ended(start("training.lr=1e30"), tmp_path)
    assert exit_codes == [FAILED, FAILED]
    assert first["failure"] == second["failure"]
    assert "lower the learning rate" in first["failure"]


class _Three:
    rank, count = 0, 3


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch_size_tokens = 128 cannot be shared by 3"):
        own_batch_size(128, _Three())  # type: ignore[arg-type]
