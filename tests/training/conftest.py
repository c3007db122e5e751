"""A recipe on the tiny model that trains in about a second, and its text."""

import json
from pathlib import Path
from typing import Any

import pytest

from msae_plugin.training.text_data import TextData, load_text

TINY_HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    return path


@pytest.fixture
def tiny_text(tiny_corpus: Path) -> TextData:
    return load_text(str(tiny_corpus), heldout_documents=20)


@pytest.fixture
def recipe(tiny_model_dir: Path, tiny_corpus: Path) -> dict[str, Any]:
    """30 steps of one `standard` SAE; tests change what they are about."""
    return {
        "model": {"name": str(tiny_model_dir), "device": "cpu"},
        "data": {"source": str(tiny_corpus), "context_size": 32, "heldout_documents": 20},
        "hooks": [TINY_HOOK],
        "sae": {"architecture": "standard", "d_sae": 96, "l1_coefficient": 0.1},
        "training": {
            "tokens": 30 * 128,
            "batch_size_tokens": 128,
            "lr": 1e-3,
            "n_batches_in_buffer": 16,
            "store_batch_size_prompts": 8,
            "calibrate_batches": 4,
            "dead_feature_window": 10,
            "seed": 7,
        },
        "logging": {"every_steps": 5, "tensorboard": "off"},
    }
