import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import outcome

from msae_plugin.common.claims import claimed_output
from msae_plugin.common.errors import InputError
from msae_plugin.common.interruption import InterruptedBySignalError
from msae_plugin.saes.run_record import read_run_record
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.runner import RunResult, is_complete
from msae_plugin.training.trainer import LockstepTrainer

Train = Callable[..., RunResult]
ReadRows = Callable[[Path], list[dict[str, Any]]]

# A schedule with warm-up and decay, a warming-up coefficient, and checkpoints on the way.
LONG = (
    "training.lr_warm_up_steps=10",
    "training.lr_decay_steps=10",
    "training.n_checkpoints=5",
    "training.keep_checkpoints=9",
    "sae.l1_warm_up_steps=25",
)


@contextmanager
def signal_after(step: int, number: int = signal.SIGINT) -> Iterator[None]:
    """Send this process a real signal once the trainer has done so many steps."""
    one_step = LockstepTrainer._one_step

    def counted(self: LockstepTrainer) -> None:
        one_step(self)
        if self.n_training_steps == step:
            os.kill(os.getpid(), number)

    LockstepTrainer._one_step = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        LockstepTrainer._one_step = one_step  # type: ignore[method-assign]


def interrupt(train: Train, out: Path, step: int, *overrides: str) -> Path:
    with signal_after(step), pytest.raises(InterruptedBySignalError) as caught:
        train(out, *overrides)
    assert caught.value.checkpoint is not None
    return caught.value.checkpoint


def test_an_interrupted_run_continues_where_it_was(
    train: Train, tmp_path: Path, read_rows: ReadRows
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(whole, *LONG)
    checkpoint = interrupt(train, out, 13, *LONG)
    assert checkpoint == out / "checkpoints" / str(13 * 128)
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"

    train(out, *LONG, resume="auto")
    expected, resumed = read_rows(whole / "metrics.jsonl"), read_rows(out / "metrics.jsonl")
    # No step twice, none missing; schedules and coefficients as if nothing had happened.
    for key in ("step", "tokens", "lr", "coefficients/l1"):
        assert [row[key] for row in resumed] == [row[key] for row in expected]
    assert outcome(out) == outcome(whole)
    # Each threshold fired once: 30 steps, five checkpoints on the way, one at the end, one by hand.
    names = sorted(int(path.name) // 128 for path in (out / "checkpoints").iterdir())
    assert names == [6, 11, 13, 16, 21, 26, 30]
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "complete"
    assert run["resumed_at_steps"] == [13]
    assert (out / "sae" / "cfg.json").exists()


def test_rows_and_events_after_the_checkpoint_are_dropped(
    train: Train, tmp_path: Path, read_rows: ReadRows
) -> None:
    # A kill between two checkpoints: the log is ahead of the newest one.
    out = tmp_path / "out"
    overrides = ("sae=null", "saes.m={d_sae: 96, k: 8}")
    interrupt(train, out, 13, *overrides)
    log = out / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 15, "loss": 99.0}\n{"step": 20, "lo')
    revivals = out / "revivals.jsonl"
    revivals.write_text('{"logged_at_step": 12, "kept": 1}\n{"logged_at_step": 14}\n')
    train(out, *overrides, resume="auto")
    assert [row["step"] for row in read_rows(log)] == [5, 10, 15, 20, 25, 30]
    assert all(row["loss"] != 99.0 for row in read_rows(log))
    events = [json.loads(line) for line in revivals.read_text().splitlines()]
    assert events[0] == {"logged_at_step": 12, "kept": 1}
    assert {"logged_at_step": 14} not in events


CHUNKS = (
    "sae={preset: default, d_sae: 96, k: 8, orthogonality_chunk_size: 16, "
    "revival_every: 4, revival_dead_steps: 2}"
)
# Gradients of the first steps are above the threshold: the rule has lowered the rate before a stop.
RULE = "training.gradient_lr={enabled: true, threshold: 1.0, recovery: 1.001}"
SEVERAL = (
    "sae=null",
    "saes.m={d_sae: 96, k: 8, orthogonality_chunk_size: 16}",
    "saes.j={architecture: jumprelu, d_sae: 64, jumprelu_init_threshold: 0.1}",
    "saes.g={architecture: gated, d_sae: 64, normalize_activations: expected_average_only_in}",
    "saes.b={architecture: batchtopk, d_sae: 64, k: 8, input_normalization: first_batch}",
    "hooks=[blocks.0.hook_resid_post,blocks.1.hook_resid_post]",
    "training.norm_estimate_batches=3",
)


@pytest.mark.promise(
    "Resuming is exact: a run that is stopped at any moment and resumed ends with the "
    "bits of the uninterrupted one."
)
@pytest.mark.parametrize(
    "changes",
    [
        (CHUNKS, RULE, "training.weight_decay=0.01", "training.accumulation_steps=2"),
        (CHUNKS, "training.lr_scheduler=cosineannealing", "training.feature_sampling_window=7"),
        ("training.store_batch_size_prompts=7", "training.n_batches_in_buffer=5"),
        SEVERAL,
    ],
    ids=["accumulated", "scheduled", "uneven", "several"],
)
@pytest.mark.parametrize("step", [4, 9])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    train: Train, tmp_path: Path, changes: tuple[str, ...], step: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(whole, *changes, "training.tokens=2560")
    # The state that it goes on from is its own, whatever was drawn meanwhile.
    interrupt(train, out, step, *changes, "training.tokens=2560")
    torch.rand(3)
    train(out, *changes, "training.tokens=2560", resume="auto")
    assert outcome(out) == outcome(whole)


def test_auto_starts_a_new_run_in_a_new_folder(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "out", "training.tokens=640", resume="auto")
    assert (tmp_path / "out" / "sae" / "cfg.json").exists()


def test_a_stop_while_exporting_loses_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_rows: ReadRows
) -> None:
    from msae_plugin.training import session

    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise InterruptedBySignalError(signal.SIGTERM)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(session, "export_sae", stop)
        with pytest.raises(InterruptedBySignalError) as caught:
            train(out)
    assert caught.value.checkpoint == out / "checkpoints" / str(30 * 128)
    before = read_rows(out / "metrics.jsonl")
    result = train(out, resume="auto")
    # Nothing was left to train: the same log, the same weights, now exported.
    assert read_rows(out / "metrics.jsonl") == before
    assert result.tokens_per_second == {}
    assert (out / "sae" / "cfg.json").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "complete"


@pytest.mark.promise(
    "No checkpoint is lost: a kill at any moment leaves the one before, and damaged ones "
    "are named and passed by."
)
@pytest.mark.parametrize("damage", ["one bit", "zeros", "manifest"])
def test_a_damaged_checkpoint_is_passed_by_for_the_one_before(
    train: Train, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(whole, *LONG)
    interrupt(train, out, 13, *LONG)
    newest = out / "checkpoints" / str(13 * 128)
    path = newest / ("checkpoint.json" if damage == "manifest" else "sae/sae_weights.safetensors")
    contents = bytearray(path.read_bytes())
    if damage == "zeros":
        contents[-20_000:] = bytes(20_000)
    elif damage == "manifest":
        contents = contents.replace(b'"lr": 0.001', b'"lr": 0.003')
    else:
        contents[-1000] ^= 1
    path.write_bytes(contents)
    with pytest.raises(InputError, match="is damaged") as caught:
        train(out, *LONG, resume=str(newest))
    assert str(path) in str(caught.value)
    train(out, *LONG, resume="auto")
    assert str(path) in caplog.text
    assert outcome(out) == outcome(whole)
    assert json.loads((out / "run.json").read_text())["resumed_at_steps"] == [11]
    assert not newest.exists()


def test_a_checkpoint_is_written_by_the_clock(train: Train, tmp_path: Path) -> None:
    out, keep = tmp_path / "out", "training.keep_checkpoints=99"
    train(out, "training.checkpoint_minutes=1e-9", keep)
    assert len(list((out / "checkpoints").iterdir())) == 30
    train(tmp_path / "off", "training.checkpoint_minutes=null", keep)
    train(tmp_path / "seldom", keep)
    for name in ("off", "seldom"):
        assert len(list((tmp_path / name / "checkpoints").iterdir())) == 1
    assert (
        outcome(out)["sae/sae_weights.safetensors"]
        == (outcome(tmp_path / "off")["sae/sae_weights.safetensors"])
    )


@pytest.mark.promise("A run that has died is never called running.")
@pytest.mark.parametrize("failure", [MemoryError("no room"), OSError("the disk is gone")])
def test_a_run_that_died_does_not_say_running(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def die(self: LockstepTrainer) -> None:
        raise failure

    monkeypatch.setattr(LockstepTrainer, "_one_step", die)
    with pytest.raises(type(failure)):
        train(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["failure"] == f"{type(failure).__name__}: {failure}"
    # Killed: nobody wrote anything. Its claim is of a process that has ended.
    (tmp_path / "out" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    stored = read_run_record(tmp_path / "out")
    assert stored is not None
    assert stored["status"] == "interrupted"
    with claimed_output(tmp_path / "out"):
        stored = read_run_record(tmp_path / "out")
        assert stored is not None
        assert stored["status"] == "running"


def test_what_a_killed_run_left_is_cleared(train: Train, stopped_run: Path) -> None:
    left = [stopped_run, stopped_run / "checkpoints", stopped_run / "checkpoints" / "384" / "sae"]
    for folder in left:
        (folder / ".incomplete-dead-x").mkdir()
        (folder / ".incomplete-dead-x" / "y").touch()
    train(stopped_run, resume="auto")
    assert not list(stopped_run.rglob(".incomplete-*"))


def test_a_complete_run_is_known(train: Train, tmp_path: Path, recipe: dict[str, Any]) -> None:
    config = RunConfig.from_dict(recipe)
    assert not is_complete(tmp_path / "out", config)
    train(tmp_path / "out")
    assert is_complete(tmp_path / "out", config)
    with pytest.raises(InputError, match=r"'training.seed' was 7 and is now 8"):
        is_complete(tmp_path / "out", RunConfig.from_dict(recipe, ["training.seed=8"]))


def test_a_complete_run_is_not_resumed(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "out", "training.tokens=640")
    with pytest.raises(InputError, match="complete: there is nothing to resume"):
        train(tmp_path / "out", "training.tokens=640", resume="auto")
    with pytest.raises(InputError, match="is not empty: choose another --output"):
        train(tmp_path / "out", "training.tokens=640")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lr=0.5", r"'training\.lr' was 0\.001 and is now 0\.5"),
        ("sae.d_sae=64", r"'sae\.d_sae' was 96 and is now 64"),
        ("training.seed=8", r"'training\.seed' was 7"),
        ("hooks=[blocks.0.hook_resid_post]", r"'hooks' was"),
    ],
)
def test_another_recipe_is_refused(
    train: Train, stopped_run: Path, override: str, expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        train(stopped_run, override, resume="auto")


@pytest.fixture
def stopped_run(train: Train, tmp_path: Path) -> Path:
    interrupt(train, tmp_path / "stopped", 3)
    return tmp_path / "stopped"


def test_logging_and_checkpointing_may_change(train: Train, stopped_run: Path) -> None:
    train(stopped_run, "logging.every_steps=10", "training.keep_checkpoints=1", resume="auto")
    assert (stopped_run / "sae").exists()


@pytest.mark.promise(
    "No checkpoint is lost: a kill at any moment leaves the one before, and damaged ones "
    "are named and passed by."
)
@pytest.mark.parametrize("file", ["sae/sae_weights.safetensors", "sae/trainer_state.pt"])
def test_a_scrambled_checkpoint_of_the_right_size_is_refused(
    train: Train, stopped_run: Path, file: str
) -> None:
    path = stopped_run / "checkpoints" / str(3 * 128) / file
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(InputError, match=r"is damaged") as caught:
        train(stopped_run, resume="auto")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_run_can_be_continued_elsewhere(
    train: Train, stopped_run: Path, tmp_path: Path, read_rows: ReadRows
) -> None:
    train(tmp_path / "fork", resume=str(stopped_run / "checkpoints" / str(3 * 128)))
    assert [row["step"] for row in read_rows(tmp_path / "fork" / "metrics.jsonl")][-1] == 30
