"""Unlearning on the toy model: the score is SAEBench's own, and training an SAE matters to it."""

import json
import os
import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_builders import run
from sae_bench.evals.unlearning import main as unlearning_main
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.utils import eval as unlearning_eval
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from sae_bench.evals.unlearning.utils.var import GEMMA_INST_FORMAT
from sae_lens import SAE
from toy_instruct.prepare import TOY_HOOK, ToyInstruct, prepare_toy_instruct
from toy_instruct.saes import toy_activations, train_toy_sae, untrained_toy_sae

from msae_plugin.common.files import tensors_sha256
from msae_plugin.common.progress import warnings_alone
from msae_plugin.evaluation.outcomes import ModelContext, ScoreResult
from msae_plugin.evaluation.saebench.instruct_model import LetterAnswers, chat_format, letter_tokens
from msae_plugin.evaluation.saebench.patching import replaced, seeded, without_jaxtyping
from msae_plugin.models.loading import LanguageModel, load_language_model
from msae_plugin.saes.load import EvaluatedSAE

run_unlearning = partial(run, "unlearning")
SEED = 42
GEMMA = "gemma-2-2b-it"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyInstruct:
    return prepare_toy_instruct(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def toy_model(toy: ToyInstruct) -> LanguageModel:
    return load_language_model(str(toy.folder), [TOY_HOOK])


@pytest.fixture(scope="module")
def settings(toy: ToyInstruct) -> dict[str, Any]:
    return toy.unlearning_settings()


@pytest.fixture(scope="module")
def toy_context(toy_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    return ModelContext(
        language_model=toy_model,
        weights_sha256=tensors_sha256(toy_model.model.state_dict()),
        dtype="float32",
        device="cpu",
        name="toy-instruct",
        cache=tmp_path_factory.mktemp("cache"),
    )


def as_subject(sae: SAE[Any], name: str) -> EvaluatedSAE:
    return EvaluatedSAE(name, name, sae, tensors_sha256(sae.state_dict()), "toy-instruct", TOY_HOOK)


@pytest.fixture(scope="module")
def toy_subjects(toy: ToyInstruct, toy_model: LanguageModel) -> list[EvaluatedSAE]:
    activations = toy_activations(toy, toy_model)
    return [
        as_subject(make(toy, toy_model, seed, activations=activations), f"{name}{seed}")
        for seed in (0, 2)
        for name, make in (("trained", train_toy_sae), ("untrained", untrained_toy_sae))
    ]


@pytest.fixture(scope="module")
def outcomes(
    toy_context: ModelContext,
    settings: Mapping[str, Any],
    toy_subjects: list[EvaluatedSAE],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, ScoreResult]:
    output = tmp_path_factory.mktemp("out")
    return run_unlearning(toy_context, settings, toy_subjects, SEED, output, warnings_alone)


def test_a_trained_sae_takes_more_of_the_subject_away_than_an_untrained_one(
    outcomes: Mapping[str, ScoreResult],
) -> None:
    assert {o.status for o in outcomes.values()} == {"measured"}
    # An SAE whose latents are all active on the text to retain has nothing to clamp, and no
    # accuracy after clamping: the model then answers every question as before.
    assert all(
        ("lowest_forget_accuracy" in o.metrics) == (o.metrics["n_interventions"] > 0)
        for o in outcomes.values()
    )
    left = {name: o.metrics.get("lowest_forget_accuracy", 1.0) for name, o in outcomes.items()}
    trained, untrained = (min(left[f"{n}0"], left[f"{n}2"]) for n in ("trained", "untrained"))
    # The better of two seeds: which of them finds the subject's latent depends on the processor's
    # rounding. .54 was measured with both, and 1.
    assert trained < untrained - 0.2


def test_a_trained_sae_scores_and_an_untrained_one_does_not(
    outcomes: Mapping[str, ScoreResult],
) -> None:
    scores = {name: outcome.metrics["unlearning_score"] for name, outcome in outcomes.items()}
    # docs/evaluation.md has more seeds. A question is 1/24. The better of two, as above.
    assert max(scores["trained0"], scores["trained2"]) > 0.2
    assert max(scores["untrained0"], scores["untrained2"]) < 0.1


def test_the_prompt_and_the_probabilities_are_saebenchs_own_for_gemmas_template(
    toy: ToyInstruct, toy_model: LanguageModel
) -> None:
    model, tokenizer = toy_model.model, toy_model.tokenizer
    chat = chat_format(tokenizer, "toy")
    assert chat.for_saebench == GEMMA_INST_FORMAT
    name, questions = next(iter(toy.load_questions().items()))
    prompts = [
        metrics.convert_wmdp_data_to_prompt(
            question.question, list(question.choices), prompt_format="GEMMA_INST_FORMAT"
        )
        for question in questions[:6]
    ]
    ours = LetterAnswers(model, chat, letter_tokens(tokenizer, name))(model, prompts, 4, 2)
    with replaced(model.cfg, "model_name", GEMMA):
        theirs = metrics.get_output_probs_abcd(model, prompts, 4, 2, verbose=False)
    torch.testing.assert_close(ours, theirs)


def test_the_score_is_saebenchs_own(
    toy: ToyInstruct,
    toy_model: LanguageModel,
    settings: Mapping[str, Any],
    toy_subjects: list[EvaluatedSAE],
    outcomes: Mapping[str, ScoreResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SAEBench called directly, its files where it opens them, its data sets handed in."""
    corpus = tmp_path / "sae_bench" / "evals" / "unlearning" / "data" / "bio-forget-corpus.jsonl"
    corpus.parent.mkdir(parents=True)
    corpus.write_text(toy.forget_corpus.read_text())
    retain = [json.loads(line) for line in toy.retain_corpus.read_text().splitlines()]
    asked = {name: json.loads(path.read_text()) for name, path in toy.questions.items()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(feature_activation, "load_dataset", lambda *_, **__: retain)
    monkeypatch.setattr(metrics, "load_dataset", lambda path, name, split: asked[name])
    config = UnlearningEvalConfig(
        model_name=GEMMA,
        random_seed=SEED,
        llm_dtype="float32",
        **{
            key: settings[key]
            for key in ("dataset_names", "dataset_size", "seq_len", "n_features_list",
                        "multipliers", "retain_thresholds", "llm_batch_size")
        },
    )  # fmt: skip
    subject = toy_subjects[0]
    sae = subject.for_saebench(torch.float32, "cpu")
    sae.cfg.hook_layer, sae.cfg.hook_name = 0, TOY_HOOK
    with seeded(SEED), without_jaxtyping(), replaced(toy_model.model.cfg, "model_name", GEMMA):
        random.seed(SEED)
        torch.manual_seed(SEED)
        unlearning_eval.run_eval_single_sae(
            toy_model.model, sae, config, str(tmp_path / "a"), "x", force_rerun=True
        )
    frame = unlearning_main.get_metrics_df(str(tmp_path / "a" / "x" / "results" / "metrics"))
    expected = float(unlearning_main.get_unlearning_scores(frame))
    assert outcomes[subject.name].metrics["unlearning_score"] == pytest.approx(expected)


def test_saebenchs_own_command_refuses_the_model(tmp_path: Path) -> None:
    config = UnlearningEvalConfig(model_name="toy", llm_batch_size=4, llm_dtype="float32")
    with pytest.raises(ValueError, match="instruct tuned"):
        unlearning_main.run_eval(config, [], "cpu", str(tmp_path))


def test_the_json_says_what_was_really_asked(outcomes: Mapping[str, ScoreResult]) -> None:
    file = outcomes["trained0"].file
    assert file is not None
    stored = json.loads(file.read_text())
    assert stored["eval_type_id"] == "unlearning"
    score = stored["eval_result_metrics"]["unlearning"]["unlearning_score"]
    assert score == pytest.approx(outcomes["trained0"].metrics["unlearning_score"])
    # Other questions under SAEBench's name of them are never mistaken for WMDP's.
    assert "forget" in json.dumps(stored["eval_result_unstructured"])
    assert os.sep in json.dumps(stored["eval_result_unstructured"])


def test_a_model_that_knows_nothing_is_a_named_outcome(
    toy: ToyInstruct, settings: Mapping[str, Any], toy_subjects: list[EvaluatedSAE], tmp_path: Path
) -> None:
    ignorant = load_language_model(str(toy.folder), [TOY_HOOK])
    torch.manual_seed(0)
    for parameter in ignorant.model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    context = ModelContext(
        language_model=ignorant,
        weights_sha256=tensors_sha256(ignorant.model.state_dict()),
        dtype="float32",
        device="cpu",
        name="toy-instruct",
        cache=tmp_path / "cache",
    )
    found = run_unlearning(
        context, settings, toy_subjects[:1], SEED, tmp_path / "out", warnings_alone
    )
    outcome = found["trained0"]
    assert outcome.status == "not_measurable"
    assert outcome.reason is not None
    assert outcome.reason.startswith("no answerable question: 0 of ")


def test_nothing_stays_changed(
    outcomes: Mapping[str, ScoreResult], toy_model: LanguageModel
) -> None:
    assert outcomes
    assert torch.is_grad_enabled()
    assert metrics.GEMMA_INST_FORMAT == GEMMA_INST_FORMAT
    assert metrics.get_output_probs_abcd.__module__ == metrics.__name__
    assert metrics.load_dataset_with_retries.__module__ == metrics.__name__
    assert feature_activation.get_forget_retain_data.__module__ == feature_activation.__name__
    assert toy_model.model.cfg.model_name != GEMMA
    assert not any(point.fwd_hooks for point in toy_model.model.hook_dict.values())
