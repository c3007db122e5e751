"""Recipes of comparisons that train in seconds: a tiny ground truth, the tiny language model."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def ground_truth_recipe() -> dict[str, Any]:
    """40 steps on 48 features in 16 dimensions; tests add what they compare."""
    return {
        "synthetic": {
            "model": {
                "num_features": 48,
                "hidden_dim": 16,
                "seed": 3,
                "bias": 0.5,
                "firing_probability": {
                    "generator_name": "zipfian",
                    "exponent": 0.5,
                    "max_prob": 0.3,
                    "min_prob": 0.01,
                },
                "mean_firing_magnitudes": 4.0,
                "std_firing_magnitudes": 0.5,
            },
            "eval_samples": 2000,
            "eval_batch_size": 500,
            "device": "cpu",
        },
        "training": {
            "tokens": 40 * 128,
            "batch_size_tokens": 128,
            "lr": 4e-3,
            "calibrate_batches": 4,
            "dead_feature_window": 10,
            "norm_estimate_batches": 4,
        },
        "common": {"d_sae": 24},
        "l0": [3],
        "log_every_steps": 10,
    }


@pytest.fixture
def language_model_recipe(tiny_model_dir: Path, tiny_corpus: Path) -> dict[str, Any]:
    """20 steps on the tiny model; tests add what they compare."""
    return {
        "model": {"name": str(tiny_model_dir), "device": "cpu"},
        "data": {"source": str(tiny_corpus), "context_size": 32, "heldout_documents": 20},
        "hooks": ["blocks.1.hook_resid_post"],
        "training": {
            "tokens": 20 * 128,
            "batch_size_tokens": 128,
            "lr": 4e-3,
            "n_batches_in_buffer": 16,
            "store_batch_size_prompts": 8,
            "calibrate_batches": 4,
            "dead_feature_window": 10,
            "norm_estimate_batches": 4,
        },
        "common": {"d_sae": 96},
        "l0": [6],
        "heldout": {"tokens": 1024, "loss_tokens": 512, "contexts": 2},
        "log_every_steps": 5,
    }
