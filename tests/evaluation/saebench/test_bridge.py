"""SAEBench with TransformerLens' bridge in the place of its older class."""

import inspect
import json
from pathlib import Path

import pytest
from sae_bench.evals.unlearning.utils import metrics as unlearning_metrics

from msae_plugin.common.errors import MissingInputError
from msae_plugin.evaluation.evaluate import evaluate
from msae_plugin.evaluation.recipe import EvalConfig
from msae_plugin.models.loading import LanguageModel, load_language_model
from msae_plugin.saes.load import EvaluatedSAE

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def bridge(tiny_model_dir: Path) -> LanguageModel:
    return load_language_model(str(tiny_model_dir), [HOOK], loader="TransformerBridge")


def test_core_has_the_numbers_of_a_hooked_transformer(
    tiny_language_model: LanguageModel,
    bridge: LanguageModel,
    subjects: list[EvaluatedSAE],
    text_file: Path,
    tmp_path: Path,
) -> None:
    core = {
        "dataset": str(text_file),
        "context_size": 32,
        "batch_size_prompts": 4,
        "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 2,
    }
    values = {
        "model": {"device": "cpu"},
        "evaluations": {"core": core, "unlearning": {}},
        "cache": str(tmp_path / "cache"),
    }
    config = EvalConfig.from_dict(values)
    with pytest.raises(MissingInputError, match="unlearning: a HookedTransformer, which SAEBench"):
        evaluate(config, subjects, tmp_path / "refused", language_model=bridge)
    measured = {}
    for model in (tiny_language_model, bridge):
        if model is tiny_language_model:
            config = EvalConfig.from_dict({**values, "evaluations": {"core": core}})
        else:
            config = EvalConfig.from_dict(values)
        output = tmp_path / model.loader
        evaluate(config, subjects, output, language_model=model, skip_missing=True)
        results = json.loads((output / "summary.json").read_text())["results"]
        assert {r["status"] for r in results if r["evaluation"] == "core"} == {"measured"}
        assert {r["status"] for r in results if r["evaluation"] != "core"} <= {"skipped"}
        measured[model.loader] = {
            (r["sae"], name): value["mean"] for r in results for name, value in r["metrics"].items()
        }
    one, other = measured.values()
    assert len(one) > 40
    for name, value in one.items():
        # SAEBench rounds some to three digits, and a latent at its threshold may fall either way.
        assert other[name] == pytest.approx(value, rel=2e-3, abs=2e-3), name


def test_what_saebench_refuses() -> None:
    """When this fails, SAEBench may take a bridge: `bridge: false` in evaluations.yaml can go."""
    source = inspect.getsource(unlearning_metrics)
    assert "isinstance(model, HookedTransformer)" in source
    assert "get_output_probs_abcd_hf" in source
