"""Our sae-probes evaluation against SAEBench's own function on the same SAE and activations."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from evaluation_builders import HOOK, make_subject, random_standard, run
from probing_builders import broken, surroundings
from sae_bench.evals.sparse_probing_sae_probes import main as sae_probes_main
from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
from sae_probes import (
    generate_model_activations,
    generate_sae_activations,
    run_baselines,
    utils_data,
)
from sae_probes.utils_training import BestClassifierResults, Metrics
from sklearn.linear_model import LogisticRegression

from msae_plugin.common.progress import warnings_alone
from msae_plugin.evaluation.outcomes import ModelContext, definitions
from msae_plugin.evaluation.recipe import reported_counts
from msae_plugin.evaluation.saebench import sae_probes
from msae_plugin.evaluation.saebench.patching import evaluation_environment, replaced
from msae_plugin.evaluation.saebench.sae_probes import (
    SaeProbesModelSide,
    batch_size,
    dataset_file,
    missing_for_sae_probes,
    tokenizer_sha256,
)
from msae_plugin.models.loading import load_language_model
from msae_plugin.saes.load import EvaluatedSAE

EVALUATION = "sparse_probing_sae_probes"
run_sae_probes = partial(run, EVALUATION)
COUNTS = reported_counts(EVALUATION)
DEFINITIONS = definitions(EVALUATION, COUNTS)
FLORIDA, BASEBALL = "117_us_state_FL", "156_athlete_sport_baseball"
SETTINGS: dict[str, Any] = {"dataset_names": [FLORIDA, BASEBALL], "ks": [1, 2]}
ONE: dict[str, Any] = {"dataset_names": [FLORIDA], "ks": [1]}


@pytest.fixture(autouse=True)
def short_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 240 rows of two real tables: 1000 and 1772 would take a minute."""
    data = tmp_path / "data"
    (data / "cleaned_data").mkdir(parents=True)
    tables = {}
    for name in (FLORIDA, BASEBALL):
        table = pd.read_csv(dataset_file(name), compression="zstd").groupby("target").head(120)
        table.to_csv(data / "cleaned_data" / f"{name}.csv.zst", index=False, compression="zstd")
        tables[name] = table
    sizes = {name: len(table) for name, table in tables.items()}
    monkeypatch.setattr(generate_model_activations, "DATA_PATH", data)
    monkeypatch.setattr(sae_probes, "DATA_PATH", data)
    monkeypatch.setattr(utils_data, "read_numbered_dataset_df", lambda name: tables[name])
    monkeypatch.setattr(generate_sae_activations, "DATASET_SIZES", sizes)
    monkeypatch.setattr(run_baselines, "DATASET_SIZES", sizes)


@pytest.fixture
def quick_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fit in place of the baseline's eleven, which cost most of the time."""

    def fit(X: Any, y: Any, X_test: Any, y_test: Any, seed: int) -> BestClassifierResults:
        probe = LogisticRegression(C=1e-3, random_state=seed).fit(X, y)
        score = float(probe.score(X_test, y_test))
        return BestClassifierResults(Metrics(score, score, score, score), probe, None)

    for method in ("logreg", "pca"):
        monkeypatch.setitem(run_baselines.METHODS, method, fit)


def last_token_activations(context: ModelContext, dataset: str) -> torch.Tensor:
    """The first 40 texts, each alone, without padding."""
    model: Any = context.language_model.model
    found = []
    for text in pd.read_csv(dataset_file(dataset), compression="zstd")["prompt"][:40]:
        ids = torch.tensor([context.language_model.tokenizer(text)["input_ids"]])
        found.append(model.run_with_cache(ids, names_filter=HOOK)[1][HOOK][0, -1])
    return torch.stack(found)


def direct(
    context: ModelContext, subject: EvaluatedSAE, settings: dict[str, Any], folder: Path, seed: int
) -> dict[str, Any]:
    """SAEBench's `run_eval` on activations that were put where it looks for its own."""
    config = SparseProbingSaeProbesEvalConfig(
        **settings,
        model_name=context.name,
        random_seed=seed,
        results_path=str(folder / "sae-probes"),
        model_cache_path=str(folder / "activations"),
    )
    with evaluation_environment(0):
        results = sae_probes_main.run_eval(
            config,
            [(subject.name, subject.for_saebench(torch.float32, "cpu"))],
            "cpu",
            str(folder / "results"),
            force_rerun=True,
        )
    return results[f"{subject.name}_custom_sae"]


def put_activations(context: ModelContext, names: list[str], folder: Path) -> None:
    for name in names:
        side = SaeProbesModelSide(context, HOOK, 0, None)
        place = folder / "activations" / f"model_activations_{context.name}"
        place.mkdir(parents=True, exist_ok=True)
        torch.save(torch.load(side.activations(name)), place / f"{name}_{HOOK}.pt")


def test_the_numbers_are_saebenchs_own(
    context: ModelContext, subjects: list[EvaluatedSAE], tmp_path: Path
) -> None:
    outcomes = run_sae_probes(context, SETTINGS, subjects, 7, tmp_path / "out", warnings_alone)
    put_activations(context, SETTINGS["dataset_names"], tmp_path)
    for subject in subjects:
        outcome = outcomes[subject.name]
        assert outcome.status == "measured", outcome.reason
        expected = direct(context, subject, SETTINGS, tmp_path, 7)
        sides = expected["eval_result_metrics"]
        reported = {
            name: value
            for side in ("sae", "llm")
            for name, value in sides[side].items()
            if value is not None
        }
        assert outcome.metrics == reported
        assert set(reported) <= set(DEFINITIONS)
        assert set(reported) == {
            *(f"sae_top_{k}_test_{m}" for k in (1, 2) for m in ("accuracy", "auc", "f1")),
            *(f"llm_test_{m}" for m in ("accuracy", "auc", "f1")),
        }
        assert outcome.file == tmp_path / "out" / f"{subject.name}_custom_sae_eval_results.json"
        ours = json.loads(outcome.file.read_text())
        theirs = json.loads(json.dumps(expected, default=str))
        assert set(ours) == set(theirs)
        for field in ("eval_result_details", "eval_result_metrics", "sae_cfg_dict"):
            assert ours[field] == theirs[field], field
        # No path of this machine is in it.
        assert str(tmp_path) not in outcome.file.read_text()
        assert ours["eval_config"]["results_path"] == "artifacts/sparse_probing_sae_probes"


def test_activations_are_those_of_the_last_token(context: ModelContext) -> None:
    tokenizer = context.language_model.tokenizer
    before = tokenizer.truncation_side, tokenizer.padding_side
    file = SaeProbesModelSide(context, HOOK, 0, None).activations(FLORIDA)
    assert (tokenizer.truncation_side, tokenizer.padding_side) == before == ("right", "right")
    found = torch.load(file)
    torch.testing.assert_close(found[:40], last_token_activations(context, FLORIDA))
    assert found.shape == (240, 64)


def test_a_direct_call_cannot_load_a_model_that_is_no_release(
    context: ModelContext, subjects: list[EvaluatedSAE], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="tiny-model not found"):
        direct(context, subjects[0], ONE, tmp_path, 7)


def test_a_direct_call_believes_results_of_another_sae(
    context: ModelContext, subjects: list[EvaluatedSAE], tmp_path: Path, quick_baseline: None
) -> None:
    put_activations(context, ONE["dataset_names"], tmp_path)
    first = direct(context, subjects[0], ONE, tmp_path, 7)
    other = dataclasses.replace(subjects[1], name=subjects[0].name)
    assert (
        direct(context, other, ONE, tmp_path, 7)["eval_result_metrics"]
        == first["eval_result_metrics"]
    )
    # Ours does not, in the same output folder and cache.
    outcomes = [
        run_sae_probes(context, ONE, [each], 7, tmp_path / "out", warnings_alone)[each.name].metrics
        for each in (subjects[0], other)
    ]
    assert outcomes[0]["sae_top_1_test_auc"] != outcomes[1]["sae_top_1_test_auc"]
    assert outcomes[0]["llm_test_auc"] == outcomes[1]["llm_test_auc"]


def test_neither_order_nor_company_changes_a_result(
    context: ModelContext, subjects: list[EvaluatedSAE], tmp_path: Path, quick_baseline: None
) -> None:
    def run(chosen: list[EvaluatedSAE], names: list[str], seed: int, place: str) -> dict[str, Any]:
        fresh = dataclasses.replace(context, cache=tmp_path / place)
        given = {"dataset_names": names, "ks": [1]}
        outcomes = run_sae_probes(fresh, given, chosen, seed, tmp_path / place, warnings_alone)
        files = {name: outcome.file for name, outcome in outcomes.items()}
        return {
            name: {
                detail["dataset_name"]: detail
                for detail in json.loads(file.read_text())["eval_result_details"]
            }
            for name, file in files.items()
            if file is not None
        }

    forward = run(subjects, [FLORIDA, BASEBALL], 7, "a")
    assert run(subjects[::-1], [BASEBALL, FLORIDA], 7, "b") == forward
    # Alone, after another seed in the same cache: the baselines of other datasets stay out of it.
    other = run(subjects[:1], [BASEBALL], 8, "a")
    alone = run(subjects[:1], [BASEBALL], 7, "a")
    name = subjects[0].name
    assert alone[name] == {BASEBALL: forward[name][BASEBALL]}
    assert other[name][BASEBALL] != alone[name][BASEBALL]


def test_the_models_side_is_computed_once_and_never_stale(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick_baseline: None,
) -> None:
    passes: list[str] = []
    probes: list[str] = []
    ensure = sae_probes.ensure_dataset_activations
    baseline = sae_probes.run_baseline_evals

    def counted_ensure(**options: Any) -> None:
        passes.extend(options["dataset_short_names"])
        ensure(**options)

    def counted_baseline(**options: Any) -> None:
        probes.extend(options["datasets"])
        baseline(**options)

    monkeypatch.setattr(sae_probes, "ensure_dataset_activations", counted_ensure)
    monkeypatch.setattr(sae_probes, "run_baseline_evals", counted_baseline)

    def work(given: ModelContext = context, seed: int = 7, **changes: Any) -> tuple[int, int]:
        passes.clear()
        probes.clear()
        outcomes = run_sae_probes(
            given, {**ONE, **changes}, subjects[:1], seed, tmp_path / "out", warnings_alone
        )
        assert {outcome.status for outcome in outcomes.values()} == {"measured"}
        return len(passes), len(probes)

    assert work() == (1, 1)
    assert work() == (0, 0)
    assert work(ks=[2], reg_type="l2") == (0, 0)
    assert work(seed=8) == (0, 1)
    assert work(baseline_method="pca") == (0, 1)
    assert work(include_llm_baseline=False) == (0, 0)
    assert work(dataclasses.replace(context, weights_sha256="other")) == (1, 1)
    bfloat16 = dataclasses.replace(
        context,
        language_model=load_language_model(str(tiny_model_dir), [HOOK], dtype="bfloat16"),
        dtype="bfloat16",
    )
    assert work(bfloat16) == (1, 1)  # numpy has no bfloat16: SAEBench alone fails here
    table = pd.read_csv(dataset_file(FLORIDA), compression="zstd")[::-1]
    table.to_csv(dataset_file(FLORIDA), index=False, compression="zstd")
    assert work() == (1, 1)


def test_what_a_killed_run_leaves_is_not_trusted(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick_baseline: None,
) -> None:
    expected = run_sae_probes(context, ONE, subjects[:1], 7, tmp_path / "out", warnings_alone)
    fresh = dataclasses.replace(context, cache=tmp_path / "fresh")
    save = torch.save

    def killed(value: Any, path: Any) -> None:
        save(torch.zeros_like(value), path)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sae_probes(fresh, ONE, subjects[:1], 7, tmp_path / "again", warnings_alone)
    assert len(list(fresh.cache.rglob("*.pt"))) == 1
    monkeypatch.setattr(torch, "save", save)
    found = run_sae_probes(fresh, ONE, subjects[:1], 7, tmp_path / "again", warnings_alone)
    assert found[subjects[0].name].metrics == expected[subjects[0].name].metrics


def test_one_failing_sae_stops_no_other(
    context: ModelContext, subjects: list[EvaluatedSAE], tmp_path: Path, quick_baseline: None
) -> None:
    def raises(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no\nlatents today")

    def not_a_number(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.full((*x.shape[:-1], 96), float("nan"))

    def dead(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*x.shape[:-1], 96)

    bad = [broken(subjects[0], encode.__name__, encode) for encode in (raises, not_a_number, dead)]
    lost = dataclasses.replace(subjects[0], name="lost", hook_name="blocks.1.hook_nothing")
    everyone = [bad[0], lost, bad[1], bad[2], subjects[1]]
    outcomes = run_sae_probes(context, ONE, everyone, 7, tmp_path / "out", warnings_alone)
    assert {n: o.status for n, o in outcomes.items() if o.status == "measured"} == {
        subjects[1].name: "measured"
    }
    assert outcomes["raises"].reason == "no latents today"
    assert "NaN" in str(outcomes["not_a_number"].reason)
    assert "L0 is 0" in str(outcomes["dead"].reason)
    assert "language model's side failed" in str(outcomes["lost"].reason)
    alone = run_sae_probes(context, ONE, subjects[1:], 7, tmp_path / "alone", warnings_alone)
    assert outcomes[subjects[1].name].metrics == alone[subjects[1].name].metrics
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_nothing_stays_changed(
    context: ModelContext, subjects: list[EvaluatedSAE], tmp_path: Path, quick_baseline: None
) -> None:
    def state() -> tuple[Any, ...]:
        return (
            Path.cwd(),
            surroundings(context, subjects),
        )

    before = state()
    run_sae_probes(context, ONE, subjects[:1], 7, tmp_path / "out", warnings_alone)
    with replaced(sae_probes_main, "run_sae_evals", None):
        failed = run_sae_probes(context, ONE, subjects[:1], 7, tmp_path / "out", warnings_alone)
    assert failed[subjects[0].name].status == "failed"
    assert state() == before
    # Relative folders are the caller's, although the evaluation runs elsewhere.
    assert not (Path.cwd() / "artifacts").exists()


def test_an_sae_at_another_hook_reads_that_hook(
    context: ModelContext, tmp_path: Path, quick_baseline: None
) -> None:
    first, other = (make_subject(random_standard(1), name) for name in ("first", "other"))
    other.sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    other = dataclasses.replace(other, hook_name="blocks.0.hook_resid_post")
    outcomes = run_sae_probes(context, ONE, [first, other], 7, tmp_path / "out", warnings_alone)
    assert {outcome.status for outcome in outcomes.values()} == {"measured"}
    assert outcomes["first"].metrics["llm_test_auc"] != outcomes["other"].metrics["llm_test_auc"]


def test_attention_of_a_batch_is_bounded() -> None:
    # SmolLM2 has nine heads: 32 short texts fit, of 1024 tokens seven (9 * 1024^2 * 4 bytes each).
    assert batch_size(200, 9, "cpu") == 32
    assert batch_size(1024, 9, "cpu") == 7
    assert batch_size(100_000, 9, "cpu") == 7
    assert batch_size(1024, 9, "cuda:0") == 32
    assert batch_size(1024, 10_000, "cpu") == 1


def test_tokenizers_are_told_apart_but_not_by_their_last_call(
    context: ModelContext, tiny_model_dir: Path
) -> None:
    tokenizer: Any = context.language_model.tokenizer
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert tokenizer_sha256(tokenizer) == before
    other: Any = load_language_model(str(tiny_model_dir), [HOOK]).tokenizer
    assert tokenizer_sha256(other) == before
    other.add_tokens(["garden"])
    assert tokenizer_sha256(other) != before


def test_what_is_missing_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_for_sae_probes({"dataset_names": [FLORIDA]}) == []
    (unknown,) = missing_for_sae_probes({"dataset_names": ["us_state_FL"]})
    assert unknown.what == "sae-probes dataset 'us_state_FL'"
    assert "117_us_state_FL" in unknown.how
    # 1000 texts of 576 numbers of 4 bytes.
    free = type("Usage", (), {"free": 1000 * 576 * 4})
    monkeypatch.setattr("shutil.disk_usage", lambda place: free)
    known = {"cache": tmp_path, "d_model": 576}
    assert missing_for_sae_probes({"dataset_names": [FLORIDA]}, **known) == []
    (disk,) = missing_for_sae_probes({"dataset_names": [FLORIDA]}, **known, runs=2)
    assert "of disk for activations" in disk.what


def test_every_metric_is_defined() -> None:
    measures = ("accuracy", "auc", "f1")
    assert set(DEFINITIONS) == {
        *(f"sae_top_{k}_test_{measure}" for k in COUNTS for measure in measures),
        *(f"llm_test_{measure}" for measure in measures),
    }
    for name, definition in DEFINITIONS.items():
        assert definition.source == "saebench"
        assert "last token" in definition.tokens
        assert "{" not in definition.definition
        assert definition.higher_is_better is (None if name.startswith("llm_") else True)
