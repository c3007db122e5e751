"""SAEBench's core at the end of a comparison, through the real `evaluate`."""

import copy
from pathlib import Path
from typing import Any

import pytest

from msae_plugin.comparison.compare import compare
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.models.loading import LanguageModel

pytest.importorskip("sae_bench")


def test_core_of_a_comparison(
    language_model_recipe: dict[str, Any],
    tiny_language_model: LanguageModel,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    recipe = copy.deepcopy(language_model_recipe) | {
        "saes": {
            "lista": {"peer": "lista_matryoshka"},
            "ours": {"preset": "default"},
            "permuted": {"control": "permuted_decoder of ours"},
            "stream": {"control": "residual_stream"},
        },
        "evaluation": {
            "model": {"dtype": "float32", "device": "cpu"},
            "cache": str(tmp_path / "cache"),
            "evaluations": {
                "core": {
                    "dataset": str(tiny_corpus),
                    "context_size": 32,
                    "batch_size_prompts": 4,
                    "n_eval_reconstruction_batches": 2,
                    "n_eval_sparsity_variance_batches": 2,
                    "exclude_special_tokens_from_reconstruction": True,
                }
            },
        },
    }
    output = tmp_path / "out"
    comparison = compare(
        CompareConfig.from_dict(recipe), output, language_model=tiny_language_model
    )
    assert comparison.contents is not None
    assert comparison.contents["not_measured"] == []
    assert comparison.complete
    rows = {row["name"]: row["metrics"] for row in comparison.contents["rows"]}
    assert (output / "evaluation" / "summary.json").is_file()
    for name, metrics in rows.items():
        assert 0 < metrics["core/l0"] <= 64, name
    assert rows["stream"]["core/ce_loss_score"] > 0.99
    ours, permuted = rows["ours_l0-6_seed0"], rows["permuted_l0-6_seed0"]
    assert ours["core/l0"] == permuted["core/l0"]
    definitions = comparison.contents["definitions"]
    assert definitions["core/ce_loss_score"]["definition"]
