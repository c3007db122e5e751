"""The loopback Hub, a process that uses it, and a trained run to publish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_process import Worker
from hub_server import HubServer

from msae_plugin.common.files import file_sha256
from msae_plugin.data.text import load_text
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.runner import MultiScaleRunner


@pytest.fixture(scope="session")
def _hub_and_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Worker]]:
    with HubServer() as hub:
        worker = Worker(hub, tmp_path_factory.mktemp("hub"))
        yield hub, worker
        worker.stop()


@pytest.fixture
def hub(_hub_and_worker: tuple[HubServer, Worker]) -> Iterator[HubServer]:
    """An empty Hub."""
    hub = _hub_and_worker[0]
    hub.reset()
    yield hub
    assert hub.leaked_tokens == [], "a token was sent to the storage host"


@pytest.fixture
def worker(_hub_and_worker: tuple[HubServer, Worker]) -> Worker:
    return _hub_and_worker[1]


TINY_HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tiny_language_model, tiny_texts) -> Path:
    """A finished run with a multiscale SAE and a batchtopk SAE; do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = folder / "notes.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    shared = {"d_sae": 96, "k": 6}
    recipe = {
        "model": {"name": tiny_language_model.model_name, "device": "cpu"},
        "data": {"source": str(corpus), "context_size": 32, "heldout_documents": 20},
        "hooks": [TINY_HOOK],
        "saes": {
            "multiscale": {"architecture": "multiscale", **shared},
            "batchtopk": {"architecture": "batchtopk", **shared},
        },
        "training": {
            "tokens": 20 * 128,
            "batch_size_tokens": 128,
            "lr": 3e-3,
            "n_batches_in_buffer": 16,
            "store_batch_size_prompts": 8,
            "calibrate_batches": 4,
            "dead_feature_window": 10,
            "seed": 7,
        },
        "logging": {"every_steps": 5, "tensorboard": "off"},
    }
    MultiScaleRunner(
        RunConfig.from_dict(recipe),
        folder / "run",
        language_model=tiny_language_model,
        text=load_text(str(corpus), heldout_documents=20),
    ).run()
    (folder / "run" / "comparison.png").write_bytes(b"\x89PNG\r\n\x1a\n figure")
    return folder / "run"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may break."""
    return shutil.copytree(trained_run, tmp_path / "run")


def summary_of(*saes: Path, evaluations: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """A summary.json by hand: core with three seeds, and whatever else is given."""
    names = {sae.parent.name: file_sha256(sae / "sae_weights.safetensors") for sae in saes}
    values = {"l0": 6.01, "ce_loss_score": 0.91, "mse": 3.5}
    per_seed = {
        metric: {"42": value, "43": value * 1.1, "44": value * 0.9}
        for metric, value in values.items()
    }
    core = {
        "evaluation": "core",
        "status": "measured",
        "reason": None,
        "seeds": [42, 43, 44],
        "metrics": {
            metric: {"mean": values[metric], "std": 0.1 * values[metric], "per_seed": seeds}
            for metric, seeds in per_seed.items()
        },
    }
    failed = {
        "evaluation": "ravel",
        "status": "failed",
        "reason": "the data set is gated",
        "seeds": [42],
        "metrics": {},
        "files": [],
    }
    results = [
        {"sae": name, **row, "files": row.get("files", [f"core/seed_42/{name}_eval_results.json"])}
        for name in names
        for row in (core, failed, *(evaluations or {}).values())
    ]
    return {
        "format": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {"sae-bench": "0.6.0", "sae-lens": "6.54.12"},
        "model": {"name": "/data/models/tiny", "dtype": "float32", "device": "cpu"},
        "seeds": [42, 43, 44],
        "config": {
            "evaluations": {
                "core": {"dataset": "stanfordnlp/imdb", "context_size": 32},
                "ravel": {},
                **{name: {} for name in evaluations or {}},
            },
            "cache": "/data/cache",
        },
        "saes": {
            name: {
                "reference": f"/data/runs/{name}",
                "weights_sha256": sha256,
                "architecture": "jumprelu",
                "hook_name": TINY_HOOK,
                "model_name": "/data/models/tiny",
                "d_in": 64,
                "d_sae": 96,
            }
            for name, sha256 in names.items()
        },
        "results": results,
        "metrics": {
            "core/l0": {"definition": "active latents per token", "unit": "latents",
                        "tokens": "without BOS", "source": "saebench", "higher_is_better": None},
            "core/ce_loss_score": {"definition": "share of the loss recovered", "unit": "share",
                                   "tokens": "without BOS", "source": "saebench",
                                   "higher_is_better": True},
            "core/mse": {"definition": "mean squared error", "unit": "", "tokens": "",
                         "source": "saebench", "higher_is_better": False},
        },
    }  # fmt: skip


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., Path]:
    """Write an evaluation folder for exports."""

    def write(*saes: Path, **options: Any) -> Path:
        folder = tmp_path / "evaluation"
        summary = summary_of(*saes, **options)
        for row in summary["results"]:
            for name in row["files"]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text('{"eval_type_id": "core", "unsorted": 1,  "spaces": 2}')
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return write
