"""A comparison on a tiny ground truth, end to end, against SAELens called directly."""

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import outcome
from sae_lens import SAE
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig, eval_sae_on_synthetic_data
from tolerance import rounding_tolerance

from msae_plugin import InputError, RunFailure
from msae_plugin.architecture import presets
from msae_plugin.architecture.peers import PEERS, batchtopk_section
from msae_plugin.architecture.presets import preset_names
from msae_plugin.common.interruption import InterruptedBySignalError
from msae_plugin.common.seeding import RandomStream, derive_seed
from msae_plugin.comparison import group_training
from msae_plugin.comparison.compare import Comparison, compare
from msae_plugin.comparison.ground_truth import SyntheticSource
from msae_plugin.comparison.methods import expand, plan_entry
from msae_plugin.comparison.recipe import SYNTHETIC_HOOK, CompareConfig
from msae_plugin.comparison.results import Measured, comparison_contents
from msae_plugin.comparison.training_schedule import Shard, missing_entries, refuse_mixtures
from msae_plugin.saes.find import read_checkpoint
from msae_plugin.training.plans import build_sae
from msae_plugin.training.trainer import LockstepTrainer

BATCHTOPK = {"architecture": "batchtopk"}


def rows_of(comparison: Comparison) -> dict[str, dict[str, Any]]:
    assert comparison.contents is not None
    return {row["name"]: row for row in comparison.contents["rows"]}


def weights(output: Path, name: str) -> dict[str, torch.Tensor]:
    return SAE.load_from_disk(output / "saes" / name / "sae").state_dict()


@pytest.fixture
def run(ground_truth_recipe: dict[str, Any]) -> Callable[..., Comparison]:
    def compared(output: Path, shard: Shard | None = None, **changes: Any) -> Comparison:
        config = CompareConfig.from_dict(copy.deepcopy(ground_truth_recipe) | changes)
        return compare(config, output, shard=shard)

    return compared


def test_a_whole_comparison(
    run: Callable[..., Comparison], ground_truth_recipe: dict[str, Any], tmp_path: Path
) -> None:
    saes = {
        "batchtopk": BATCHTOPK,
        "ours": {"preset": "default", "lr": 2e-3},
        "standard": {
            "architecture": "standard",
            "normalize_activations": "expected_average_only_in",
        },
        "jumprelu": {
            "architecture": "jumprelu",
            "normalize_activations": "expected_average_only_in",
        },
        "whitened": {"peer": "whitened_batchtopk"},
        "lista": {"peer": "lista_matryoshka"},
        "run10": {"preset": "source-run-10", "zscore_z_lr": 0.02},
        "frozen": {"control": "frozen_decoder"},
        "permuted": {"control": "permuted_decoder of batchtopk"},
    }
    search = {"tokens": 20 * 128, "max_trials": 5, "corrections": 1}
    comparison = run(tmp_path, saes=saes, seeds=[0, 1], search=search)
    rows = rows_of(comparison)
    assert comparison.complete
    assert json.loads((tmp_path / "comparison.json").read_text()) == comparison.contents
    assert len(rows) == 2 * len(saes)

    # Every trained row was trained, and is where it says.
    for name, row in rows.items():
        if row["method"] == "permuted":
            assert row["control"]
            assert row["training_steps"] is None
            continue
        steps = 10 if row["method"] == "run10" else 40
        assert row["training_steps"] == steps, name
        assert row["training_tokens"] == 40 * 128
        assert row["seconds"] > 0
        assert (tmp_path / row["folder"] / "sae" / "cfg.json").is_file()
        told = json.loads((tmp_path / row["folder"] / "sae" / "runner_cfg.json").read_text())
        assert told["lr"] == row["lr"]
        assert told["sae"]["metadata"]["training_steps"] == steps
        assert told["train_batch_size_tokens"] * told["accumulation_steps"] * steps == 40 * 128
        logged = (tmp_path / row["folder"] / "metrics.jsonl").read_text().splitlines()
        assert json.loads(logged[-1])["step"] == steps
        assert row["metrics"]["training/final_loss"] == json.loads(logged[-1])["loss"]
    assert rows["frozen_l0-3_seed0"]["control"]
    assert rows["ours_l0-3_seed0"]["lr"] == 2e-3
    assert rows["batchtopk_l0-3_seed0"]["lr"] == 4e-3
    assert set(comparison.contents["definitions"]) == {  # type: ignore[index]
        name for row in rows.values() for name in row["metrics"]
    }

    # L0 is matched wherever there is a cut, on samples that were not used for it.
    for row in rows.values():
        if row["method"] != "standard" and row["training_steps"]:
            assert row["l0_matched"], row["name"]
            assert row["metrics"]["ground_truth/l0"] == pytest.approx(3, rel=0.12), row["name"]

    # The search is paid for: its file's trials, shared by both seeds.
    trials = json.loads((tmp_path / "search" / "standard_l0-3.json").read_text())["trials"]
    assert 0 < len([t for t in trials if not t["whole"]]) <= 5
    for seed in (0, 1):
        row = rows[f"standard_l0-3_seed{seed}"]
        assert row["search_tokens"] == sum(trial["tokens"] for trial in trials)
        assert row["coefficient"] == rows["standard_l0-3_seed0"]["coefficient"]
        assert row["search_tokens"] >= 20 * 128
    assert rows["batchtopk_l0-3_seed0"]["search_tokens"] == 0

    # Metrics are SAELens' own.
    model = SyntheticModel(
        SyntheticModelConfig.from_dict(copy.deepcopy(ground_truth_recipe["synthetic"]["model"]))
    )
    for name in ("ours_l0-3_seed1", "lista_l0-3_seed0"):
        stream = RandomStream(
            derive_seed(42, "ground truth", "evaluation", str(rows[name]["seed"]))
        )
        with stream.active():
            found = eval_sae_on_synthetic_data(
                SAE.load_from_disk(tmp_path / "saes" / name / "sae"),
                model.feature_dict,
                model.activation_generator,
                num_samples=2000,
                batch_size=500,
            )
        metrics = rows[name]["metrics"]
        assert metrics["ground_truth/f1"] == pytest.approx(found.classification.f1_score)
        assert metrics["ground_truth/mcc"] == pytest.approx(found.mcc)
        assert metrics["ground_truth/explained_variance"] == pytest.approx(found.explained_variance)
        again = RandomStream(derive_seed(42, "ground truth", "evaluation", str(rows[name]["seed"])))
        with again.active(), torch.no_grad():
            features = torch.cat([model.activation_generator.sample(500) for _ in range(4)])
            sae = SAE.load_from_disk(tmp_path / "saes" / name / "sae")
            rates = (sae.encode(model.feature_dict(features)) != 0).double().mean(0)
        dense = float(rates[rates > 0.1].sum() / rates.sum())
        assert dense > 0
        assert metrics["ground_truth/dense_share"] == pytest.approx(dense)

    # A frozen decoder keeps the directions it was born with.
    config = CompareConfig.from_dict(comparison.contents["config"])  # type: ignore[index]
    (entry,) = [
        e for e in expand(config, {SYNTHETIC_HOOK: 16}).entries if e.name == "frozen_l0-3_seed1"
    ]
    born = build_sae(plan_entry(entry, config, 16, coefficient=None), 1, "cpu").W_dec.detach()
    kept = weights(tmp_path, entry.name)["W_dec"]
    torch.testing.assert_close(kept, torch.nn.functional.normalize(born, dim=1))

    # Made or trained, all rows stand in one table.
    assert {row["hook"] for row in rows.values()} == {None}
    # A permuted decoder has the latents of its SAE, and other directions.
    real, permuted = (rows[f"{name}_l0-3_seed0"]["metrics"] for name in ("batchtopk", "permuted"))
    assert permuted["ground_truth/l0"] == real["ground_truth/l0"]
    assert permuted["ground_truth/explained_variance"] < real["ground_truth/explained_variance"]
    # The mean over 48 features of cosines in 16 dimensions: two norms and a product.
    assert permuted["ground_truth/mcc"] == pytest.approx(
        real["ground_truth/mcc"], abs=rounding_tolerance(3 * 16 + 48, 1.0)
    )


def test_what_is_there_is_not_trained_again_and_more_can_be_added(
    run: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rows_of(run(tmp_path, saes={"a": BATCHTOPK}))
    trained: list[list[str]] = []
    fit = LockstepTrainer.fit

    def counted(self: LockstepTrainer) -> Any:
        trained.append(list(self.saes))
        return fit(self)

    monkeypatch.setattr(LockstepTrainer, "fit", counted)
    assert rows_of(run(tmp_path, saes={"a": BATCHTOPK})) == first
    assert trained == []
    more = rows_of(run(tmp_path, saes={"b": {"preset": "default"}, "a": BATCHTOPK}, seeds=[0, 1]))
    assert sorted(name for names in trained for name in names) == [
        "a_l0-3_seed1",
        "b_l0-3_seed0",
        "b_l0-3_seed1",
    ]
    assert more["a_l0-3_seed0"] == first["a_l0-3_seed0"]
    with pytest.raises(InputError, match="trained with other settings"):
        run(tmp_path, saes={"a": {"architecture": "batchtopk", "aux_loss_coefficient": 0.5}})


def test_every_architecture_is_recognised_after_its_export(
    run: Callable[..., Comparison], ground_truth_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Folding changes configurations; a further seed must not take that for another recipe."""
    names = ("batchtopk", "topk", "standard", "gated", "jumprelu")
    saes: dict[str, dict[str, Any]] = {name: {"architecture": name} for name in names}
    widths = {"matryoshka_widths": [8, 24]}
    saes["matryoshka"] = {"architecture": "matryoshka_batchtopk", **widths}
    saes["rescaled"] = {"architecture": "standard", "normalize_activations": "layer_norm"}
    saes |= {f"peer_{name}": {"peer": name} for name in PEERS}
    saes["peer_bottleneck"]["bottleneck_rank"] = 1
    saes |= {name: {"preset": name} for name in preset_names() if not name.startswith("source")}
    saes["source"] = {"preset": "source-run-3"}
    changes: dict[str, Any] = {
        "saes": saes,
        "training": {**ground_truth_recipe["training"], "tokens": 12 * 128},
        "search": {"tokens": 3 * 128, "max_trials": 1, "corrections": 0, "tolerance": 0.9},
    }
    run(tmp_path, **changes)
    more = CompareConfig.from_dict(ground_truth_recipe | changes | {"seeds": [0, 1]})
    expansion = expand(more, {SYNTHETIC_HOOK: 16})
    missing = missing_entries(expansion.entries, more, tmp_path)
    assert len(missing) == len(saes) == len(expansion.entries) / 2
    refuse_mixtures(expansion, missing, more, tmp_path)


def test_an_sae_is_the_same_whatever_is_trained_beside_it(
    run: Callable[..., Comparison], tmp_path: Path, ground_truth_recipe: dict[str, Any]
) -> None:
    beside = {"a": BATCHTOPK, "b": {"preset": "default"}, "c": {"architecture": "topk"}}
    run(tmp_path / "together", saes=beside)
    run(tmp_path / "alone", saes={"a": BATCHTOPK})
    synthetic = {**ground_truth_recipe["synthetic"], "saes_at_once": 1}
    run(tmp_path / "one by one", saes=beside, synthetic=synthetic)
    expected = weights(tmp_path / "alone", "a_l0-3_seed0")
    for other in ("together", "one by one"):
        found = weights(tmp_path / other, "a_l0-3_seed0")
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_what_never_acts_changes_nothing(run: Callable[..., Comparison], tmp_path: Path) -> None:
    off = batchtopk_section()
    saes = {"off": off, "waits": {**off, "revival_every": 100, "revival_dead_steps": 100}}
    rows = rows_of(run(tmp_path, saes=saes, seeds=[0, 1]))
    for seed in (0, 1):
        expected = weights(tmp_path, f"off_l0-3_seed{seed}")
        found = weights(tmp_path, f"waits_l0-3_seed{seed}")
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        first, second = (rows[f"{name}_l0-3_seed{seed}"]["metrics"] for name in ("off", "waits"))
        assert first["ground_truth/f1"] == second["ground_truth/f1"]
    starts = [weights(tmp_path, f"off_l0-3_seed{seed}")["W_dec"] for seed in (0, 1)]
    assert not torch.equal(*starts)


def test_a_killed_training_goes_on_and_ends_where_it_would_have(
    run: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = {"preset": "default", "orthogonality_chunk_size": 8}
    saes = {"a": chunks, "b": {"architecture": "topk"}}
    run(tmp_path / "whole", saes=saes)
    check = group_training.InterruptionGuard.check
    calls = 0

    def interrupt(self: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 25:
            raise InterruptedBySignalError(15)
        check(self)

    monkeypatch.setattr(group_training.InterruptionGuard, "check", interrupt)
    with pytest.raises(InterruptedBySignalError) as stopped:
        run(tmp_path / "killed", saes=saes)
    assert stopped.value.checkpoint is not None
    steps: list[int] = []
    load = LockstepTrainer.load_checkpoint

    def noted(self: LockstepTrainer, path: str | Path) -> None:
        load(self, path)
        steps.append(self.n_training_steps)

    monkeypatch.setattr(LockstepTrainer, "load_checkpoint", noted)
    comparison = run(tmp_path / "killed", saes=saes)
    assert comparison.complete
    assert len(steps) == 1
    assert 0 < steps[0] < 40
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_a_preset_that_means_something_else_by_now_is_not_mixed(
    run: Callable[..., Comparison],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: bool,
) -> None:
    saes = {"a": {"preset": "default"}}
    if finished:
        run(tmp_path, saes=saes)
    else:
        check, calls = group_training.InterruptionGuard.check, itertools.count(1)

        def interrupt(self: Any) -> None:
            if next(calls) == 25:
                raise InterruptedBySignalError(15)
            check(self)

        with monkeypatch.context() as patch:
            patch.setattr(group_training.InterruptionGuard, "check", interrupt)
            with pytest.raises(InterruptedBySignalError):
                run(tmp_path, saes=saes)
    then = presets.PRESETS["default"]
    now = replace(then, sae={**then.sae, "dense_share_limit": 0.5})
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "default": now})
    with pytest.raises(InputError, match=r"a_l0-3_seed0, .*dense_share_limit 0\.3 \(now 0\.5\)"):
        run(tmp_path, saes=saes, seeds=[0, 1])
    # Alone it goes on, with the settings that it was begun with.
    assert list(rows_of(run(tmp_path, saes=saes))) == ["a_l0-3_seed0"]
    trained = read_checkpoint(tmp_path / "saes" / "a_l0-3_seed0" / "sae")
    assert trained.details["dense_share_limit"] == 0.3


def test_an_sae_that_diverges_is_named_and_the_others_are_kept(
    run: Callable[..., Comparison], tmp_path: Path
) -> None:
    saes = {
        "good": BATCHTOPK,
        "bad": {"architecture": "batchtopk", "lr": 1e30},
        "fine": {"architecture": "topk"},
    }
    comparison = run(tmp_path, saes=saes)
    assert not comparison.complete
    assert list(comparison.failures) == ["bad_l0-3_seed0"]
    assert set(rows_of(comparison)) == {"good_l0-3_seed0", "fine_l0-3_seed0"}
    (missing,) = comparison.contents["not_measured"]  # type: ignore[index]
    assert missing["what"] == "bad_l0-3_seed0"
    assert "learning rate" in missing["reason"]
    with pytest.raises(RunFailure, match="no SAE could be trained"):
        run(tmp_path / "none", saes={"bad": saes["bad"]})


def test_parts_share_the_work(run: Callable[..., Comparison], tmp_path: Path) -> None:
    saes = {"a": BATCHTOPK, "b": {"architecture": "topk"}, "c": {"preset": "default"}}
    one = run(tmp_path, shard=Shard.parse("1/2"), saes=saes, seeds=[0, 1])
    assert one.contents is None
    assert {p.name[0] for p in (tmp_path / "saes").iterdir()} == {"a", "c"}
    run(tmp_path, shard=Shard.parse("2/2"), saes=saes, seeds=[0, 1])
    assert {p.name[0] for p in (tmp_path / "saes").iterdir()} == {"a", "b", "c"}
    assert not (tmp_path / "comparison.json").exists()
    assert len(rows_of(run(tmp_path, saes=saes, seeds=[0, 1]))) == 6
    for text in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(InputError, match="NUMBER/OF"):
            Shard.parse(text)


def test_a_folder_of_something_else_is_left_alone(
    run: Callable[..., Comparison], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        run(tmp_path, saes={"a": BATCHTOPK})
    with pytest.raises(InputError, match="is a file"):
        run(tmp_path / "thesis.tex", saes={"a": BATCHTOPK})


def test_a_row_without_training_or_with_a_nan_is_an_error(
    ground_truth_recipe: dict[str, Any],
) -> None:
    config = CompareConfig.from_dict(ground_truth_recipe | {"saes": {"a": BATCHTOPK}})
    row = {"name": "a", "folder": "saes/a", "control": None, "training_steps": 0}
    with pytest.raises(RunFailure, match="zero training steps"):
        comparison_contents(config, [row], Measured(), {}, "cpu", {})
    measured = Measured(metrics={"a": {"ground_truth/f1": float("nan")}})
    with pytest.raises(RunFailure, match="is nan"):
        comparison_contents(config, [row | {"training_steps": 1}], measured, {}, "cpu", {})


def test_batches_can_be_had_again_and_differ_by_seed_and_number(
    ground_truth_recipe: dict[str, Any],
) -> None:
    def batch(seed: int, number: int, *, own: bool = False) -> torch.Tensor:
        recipe = ground_truth_recipe | {"saes": {"a": BATCHTOPK}}
        recipe["synthetic"] = {**recipe["synthetic"], "new_model_per_seed": own}
        section = CompareConfig.from_dict(recipe).synthetic
        assert section is not None
        return SyntheticSource(section, 32).batch(SYNTHETIC_HOOK, seed, number)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = batch(0, 7)
    assert torch.equal(first, batch(0, 7))
    assert torch.equal(torch.get_rng_state(), before)
    for other in (batch(0, 8), batch(1, 7), batch(1, 7, own=True)):
        assert not torch.equal(first, other)
    assert torch.equal(first, batch(0, 7, own=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_feature": 3}, "did you mean 'num_features'"),
        ({"seed": None}, r"synthetic\.model\.seed' is missing"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"firing_probability": {"generator_name": "nothing"}}, "synthetic.model"),
        ({"hierarchy": {"total_root_nodes": 0}}, "total_root_nodes"),
    ],
)
def test_an_impossible_ground_truth_is_refused(
    ground_truth_recipe: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    recipe = copy.deepcopy(ground_truth_recipe) | {"saes": {"a": BATCHTOPK}}
    recipe["synthetic"]["model"] |= change
    with pytest.raises(InputError, match=message):
        compare(CompareConfig.from_dict(recipe), Path("/nonexistent"))
