"""Our sparse probing against SAEBench's own function on the same SAE, model and texts."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from evaluation_builders import HOOK, loads, make_subject, random_standard, run
from probing_builders import (
    AG_NEWS,
    BIOS,
    broken,
    model_passes,
    surroundings,
    write_ag_news,
    write_bios,
)
from sae_bench.evals.sparse_probing import main as probing_main
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils import activation_collection, dataset_info, dataset_utils

from msae_plugin.common.progress import warnings_alone
from msae_plugin.data.labelled_texts import LABELLED_SOURCES, LabelledSource, LocalCopies
from msae_plugin.evaluation.outcomes import ModelContext, definitions
from msae_plugin.evaluation.recipe import reported_counts
from msae_plugin.evaluation.saebench.patching import evaluation_environment, replaced
from msae_plugin.evaluation.saebench.sparse_probing import KIND
from msae_plugin.models.loading import load_language_model
from msae_plugin.saes.load import EvaluatedSAE

run_sparse_probing = partial(run, "sparse_probing")
COUNTS = reported_counts("sparse_probing")
DEFINITIONS = definitions("sparse_probing", COUNTS)
PACKAGED = "packaged:tiny-topics"


@pytest.fixture
def settings(tmp_path: Path, tiny_texts: list[str]) -> dict[str, Any]:
    """Two of SAEBench's datasets as local copies, in miniature."""
    return {
        "dataset_names": [AG_NEWS, BIOS],
        "probe_train_set_size": 40,
        "probe_test_set_size": 20,
        "context_length": 12,
        "sae_batch_size": 7,
        "llm_batch_size": 6,
        "k_values": [1, 2],
        "datasets": {
            AG_NEWS: str(write_ag_news(tmp_path / "ag_news", tiny_texts)),
            "LabHC/bias_in_bios": str(write_bios(tmp_path / "bios", tiny_texts)),
        },
    }


@pytest.fixture
def small(settings: dict[str, Any]) -> dict[str, Any]:
    """One dataset only."""
    return {**settings, "dataset_names": [AG_NEWS], "k_values": [1]}


@pytest.fixture
def packaged(tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A labelled set of our own, of two classes."""

    def read(folder: Path) -> dict[str, list[str]]:
        return {
            topic: [text for text in tiny_texts if f" from the {topic}:" in text]
            for topic in ("garden", "harbour")
        }

    source = LabelledSource("datasets", "datasets", "datasets", ("garden", "harbour"), read)
    monkeypatch.setitem(LABELLED_SOURCES, PACKAGED, source)
    return PACKAGED


@pytest.fixture
def untrained_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the activations matter: probes cost most of the time."""

    def accuracies(acts: dict[str, Any], *_: Any, **__: Any) -> tuple[dict[str, Any], Any]:
        return {}, dict.fromkeys(acts, 0.75)

    monkeypatch.setattr(probe_training, "train_probe_on_activations", accuracies)


def direct(
    context: ModelContext,
    subject: EvaluatedSAE,
    settings: dict[str, Any],
    dataset: str,
    artifacts: Path,
    seed: int,
) -> dict[str, Any]:
    """SAEBench's `run_eval`, which loads models and data by name only: both are handed in."""

    given = {k: v for k, v in settings.items() if k != "datasets"}
    config = SparseProbingEvalConfig(
        **{**given, "dataset_names": [dataset], "random_seed": seed},
        model_name=context.name,
        llm_dtype=context.dtype,
    )
    local = LocalCopies(settings["datasets"])
    with (
        evaluation_environment(0),
        replaced(probing_main, "HookedTransformer", loads(context)),
        replaced(dataset_utils, "load_dataset", local.load_dataset),
    ):
        results = probing_main.run_eval(
            config,
            [(subject.name, subject.for_saebench(context.torch_dtype, "cpu"))],
            "cpu",
            str(artifacts / "results"),
            force_rerun=True,
            artifacts_path=str(artifacts / "artifacts"),
        )
    return results[f"{subject.name}_custom_sae"]


def details_of(file: Path) -> dict[str, dict[str, float]]:
    written = json.loads(file.read_text())
    return {
        detail["dataset_name"].removesuffix("_results"): {
            k: v for k, v in detail.items() if isinstance(v, float)
        }
        for detail in written["eval_result_details"]
    }


def test_the_numbers_are_saebenchs_own(
    context: ModelContext, subjects: list[EvaluatedSAE], settings: dict[str, Any], tmp_path: Path
) -> None:
    outcomes = run_sparse_probing(context, settings, subjects, 5, tmp_path / "out", warnings_alone)
    # SAEBench's own first run, which trains the probes on the model: its latents' probes begin with
    # whatever random numbers those left, ours and those of every later run with the seed.
    cold = {
        dataset: direct(context, subjects[0], settings, dataset, tmp_path / "direct", 5)
        for dataset in settings["dataset_names"]
    }
    for subject in subjects:
        outcome = outcomes[subject.name]
        assert outcome.status == "measured", outcome.reason
        assert outcome.file == tmp_path / "out" / f"{subject.name}_custom_sae_eval_results.json"
        ours = details_of(outcome.file)
        assert list(ours) == [AG_NEWS, BIOS]
        for dataset in ours:
            warm = direct(context, subject, settings, dataset, tmp_path / "direct", 5)
            expected = {
                k: v
                for k, v in warm["eval_result_details"][0].items()
                if v is not None and k != "dataset_name"
            }
            assert ours[dataset] == expected
            model_side = {k: v for k, v in ours[dataset].items() if k.startswith("llm_")}
            assert len(model_side) == 3
            assert model_side.items() <= cold[dataset]["eval_result_details"][0].items()
        for name, value in outcome.metrics.items():
            assert value == pytest.approx(np.mean([ours[d][name] for d in ours]), abs=1e-12)
        assert set(outcome.metrics) == set(ours[AG_NEWS])
        assert set(outcome.metrics) <= set(DEFINITIONS)
        assert outcome.metrics["llm_test_accuracy"] > 0.6  # there is something to be found


def test_the_file_has_saebenchs_fields(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    small: dict[str, Any],
    tmp_path: Path,
    untrained_probes: None,
) -> None:
    outcome = run_sparse_probing(context, small, subjects[:1], 5, tmp_path / "out", warnings_alone)
    file = outcome[subjects[0].name].file
    assert file is not None
    ours = json.loads(file.read_text())
    theirs = json.loads(
        json.dumps(direct(context, subjects[0], small, AG_NEWS, tmp_path, 5), default=str)
    )
    assert set(ours) == set(theirs)
    for field in ("eval_config", "sae_lens_id", "sae_lens_release_id", "sae_cfg_dict"):
        assert ours[field] == theirs[field], field
    assert ours["eval_result_unstructured"].keys() == theirs["eval_result_unstructured"].keys()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file.name]


def test_neither_order_nor_company_changes_a_result(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    small: dict[str, Any],
    packaged: str,
    tmp_path: Path,
) -> None:
    def run(chosen: list[EvaluatedSAE], names: list[str], place: str) -> dict[str, Any]:
        fresh = dataclasses.replace(context, cache=tmp_path / place)
        given = {**small, "dataset_names": names}
        outcomes = run_sparse_probing(fresh, given, chosen, 5, tmp_path / place, warnings_alone)
        return {name: details_of(outcome.file) for name, outcome in outcomes.items()}  # type: ignore[arg-type]

    forward = run(subjects, [AG_NEWS, packaged], "a")
    assert run(subjects[::-1], [packaged, AG_NEWS], "b") == forward
    # Alone, and after another seed in the same cache.
    given = {**small, "dataset_names": [packaged]}
    fresh = dataclasses.replace(context, cache=tmp_path / "c")
    other = run_sparse_probing(fresh, given, subjects[1:], 6, tmp_path / "c6", warnings_alone)
    alone = run_sparse_probing(fresh, given, subjects[1:], 5, tmp_path / "c5", warnings_alone)
    name = subjects[1].name
    assert details_of(alone[name].file)[packaged] == forward[name][packaged]  # type: ignore[arg-type]
    assert other[name].metrics != alone[name].metrics


def test_the_models_side_is_computed_once_and_never_stale(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    small: dict[str, Any],
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_texts: list[str],
    untrained_probes: None,
) -> None:
    def passes(seed: int = 5, given: ModelContext = context, **changes: Any) -> int:
        with model_passes() as seen:
            outcomes = run_sparse_probing(
                given, {**small, **changes}, subjects, seed, tmp_path / "out", warnings_alone
            )
        assert {outcome.status for outcome in outcomes.values()} == {"measured"}
        return len(seen)

    assert passes() == 2  # training and test texts, for two SAEs
    subjects = subjects[:1]
    assert passes() == 0
    assert passes(sae_batch_size=3) == 0  # no matter of the model's
    for changes in (
        {"seed": 6},
        {"context_length": 10},
        {"probe_train_set_size": 36},
        {"k_values": [2]},
        {"llm_batch_size": 5},
    ):
        assert passes(**changes) == 2, changes
    assert passes(given=dataclasses.replace(context, weights_sha256="other")) == 2
    bfloat16 = dataclasses.replace(
        context,
        language_model=load_language_model(str(tiny_model_dir), [HOOK], dtype="bfloat16"),
        dtype="bfloat16",
    )
    assert passes(given=bfloat16) == 2
    write_ag_news(Path(small["datasets"][AG_NEWS]), tiny_texts[::-1])
    assert passes() == 2
    write_ag_news(Path(small["datasets"][AG_NEWS]), tiny_texts)
    assert passes() == 0


def test_what_a_killed_run_leaves_is_not_trusted(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    small: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    untrained_probes: None,
) -> None:
    save = torch.save

    def killed(acts: Any, path: str) -> None:
        # A whole file with wrong contents, which nothing about the file itself gives away.
        acts["llm_results"]["llm_test_accuracy"] = {"0": 0.125}
        save(acts, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sparse_probing(context, small, subjects, 5, tmp_path / "out", warnings_alone)
    assert len(list((context.cache / KIND).rglob("*_activations.pt"))) == 1
    monkeypatch.setattr(torch, "save", save)
    outcomes = run_sparse_probing(context, small, subjects, 5, tmp_path / "out", warnings_alone)
    assert outcomes[subjects[0].name].metrics["llm_test_accuracy"] == 0.75


def test_one_failing_sae_stops_no_other(
    context: ModelContext, subjects: list[EvaluatedSAE], small: dict[str, Any], tmp_path: Path
) -> None:
    def raises(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no\nlatents today")

    def not_a_number(self: Any, x: torch.Tensor) -> torch.Tensor:
        # In one text of the second half only, where no top-1 probe would look.
        latents = torch.relu(x @ self.W_enc)
        latents[-1, :, -1] = float("nan")
        return latents

    def dead(self: Any, x: torch.Tensor) -> torch.Tensor:
        # Fires on padding alone.
        return (x == 0).all(-1, keepdim=True).expand(*x.shape[:-1], 96).to(x.dtype)

    bad = {
        "raises": broken(subjects[0], "raises", raises),
        "not_a_number": broken(subjects[0], "not_a_number", not_a_number),
        "dead": broken(subjects[0], "dead", dead),
    }
    everyone = [bad["raises"], subjects[0], bad["not_a_number"], bad["dead"], subjects[1]]
    outcomes = run_sparse_probing(context, small, everyone, 5, tmp_path / "out", warnings_alone)
    alone = run_sparse_probing(context, small, subjects, 5, tmp_path / "alone", warnings_alone)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "raises": "failed",
        "not_a_number": "failed",
        "dead": "failed",
        subjects[0].name: "measured",
        subjects[1].name: "measured",
    }
    assert outcomes["raises"].reason == "no latents today"
    assert "NaN" in str(outcomes["not_a_number"].reason)
    assert "L0 is 0" in str(outcomes["dead"].reason)
    for subject in subjects:
        assert outcomes[subject.name].metrics == alone[subject.name].metrics
    written = {path.name.split("_custom_sae")[0] for path in (tmp_path / "out").iterdir()}
    assert written == {subject.name for subject in subjects}


def test_nothing_stays_patched_and_the_callers_sae_is_as_it_was(
    context: ModelContext, subjects: list[EvaluatedSAE], small: dict[str, Any], tmp_path: Path
) -> None:
    def state() -> tuple[Any, ...]:
        return (
            dataset_utils.load_dataset,
            dataset_utils.get_multi_label_train_test_data,
            dataset_info.chosen_classes_per_dataset,
            dict(dataset_info.chosen_classes_per_dataset),
            jaxtyping.config.jaxtyping_disable,
            surroundings(context, subjects),
        )

    before = state()
    run_sparse_probing(context, small, subjects, 5, tmp_path / "out", warnings_alone)
    assert state() == before
    failing = {**small, "probe_train_set_size": 4000}
    outcomes = run_sparse_probing(context, failing, subjects, 5, tmp_path / "out", warnings_alone)
    assert {outcome.status for outcome in outcomes.values()} == {"failed"}
    assert "SAEBench's loader fails with probe_train_set_size 4000" in str(
        outcomes[subjects[0].name].reason
    )
    assert state() == before


def test_saes_at_several_hooks_each_get_their_own_activations(
    context: ModelContext, small: dict[str, Any], tmp_path: Path
) -> None:
    first = make_subject(random_standard(1), "first")
    other = make_subject(random_standard(1), "other")
    other.sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    other = dataclasses.replace(other, hook_name="blocks.0.hook_resid_post")
    with model_passes() as seen:
        outcomes = run_sparse_probing(context, small, [first, other], 5, tmp_path, warnings_alone)
    assert seen == [HOOK, HOOK, "blocks.0.hook_resid_post", "blocks.0.hook_resid_post"]
    cold = direct(context, other, small, AG_NEWS, tmp_path / "direct", 5)
    metric = "llm_top_1_test_accuracy"
    assert outcomes["other"].metrics[metric] == cold["eval_result_details"][0][metric]
    assert outcomes["first"].metrics != outcomes["other"].metrics


def test_a_hook_that_does_not_exist_fails_its_saes_only(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    small: dict[str, Any],
    tmp_path: Path,
    untrained_probes: None,
) -> None:
    lost = dataclasses.replace(subjects[0], name="lost", hook_name="blocks.1.hook_nothing")
    outcomes = run_sparse_probing(
        context, small, [lost, subjects[1]], 5, tmp_path / "out", warnings_alone
    )
    assert outcomes["lost"].status == "failed"
    assert "language model's side failed" in str(outcomes["lost"].reason)
    assert outcomes[subjects[1].name].status == "measured"


def test_lower_vram_usage_leaves_out_what_it_does_not_train(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    small: dict[str, Any],
    tmp_path: Path,
    untrained_probes: None,
) -> None:
    given = {**small, "lower_vram_usage": True}
    outcome = run_sparse_probing(context, given, subjects[:1], 5, tmp_path / "out", warnings_alone)[
        subjects[0].name
    ]
    assert outcome.status == "measured"
    assert "sae_test_accuracy" not in outcome.metrics
    assert "sae_top_1_test_accuracy" in outcome.metrics
    assert "lower_vram_usage" in outcome.facts["sae_test_accuracy"]
    assert outcome.file is not None
    written = json.loads(outcome.file.read_text())
    assert written["eval_result_metrics"]["sae"]["sae_test_accuracy"] == -1


def test_texts_without_a_token_fail_with_their_class(
    context: ModelContext, subjects: list[EvaluatedSAE], small: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(small["datasets"][AG_NEWS])
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = "" if row["label"] == 2 else row["text"]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with model_passes() as seen:
        outcomes = run_sparse_probing(context, small, subjects, 5, tmp_path / "out", warnings_alone)
    assert seen == []
    reason = str(outcomes[subjects[0].name].reason)
    assert "10 texts of class '2' (test) hold nothing but BOS, EOS and PAD" in reason


def test_pad_and_eos_may_be_the_same_token(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    small: dict[str, Any],
    tmp_path: Path,
    untrained_probes: None,
) -> None:
    tokenizer = context.language_model.tokenizer
    before = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    try:
        outcomes = run_sparse_probing(
            context, small, subjects[:1], 5, tmp_path / "o", warnings_alone
        )
        artifacts = torch.load(next((context.cache / KIND).rglob("*_activations.pt")))
        ids = tokenizer(
            "short", padding="max_length", max_length=small["context_length"], truncation=True
        )["input_ids"]
    finally:
        tokenizer.pad_token = before
    assert ids[-1] == tokenizer.eos_token_id
    assert outcomes[subjects[0].name].status == "measured"
    # BOS of every text is left out.
    assert bool((artifacts["train"]["0"][:, 0] == 0).all())
    assert bool((artifacts["train"]["0"][:, 1] != 0).any(-1).all())


def test_our_own_labelled_sets_have_names_of_their_own(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    small: dict[str, Any],
    packaged: str,
    tmp_path: Path,
    untrained_probes: None,
) -> None:
    given = {**small, "dataset_names": [packaged, AG_NEWS]}
    outcome = run_sparse_probing(context, given, subjects[:1], 5, tmp_path / "out", warnings_alone)[
        subjects[0].name
    ]
    assert outcome.file is not None
    assert list(details_of(outcome.file)) == [packaged, AG_NEWS]
    unstructured = json.loads(outcome.file.read_text())["eval_result_unstructured"]
    probes = unstructured[f"{packaged}_results"]["sae_top_1_test_accuracy"]
    assert set(probes) == {"garden", "harbour"}
    assert f"source of {packaged}" in outcome.facts
    assert outcome.facts[f"source of {AG_NEWS}"] == "local copy"
    other_seed = run_sparse_probing(context, given, subjects[:1], 6, tmp_path / "o", warnings_alone)
    assert other_seed[subjects[0].name].facts["text"] != outcome.facts["text"]


def test_the_default_batch_size_is_saebenchs_for_the_model(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    small: dict[str, Any],
    tmp_path: Path,
    untrained_probes: None,
) -> None:
    given = {k: v for k, v in small.items() if k != "llm_batch_size"}
    for name, expected in (("pythia-70m-deduped", 512), ("tiny-model", 32)):
        named = dataclasses.replace(context, name=name)
        outcome = run_sparse_probing(named, given, subjects[:1], 5, tmp_path / name, warnings_alone)
        file = outcome[subjects[0].name].file
        assert file is not None
        assert json.loads(file.read_text())["eval_config"]["llm_batch_size"] == expected
    assert activation_collection.LLM_NAME_TO_BATCH_SIZE["gemma-2-2b"] == 32


def test_every_metric_is_defined() -> None:
    sides = {
        f"{side}_top_{k}_test_accuracy"
        for side in ("llm", "sae")
        for k in reported_counts("sparse_probing")
    }
    assert set(DEFINITIONS) == sides | {"llm_test_accuracy", "sae_test_accuracy"}
    for name, definition in DEFINITIONS.items():
        assert definition.source == "saebench"
        assert "BOS" in definition.tokens
        assert "{" not in definition.definition
        assert definition.higher_is_better is (None if name.startswith("llm_") else True)
