"""A cache holds what the live pass gives, is refused when it is of something else, and survives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import outcome
from safetensors.torch import load_file

from msae_plugin.common.errors import InputError
from msae_plugin.common.interruption import InterruptedBySignalError
from msae_plugin.models.loading import LanguageModel
from msae_plugin.training import passes
from msae_plugin.training.activation_store import CachedActivations, open_cache
from msae_plugin.training.runner import RunResult

Train = Callable[..., RunResult]
Cache = Callable[..., CachedActivations]
HOOK = "blocks.1.hook_resid_post"
MSAE = (
    "sae={preset: default, d_sae: 96, k: 8, normalize_activations: expected_average_only_in, "
    "orthogonality_chunk_size: 16, revival_every: 3, revival_dead_steps: 2}"
)
SHORT = ("training.norm_estimate_batches=4", "training.tokens=1280")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae" / "sae_weights.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_from_the_cache_is_training_from_the_model(
    train: Train, cache: Cache, train_from: Train, tmp_path: Path, accumulation: int
) -> None:
    changes = (MSAE, *SHORT, f"training.accumulation_steps={accumulation}")
    live = train(tmp_path / "live", *changes)
    cache(tmp_path / "cache", *changes)
    cached = train_from(tmp_path / "run", tmp_path / "cache", *changes)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "live")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(cached.activation_samples[HOOK], live.activation_samples[HOOK])
    assert (cached.language_model, cached.heldout) == (None, [])
    assert cached.saes["sae"].cfg.metadata == live.saes["sae"].cfg.metadata
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "live")]
    for key in ("model", "data", "steps", "tokens"):
        assert runs[0][key] == runs[1][key]


def test_a_run_from_the_cache_can_be_resumed(
    cache: Cache, train_from: Train, tmp_path: Path
) -> None:
    folder, out = tmp_path / "cache", tmp_path / "run"
    cache(folder, MSAE, *SHORT)
    train_from(tmp_path / "whole", folder, MSAE, *SHORT, "training.n_checkpoints=1")
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir(), key=lambda p: int(p.name))
    out.mkdir()
    (out / "checkpoints").mkdir()
    checkpoints[0].rename(out / "checkpoints" / checkpoints[0].name)
    (out / "run.json").write_text('{"status": "interrupted"}')
    # The log is ahead of the checkpoint.
    for log in ("metrics.jsonl", "revivals.jsonl"):
        shutil.copy(tmp_path / "whole" / log, out / log)
    train_from(out, folder, MSAE, *SHORT, "training.n_checkpoints=1", resume="auto")
    assert outcome(out) == outcome(tmp_path / "whole")
    run = json.loads((out / "run.json").read_text())
    assert run["resumed_at_steps"] == [int(checkpoints[0].name) // 128]


def test_it_is_kept_in_the_models_precision(cache: Cache, tmp_path: Path) -> None:
    found = cache(tmp_path, "model.autocast=true", *SHORT)
    assert found.tensors[HOOK][:].dtype == torch.float32
    assert found.autocast
    assert found.rows == 1280 + 4 * 128 + 4096
    assert found.tensors[HOOK][:].abs().sum(dim=1).min() > 0


def test_the_model_stops_at_the_last_hook(
    cache: Cache, tmp_path: Path, tiny_language_model: LanguageModel, monkeypatch: Any
) -> None:
    layers: list[Any] = []
    original = tiny_language_model.model.run_with_cache

    def recorded(*args: Any, **kwargs: Any) -> Any:
        layers.append(kwargs.get("stop_at_layer"))
        return original(*args, **kwargs)

    monkeypatch.setattr(tiny_language_model.model, "run_with_cache", recorded)
    cache(tmp_path, *SHORT)
    # The first one asks for the widths of the hooks.
    assert set(layers[1:]) == {2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.context_size=16", r"data.context_size was 32 and the recipe has 16"),
        ("data.prepend_bos=false", r"data.prepend_bos was True"),
        ("data.heldout_documents=10", r"data.heldout_documents was 20"),
        ("model.dtype=bfloat16", r"model.dtype was 'float32'"),
        ("data.source=elsewhere", r"data.source was "),
        ("model.name=gpt2", r"model.name was "),
        ("model.autocast=true", r"made with model.autocast False and the recipe has True"),
        ("hooks=[blocks.0.hook_resid_post]", r"has no hook 'blocks.0.hook_resid_post'"),
        ("training.tokens=2560", r"holds \d+ activations and the recipe needs \d+"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    cache: Cache, train_from: Train, tmp_path: Path, change: str, message: str
) -> None:
    cache(tmp_path / "cache", *SHORT)
    with pytest.raises(InputError, match=message):
        train_from(tmp_path / "out", tmp_path / "cache", *SHORT, change)
    assert not (tmp_path / "out").exists()


def test_text_that_was_changed_is_noticed(
    cache: Cache, train_from: Train, tmp_path: Path, tiny_corpus: Path
) -> None:
    corpus = tmp_path / "notes.jsonl"
    corpus.write_text(tiny_corpus.read_text())
    cache(tmp_path / "cache", *SHORT, f"data.source={corpus}")
    corpus.write_text(tiny_corpus.read_text() + '{"text": "more"}\n')
    with pytest.raises(InputError, match=r"size of data.source was"):
        train_from(tmp_path / "out", tmp_path / "cache", *SHORT, f"data.source={corpus}")


def test_a_killed_pass_goes_on(
    cache: Cache, tmp_path: Path, monkeypatch: Any, killed_after: Any
) -> None:
    whole = cache(tmp_path / "whole", *SHORT)
    folder = tmp_path / "cache"

    def stop(_: Any) -> None:
        raise InterruptedBySignalError(15)

    with killed_after(12):
        cache(folder, *SHORT)
    with pytest.raises(InputError, match="holds an unfinished cache of activations"):
        open_cache(folder)
    with pytest.raises(InputError, match="unfinished cache of other activations"):
        cache(folder, *SHORT, "data.context_size=16")
    # Stopped once more before the first batch: what was saved stays.
    with monkeypatch.context() as patch:
        patch.setattr(passes.InterruptionGuard, "check", stop)
        with pytest.raises(InterruptedBySignalError):
            cache(folder, *SHORT)
    continued = cache(folder, *SHORT)
    rows, expected = continued.tensors[HOOK][:], whole.tensors[HOOK][:]
    assert torch.equal(rows, expected)
    assert sorted(path.name for path in folder.iterdir()) == [f"{HOOK}.bin", "cache.json"]


def test_nothing_is_overwritten(cache: Cache, tmp_path: Path) -> None:
    cache(tmp_path / "cache", *SHORT)
    with pytest.raises(InputError, match="holds a complete cache: train from it with --set"):
        cache(tmp_path / "cache", *SHORT)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty and holds no cache"):
        cache(tmp_path / "other", *SHORT)


def test_a_damaged_file_is_named(cache: Cache, tmp_path: Path) -> None:
    cache(tmp_path, *SHORT)
    path = tmp_path / f"{HOOK}.bin"
    with path.open("r+b") as handle:
        handle.truncate(100)
    with pytest.raises(InputError, match=r"resid_post.bin' is damaged"):
        open_cache(tmp_path)
    with pytest.raises(InputError, match=r"holds no cache of activations: run msae cache"):
        open_cache(tmp_path / "nowhere")
