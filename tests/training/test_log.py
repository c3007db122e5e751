import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepOutput

from msae_plugin.common.errors import InputError
from msae_plugin.saes.run_record import read_rows
from msae_plugin.training import log as metrics_log
from msae_plugin.training.log import (
    JsonLines,
    JsonLinesSink,
    TensorBoardSink,
    TrainingWindow,
    WandbSink,
    scalar,
    tensorboard_wanted,
)


def step_output(sae_in: torch.Tensor, sae_out: torch.Tensor, latents: torch.Tensor) -> Any:
    loss = (sae_in - sae_out).pow(2).sum(-1).mean()
    return TrainStepOutput(
        sae_in=sae_in,
        sae_out=sae_out,
        feature_acts=latents,
        hidden_pre=latents,
        loss=loss,
        losses={"mse_loss": loss},
    )


def test_window_means_are_over_all_tokens_of_unequal_batches() -> None:
    torch.manual_seed(0)
    # A large common mean: per-batch and streaming explained variance differ a lot.
    parts = [torch.randn(n, 6) + torch.randn(6) * 5 for n in (10, 30, 7)]
    outs = [part + 0.3 * torch.randn_like(part) for part in parts]
    latents = [(torch.rand(len(part), 4) > 0.5).float() for part in parts]
    window = TrainingWindow()
    for part, out, acts in zip(parts, outs, latents, strict=True):
        window.add(step_output(part, out, acts), acts.sum())
    row = window.read()

    x, y, acts = torch.cat(parts).double(), torch.cat(outs).double(), torch.cat(latents)
    squared_error = (x - y).pow(2).sum(-1)
    variance = (x - x.mean(0)).pow(2).sum(-1).mean()
    assert row["explained_variance"] == pytest.approx(float(1 - squared_error.mean() / variance))
    assert row["loss"] == pytest.approx(float(squared_error.mean()), rel=1e-5)
    assert row["losses/mse_loss"] == row["loss"]
    assert row["l0"] == pytest.approx(float(acts.sum(-1).mean()))


def test_an_empty_window_reads_as_nothing() -> None:
    assert TrainingWindow().read() == {}


@pytest.mark.parametrize(
    "value", [2, 2.0, torch.tensor(2.0), torch.tensor([1.0, 3.0]), lambda: torch.tensor(2)]
)
def test_every_form_of_metric_that_saelens_allows_becomes_a_number(value: Any) -> None:
    assert scalar(value) == 2.0


def test_rows_after_the_resumed_step_and_a_line_cut_short_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (5, 10, 15)]
    path.write_text("\n".join(rows) + '\n{"step": 20, "lo')
    log = JsonLines(path)
    assert log.truncate_after(10) == 2
    log.append({"step": 15, "loss": float("nan")})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15]
    # Strict JSON has no NaN.
    assert lines[-1]["loss"] is None
    assert read_rows(path) == lines


@pytest.mark.parametrize("damage", [b"\xd6\xeb\x00", b"[" * 100_000, b"{", b'{"loss": 1}'])
def test_a_damaged_line_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    first, last = b'{"step": 5}\n', b'{"step": 15}\n'
    path.write_bytes(first + damage + b"\n" + last)
    assert JsonLines(path).truncate_after(20) == 1
    assert path.read_bytes() == first + last
    assert "metrics.jsonl is damaged: line 2 is left out" in caplog.text


@pytest.mark.parametrize(
    ("steps", "lost"), [((4, 8, 12), False), ((4, 12), True), ((4, 8), True), ((), True)]
)
def test_a_resumed_log_that_lost_rows_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: tuple[int, ...], lost: bool
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    JsonLinesSink({"a": tmp_path}, resume_step=13, every_steps=4)
    assert ("has lost rows before step 13" in caplog.text) == lost


def test_truncating_leaves_a_good_file_untouched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    before = path.stat().st_mtime_ns
    assert JsonLines(path).truncate_after(5) == 0
    assert path.stat().st_mtime_ns == before


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "absent.jsonl") == []


def test_each_sae_has_its_own_file(tmp_path: Path) -> None:
    sink = JsonLinesSink({"a": tmp_path / "a", "b": tmp_path})
    sink.write("a", {"step": 1, "loss": 2.0})
    sink.write("b", {"step": 1, "loss": 3.0})
    sink.close()
    assert read_rows(tmp_path / "a" / "metrics.jsonl")[-1]["loss"] == 2.0
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["loss"] == 3.0


def test_tensorboard_files_hold_the_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, ["a"])
    sink.write("a", {"step": 3, "loss": 2.5})
    sink.close()
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    [event] = events.Scalars("loss")
    assert (event.step, event.value) == (3, 2.5)


@pytest.mark.parametrize("client", ["wandb", "trackio"])
def test_clients_get_names_like_saelens(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = types.ModuleType(client)
    fake.__spec__ = importlib.machinery.ModuleSpec(client, None)
    for name in ("init", "log", "finish"):
        setattr(fake, name, lambda *a, _name=name, **k: calls.append((_name, a, k)))
    monkeypatch.setitem(sys.modules, client, fake)
    sink = WandbSink({"project": "p"}, {"training": 1}, client)
    sink.write("a", {"step": 3, "loss": 2.5})
    sink.close()
    assert calls == [
        ("init", (), {"resume": "allow", "project": "p", "config": {"training": 1}}),
        ("log", ({"a/loss": 2.5},), {"step": 3}),
        ("finish", (), {}),
    ]


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_log.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"logging.trackio is set .*: pip install trackio"):
        WandbSink({}, {}, "trackio")


def test_tensorboard_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tensorboard_wanted("auto")
    assert not tensorboard_wanted("off")
    monkeypatch.setattr(metrics_log.importlib.util, "find_spec", lambda _: None)
    assert not tensorboard_wanted("auto")
    with pytest.raises(InputError, match=r"pip install tensorboard"):
        tensorboard_wanted("on")
