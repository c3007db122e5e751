"""SAEBench's further evaluations against its own functions called directly."""

import dataclasses
import json
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from evaluation_builders import loads, make_subject, random_standard
from evaluation_builders import run as run_evaluation
from sae_bench.evals.absorption import common as absorption_common
from sae_bench.evals.absorption import main as absorption_main
from sae_bench.evals.autointerp import main as autointerp_main
from sae_bench.evals.meta_structure import main as meta_structure_main
from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig
from sae_bench.evals.ravel import instance as ravel_instance
from sae_bench.evals.ravel import main as ravel_main
from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp_main
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.sae_bench_utils import dataset_utils

from msae_plugin.common.progress import warnings_alone
from msae_plugin.evaluation.evaluate import definition_of
from msae_plugin.evaluation.outcomes import ModelContext, ScoreResult, reliability
from msae_plugin.evaluation.recipe import check_settings
from msae_plugin.evaluation.saebench.patching import evaluation_environment, replaced
from msae_plugin.saes.load import EvaluatedSAE

META = {"train_steps": 15, "train_batch_size": 32, "autocast": False}
BIOS = "LabHC/bias_in_bios"
PROBING: dict[str, Any] = {
    "dataset_names": [f"{BIOS}_class_set1"],
    "train_set_size": 16,
    "test_set_size": 8,
    "context_length": 16,
    "probe_train_batch_size": 4,
    "probe_test_batch_size": 8,
    "probe_epochs": 3,
    "sae_batch_size": 5,
    "llm_batch_size": 4,
    "n_values": [2, 5],
}
# SCR reads pairs by name, hence class numbers of SAEBench's own: professor 21, nurse 13.
PAIRS = {f"{BIOS}_class_set1": [["professor", "nurse"]]}
CLASSES = [0, 1, 2, 6, 9, 13, 21]


@pytest.fixture
def bios(tmp_path: Path, tiny_texts: list[str]) -> Path:
    """Texts in the schema of bias_in_bios, 14 of each profession and gender in both splits."""
    folder = tmp_path / "bias_in_bios"
    folder.mkdir()
    generator = random.Random(0)
    for split in ("train", "test"):
        rows = [
            {"hard_text": generator.choice(tiny_texts), "profession": label, "gender": gender}
            for label in CLASSES
            for gender in (0, 1)
            for _ in range(14)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings_of(kind: str, bios: Path) -> dict[str, Any]:
    own = {"column1_vals_lookup": PAIRS} if kind == "scr" else {}
    return check_settings(kind, {**PROBING, **own, "datasets": {BIOS: str(bios)}})


def run(
    kind: str, context: ModelContext, settings: Any, subjects: list[EvaluatedSAE], output: Path
) -> dict[str, ScoreResult]:
    here = Path.cwd()
    outcomes = run_evaluation(kind, context, settings, subjects, 3, output, warnings_alone)
    assert Path.cwd() == here
    assert torch.is_grad_enabled()
    return outcomes


def metrics_of(file: Path) -> dict[str, float]:
    categories = json.loads(file.read_text())["eval_result_metrics"].values()
    return {
        name: value
        for category in categories
        for name, value in category.items()
        if value is not None
    }


def test_meta_structure_is_saebenchs(
    context: ModelContext, subjects: list[EvaluatedSAE], tmp_path: Path
) -> None:
    settings = check_settings("meta_structure", META)
    outcomes = run("meta_structure", context, settings, subjects, tmp_path / "ours")
    backwards = run("meta_structure", context, settings, subjects[::-1], tmp_path / "backwards")
    for subject in subjects:
        with evaluation_environment(3):
            meta_structure_main.run_eval(
                MetaStructureEvalConfig(**META, random_seed=3),
                [(subject.name, subject.for_saebench(torch.float32, "cpu"))],  # type: ignore[list-item]
                "cpu",
                str(tmp_path / "direct"),
            )
        file = tmp_path / "direct" / f"{subject.name}_custom_sae_eval_results.json"
        expected = metrics_of(file)
        # The clock is SAEBench's business.
        assert expected.pop("train_time_seconds") > 0
        outcome = outcomes[subject.name]
        assert (outcome.status, dict(outcome.metrics)) == ("measured", expected)
        assert backwards[subject.name].metrics == outcome.metrics
        assert outcome.file == tmp_path / "ours" / file.name
        written, direct = (json.loads(path.read_text()) for path in (outcome.file, file))
        # SAEBench's commit is that of whatever repository is in the working directory.
        assert written["sae_bench_commit_hash"] == "Unknown"
        for changing in (
            "eval_id", "datetime_epoch_millis", "eval_result_metrics", "sae_bench_commit_hash",
        ):  # fmt: skip
            del written[changing], direct[changing]
        assert written == direct
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        f"{name}_custom_sae_eval_results.json" for name in ("multiscale", "standard")
    ]


@pytest.mark.parametrize("kind", ["scr", "tpp"])
def test_scr_and_tpp_are_saebenchs(
    kind: str, context: ModelContext, subjects: list[EvaluatedSAE], bios: Path, tmp_path: Path
) -> None:
    settings = settings_of(kind, bios)
    outcomes = run(kind, context, settings, subjects, tmp_path / "ours")
    rows = {
        split: [json.loads(line) for line in (bios / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }

    def load_dataset(name: str) -> DatasetDict:
        assert name == BIOS
        return DatasetDict({split: Dataset.from_list(part) for split, part in rows.items()})

    own = {key: value for key, value in settings.items() if key != "datasets"}
    config = ScrAndTppEvalConfig(
        **own,
        perform_scr=kind == "scr",
        random_seed=3,
        model_name="tiny-model",
        llm_dtype="float32",
    )
    for subject in subjects:
        with ExitStack() as stack:
            for owner, name, value in (
                (scr_and_tpp_main, "HookedTransformer", loads(context)),
                (dataset_creation, "load_dataset", load_dataset),
                (dataset_utils, "load_dataset", load_dataset),
            ):
                stack.enter_context(replaced(owner, name, value))
            stack.enter_context(evaluation_environment(0))  # SAEBench seeds these itself
            scr_and_tpp_main.run_eval(
                config,
                [(subject.name, subject.for_saebench(torch.float32, "cpu"))],
                "cpu",
                str(tmp_path / "direct"),
                artifacts_path=str(tmp_path / f"artifacts_{subject.name}"),
            )
        file = tmp_path / "direct" / kind / f"{subject.name}_custom_sae_eval_results.json"
        outcome = outcomes[subject.name]
        assert outcome.status == "measured", outcome.reason
        assert dict(outcome.metrics) == metrics_of(file)
        wanted = "scr_metric_threshold_{}" if kind == "scr" else "tpp_threshold_{}_total_metric"
        assert {wanted.format(n) for n in (2, 5)} <= outcome.metrics.keys()
        assert wanted.format(10) not in outcome.metrics


def test_one_broken_sae_leaves_the_others(
    context: ModelContext, subjects: list[EvaluatedSAE], tmp_path: Path
) -> None:
    broken = make_subject(random_standard(5), "broken")
    broken.sae.W_dec.data = torch.zeros(3)  # no matrix
    settings = check_settings("meta_structure", META)
    outcomes = run("meta_structure", context, settings, [broken, *subjects], tmp_path / "out")
    assert [outcomes[name].status for name in ("broken", "standard", "multiscale")] == [
        "failed",
        "measured",
        "measured",
    ]
    assert outcomes["broken"].reason
    assert "\n" not in outcomes["broken"].reason


def test_another_model_than_the_loaded_one_is_refused(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asks_for_another(config: Any, *_: Any, **__: Any) -> None:
        scr_and_tpp_main.HookedTransformer.from_pretrained_no_processing(
            "gemma-2-2b", device="cpu", dtype=torch.float32
        )

    monkeypatch.setattr(scr_and_tpp_main, "run_eval", asks_for_another)
    settings = check_settings("tpp", {"llm_batch_size": 4})
    outcomes = run("tpp", context, settings, subjects[:1], tmp_path / "out")
    assert outcomes["standard"].status == "failed"
    assert outcomes["standard"].reason == (
        "SAEBench asks for the model 'gemma-2-2b', loaded is 'tiny-model'"
    )


def test_nan_and_nothing_are_no_results(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def writes(value: float | None) -> Callable[..., None]:
        def run_eval(config: Any, selected_saes: Any, output_path: str, **_: Any) -> None:
            metrics = {"meta_structure": {"decoder_fraction_variance_explained": value}}
            name = f"{selected_saes[0][0]}_custom_sae_eval_results.json"
            Path(output_path, name).write_text(json.dumps({"eval_result_metrics": metrics}))

        return run_eval

    settings = check_settings("meta_structure", META)
    reasons = []
    for run_eval in (writes(float("nan")), writes(None), lambda **_: None):
        monkeypatch.setattr(meta_structure_main, "run_eval", run_eval)
        outcome = run("meta_structure", context, settings, subjects[:1], tmp_path / "out")[
            "standard"
        ]
        assert outcome.status == "failed"
        reasons.append(outcome.reason)
    assert "is nan" in reasons[0]
    assert "holds no number" in reasons[1]
    assert "wrote no result" in reasons[2]
    assert not any((tmp_path / "out").iterdir())


def test_absorption_trains_its_probes_once_and_says_when_a_model_cannot_spell(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[Any] = []
    train = absorption_common.train_and_save_probes

    def fewer_epochs(model: Any, **options: Any) -> None:
        trained.append(options["layers"])
        train(model, **options, num_epochs=1)

    monkeypatch.setattr(absorption_common, "train_and_save_probes", fewer_epochs)
    seen: list[Any] = []

    def k_sparse(**options: Any) -> Any:
        probe = absorption_common.load_or_train_probe(
            model=options["model"],
            base_template=options["prompt_template"],
            pos_idx=options["prompt_token_pos"],
            layer=options["layer"],
            probes_dir=options["probes_dir"],
            device="cpu",
        )
        seen.append((probe.weights, options["experiment_dir"]))
        import pandas as pd

        return pd.DataFrame({"letter": ["a"], "f1_probe": [0.1]})

    monkeypatch.setattr(absorption_main, "run_k_sparse_probing_experiment", k_sparse)
    settings = check_settings("absorption", {"prompt_token_pos": -2, "prompt_template": "{word}:"})
    outcomes = run("absorption", context, settings, subjects, tmp_path / "out")
    for outcome in outcomes.values():
        assert outcome.status == "not_measurable"
        assert outcome.reason.startswith("fewer than 20 first letters can be read off")
    assert trained == [[1]]
    # One epoch on a model that cannot spell leaves some of the weights NaN.
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=0, atol=0, equal_nan=True)
    # Nothing of it where SAEBench would keep it: inside its own package.
    assert all(absorption_common.RESULTS_DIR not in Path(path).parents for _, path in seen)
    assert absorption_main.run_k_sparse_probing_experiment is k_sparse


def test_autointerp_with_a_judge_of_ours(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = check_settings(
        "autointerp",
        {
            "n_latents": 2,
            "total_tokens": 1500,
            "llm_context_size": 32,
            "llm_batch_size": 4,
            "dead_latent_threshold": 0,
            "dataset_name": "some/text",
            "datasets": {"some/text": str(text_file)},
        },
    )
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    outcome = run("autointerp", context, settings, subjects[:1], tmp_path / "out")["standard"]
    assert (outcome.status, "OPENAI_API_KEY" in outcome.reason) == ("failed", True)

    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    asked: list[Any] = []

    class Judge:
        def __init__(self, api_key: str) -> None:
            assert api_key == "a-key"
            self.chat = SimpleNamespace(completions=self)

        def create(self, **request: Any) -> Any:
            asked.append(request["messages"])
            scoring = "Here are the examples" in request["messages"][-1]["content"]
            content = "1, 2" if scoring else "This neuron activates on notes"
            return SimpleNamespace(
                choices=[SimpleNamespace(message=SimpleNamespace(content=content))]
            )

    monkeypatch.setattr(autointerp_main, "OpenAI", Judge)
    outcome = run("autointerp", context, settings, subjects[:1], tmp_path / "out")["standard"]
    assert outcome.status == "measured", outcome.reason
    assert outcome.metrics.keys() == {"autointerp_score", "autointerp_std_dev"}
    assert len(asked) == 4  # two latents, explained and scored
    assert "a-key" not in outcome.file.read_text()


def test_ravel_gets_model_prompts_and_paths_handed_in(
    context: ModelContext,
    subjects: list[EvaluatedSAE],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "ravel_city_entity_attributes.json").write_text("{}")
    named = dataclasses.replace(context, name=str(tiny_model_dir))
    loaded: list[Any] = []

    def run_eval(config: Any, selected_saes: Any, output_path: str, **_: Any) -> None:
        name = ravel_main.LLM_NAME_MAP[config.model_name]
        model = ravel_main.AutoModelForCausalLM.from_pretrained(
            name, device_map="cpu", torch_dtype=torch.float32
        )
        tokenizer = ravel_main.AutoTokenizer.from_pretrained(name)
        base = Path(config.artifact_dir) / "base"
        known = sorted(path.name for path in base.parent.rglob("*.json"))
        ravel_instance.snapshot_download(
            repo_id="adamkarvonen/ravel_prompts",
            repo_type="dataset",
            local_dir=str(base),
            local_dir_use_symlinks=False,
            allow_patterns="*.json",
        )
        (base.parent / "completions.json").write_text("{}")
        loaded.append((type(model).__name__, len(tokenizer), config.llm_batch_size, known))
        assert (base / "ravel_city_entity_attributes.json").is_file()
        ravel = {"disentanglement_score": 0.5, "cause_score": 0.25, "isolation_score": 0.75}
        Path(output_path, f"{selected_saes[0][0]}_custom_sae_eval_results.json").write_text(
            json.dumps({"eval_result_metrics": {"ravel": ravel}})
        )

    monkeypatch.setattr(ravel_main, "run_eval", run_eval)
    settings = check_settings("ravel", {"datasets": {"adamkarvonen/ravel_prompts": str(prompts)}})
    outcomes = run("ravel", named, settings, subjects, tmp_path / "out")
    assert [o.metrics["cause_score"] for o in outcomes.values()] == [0.25, 0.25]
    first, second = loaded
    assert first == ("LlamaForCausalLM", 512, 8, [])
    # What the model completed serves the second SAE too.
    assert second[3] == ["completions.json", "ravel_city_entity_attributes.json"]


def test_every_metric_has_a_definition() -> None:
    assert set(reliability()) == {
        "absorption", "scr", "tpp", "ravel", "autointerp", "meta_structure",
    }  # fmt: skip
    scr = definition_of("scr", "scr_metric_threshold_10")
    assert scr.definition.startswith("SCR Metric (selecting dir1")
    assert "discredited" in scr.definition
    assert "2605.18229" in scr.definition
    assert (scr.unit, scr.higher_is_better, scr.source) == (
        "share of the probe's bias removed",
        True,
        "saebench",
    )
    absorption = definition_of("absorption", "mean_absorption_fraction_score")
    assert absorption.higher_is_better is False
    assert "not comparable with published numbers" in absorption.definition
    assert definition_of("absorption", "mean_num_split_features").unit == "latents per letter"
    unintended = definition_of("tpp", "tpp_threshold_2_unintended_diff_only")
    assert (unintended.unit, unintended.higher_is_better) == ("difference of two accuracies", False)
    with pytest.raises(KeyError):
        definition_of("ravel", "no_such_metric")
    assert "OPENAI_API_KEY" not in os.environ or os.environ["OPENAI_API_KEY"]
