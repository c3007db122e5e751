"""SAEBench's unlearning evaluation, for any instruct model, questions and texts.

Features that are active on text about a subject and not on other text are clamped to negative
values; the score is how many of the subject's questions the model then gets wrong while it keeps
99 % of the others. All of it is SAEBench's code; what it loads by name is handed in.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.eval_output import (
    UnlearningEvalOutput,
    UnlearningMetricCategories,
    UnlearningMetrics,
)
from sae_bench.evals.unlearning.main import get_metrics_df, get_unlearning_scores
from sae_bench.evals.unlearning.utils.eval import run_eval_single_sae
from sae_bench.evals.unlearning.utils.feature_activation import (
    get_top_features,
    load_sparsity_data,
)
from sae_bench.sae_bench_utils import general_utils
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

from msae_plugin.common.errors import InputError, Problem, RunFailure
from msae_plugin.evaluation.metrics import definitions
from msae_plugin.evaluation.outcomes import (
    ModelContext,
    Reporter,
    ScoreResult,
    no_report,
    require_real,
)
from msae_plugin.evaluation.saebench.each_sae import evaluate_each, write_result
from msae_plugin.evaluation.saebench.patching import evaluation_environment
from msae_plugin.evaluation.saebench.unlearning.data import (
    FORGET_DATASET,
    OUTSIDE_SCORE,
    WIKITEXT,
    Corpus,
    UnlearningSettings,
    load_corpora,
    load_questions,
    load_wikitext,
    read_settings,
    require_corpus_file,
)
from msae_plugin.evaluation.saebench.unlearning.model import (
    ChatFormat,
    Knowledge,
    LetterAnswers,
    adapted,
    chat_format,
    corpora_and_sweep,
    find_knowledge,
    letter_tokens,
)
from msae_plugin.saes.load import EvaluatedSAE

RETAINED = 0.99
"""The accuracy on the questions to retain below which SAEBench ignores an intervention."""

DEFINITIONS = definitions("unlearning")
"""Every metric of `run_unlearning`."""


@dataclass(frozen=True)
class Sweep:
    """All interventions of one SAE.

    Args:
        score: SAEBench's.
        interventions: A row of SAEBench's table for each: accuracy by questions' name, `n_features`
            (those really clamped), `multiplier`, `retain_thres`, `all_side_effects_mcq`.
        features: How many features qualify, by retain threshold.
    """

    score: float
    interventions: list[dict[str, Any]]
    features: dict[float, int]

    def metrics(self) -> dict[str, float]:
        """Numbers by name, less the accuracies where there was nothing to clamp."""
        clamping = [row for row in self.interventions if row["n_features"] > 0]
        numbers = {
            "unlearning_score": self.score,
            "n_forget_features": float(max(self.features.values())),
            "n_interventions": float(len(clamping)),
            "n_qualifying_interventions": float(
                sum(row["all_side_effects_mcq"] >= RETAINED for row in clamping)
            ),
        }
        if clamping:
            numbers["best_retained_accuracy"] = max(row["all_side_effects_mcq"] for row in clamping)
            numbers["lowest_forget_accuracy"] = min(row[FORGET_DATASET] for row in clamping)
        return numbers

    def notes(self, wanted: Sequence[int]) -> list[str]:
        """Where fewer features qualified than were to be clamped."""
        return [
            f"retain threshold {threshold}: {count} features qualify, so n_features "
            f"{', '.join(str(n) for n in sorted(set(wanted)) if n > count)} clamps {count}"
            for threshold, count in self.features.items()
            if count < max(wanted)
        ]


def read_sweep(artifacts: Path, name: str, config: UnlearningEvalConfig) -> Sweep:
    """Read what SAEBench's `run_eval_single_sae` has left.

    Raises:
        RunFailure: A feature's frequency is NaN: nothing qualifies then, and the score says 0.
    """
    forget, retain = load_sparsity_data(str(artifacts), name)
    forget, retain = np.atleast_1d(forget), np.atleast_1d(retain)  # an SAE of one latent
    if not (np.isfinite(forget).all() and np.isfinite(retain).all()):
        raise RunFailure("unlearning: a feature's frequency is not a number: is the SAE trained?")
    table = get_metrics_df(str(artifacts / name / "results" / "metrics"))
    rows = cast("list[dict[str, Any]]", table.to_dict("records"))
    score = float(get_unlearning_scores(table))
    return Sweep(
        score=score,
        interventions=sorted(
            rows, key=lambda row: (row["retain_thres"], row["n_features"], row["multiplier"])
        ),
        features={
            threshold: len(get_top_features(forget, retain, retain_threshold=threshold))
            for threshold in config.retain_thresholds
        },
    )


FORGET_CORPUS_FORM = "https://huggingface.co/datasets/cais/wmdp-corpora"


def run_unlearning(
    context: ModelContext,
    settings: Mapping[str, Any],
    saes: Sequence[EvaluatedSAE],
    seed: int,
    output: Path,
    report: Reporter = no_report,
) -> dict[str, ScoreResult]:
    """Evaluate SAEs with SAEBench's unlearning evaluation.

    Returns:
        An outcome per SAE; `not_measurable` for all where the model knows none of the questions
        to forget, or none of those to retain.

    Raises:
        InputError: The model is no instruct model, a setting is wrong, or data cannot be had.
        RunFailure: The model cannot take the questions.
    """
    given = read_settings(settings, model_name=context.name, dtype=context.dtype, seed=seed)
    model, chat, answers = _instruct_model(context, given)
    report("unlearning: reading questions and texts")
    questions = {
        name: load_questions(name, given.questions.get(name)) for name in given.config.dataset_names
    }
    forget, retain = load_corpora(given.forget_corpus, given.retain_corpus)
    with adapted(model, chat, answers, questions):
        knowledge = find_knowledge(
            context, model, answers, questions, given.question_batch_size, report
        )
    reason = _nothing_to_measure(knowledge)
    if reason is not None:
        return {evaluated.name: ScoreResult("not_measurable", reason=reason) for evaluated in saes}
    evaluation = _Evaluation(context, given.config, model, chat, answers, knowledge, forget, retain)
    output.mkdir(parents=True, exist_ok=True)
    return evaluate_each(
        "unlearning", saes, lambda evaluated: evaluation.run(evaluated, output, report), report
    )


def missing_for_unlearning(
    settings: Mapping[str, Any], tokenizer_folder: Path | None
) -> list[Problem]:
    """List what the evaluation lacks, without loading a model.

    Questions and texts that are on the hub alone are fetched here: they are small.

    Raises:
        InputError: A setting is wrong.
    """
    given = read_settings(settings)
    missing = _missing_corpora(given)
    for name in given.config.dataset_names:
        try:
            load_questions(name, given.questions.get(name))
        except InputError as error:
            how = (
                "name a local copy (.json, .jsonl, .parquet or .csv with the columns question, "
                f"choices, answer) as unlearning.questions.{name}"
            )
            missing.append(Problem(error.what, how))
    if tokenizer_folder is not None:
        missing += _missing_in_tokenizer(tokenizer_folder)
    return missing


def _missing_corpora(given: UnlearningSettings) -> list[Problem]:
    missing: list[Problem] = []
    if not given.forget_corpus:
        missing.append(
            Problem(
                "unlearning.forget_corpus, the text on what is to be forgotten",
                "SAEBench's, bio-forget-corpus.jsonl, is gated: request access as "
                f"{FORGET_CORPUS_FORM} says, and give the path of the file; or give another text "
                "(.jsonl with {'text'}, or .txt) that goes with the questions",
            )
        )
    for field, source in (
        ("forget_corpus", given.forget_corpus),
        ("retain_corpus", given.retain_corpus),
    ):
        try:
            if field == "retain_corpus" and source == WIKITEXT:
                load_wikitext()
            elif source:
                require_corpus_file(field, source)
        except InputError as error:
            missing.append(Problem(error.what, f"correct unlearning.{field}"))
    return missing


def _missing_in_tokenizer(folder: Path) -> list[Problem]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        chat_format(tokenizer, str(folder))
        letter_tokens(tokenizer, str(folder))
    except InputError as error:
        return [Problem(error.what, "choose another instruct model as unlearning.model")]
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:150]
        return [Problem(f"unlearning: {folder} has no usable tokenizer ({reason})", "save one")]
    return []


def _instruct_model(
    context: ModelContext, given: UnlearningSettings
) -> tuple[HookedTransformer, ChatFormat, LetterAnswers]:
    model = context.language_model.model
    if not isinstance(model, HookedTransformer):
        raise InputError(
            "unlearning: SAEBench intervenes in a HookedTransformer",
            "load the model with a hook such as blocks.9.hook_resid_post",
        )
    if given.config.seq_len > model.cfg.n_ctx:
        raise InputError(
            f"unlearning.seq_len is {given.config.seq_len}, longer than the model's context of "
            f"{model.cfg.n_ctx}",
            "lower it",
        )
    tokenizer = context.language_model.tokenizer
    chat = chat_format(
        tokenizer, context.name, default_prepend_bos=bool(model.cfg.default_prepend_bos)
    )
    return model, chat, LetterAnswers(model, chat, letter_tokens(tokenizer, context.name))


def _nothing_to_measure(knowledge: Mapping[str, Knowledge]) -> str | None:
    """Why no SAE can be measured; None where it can."""
    unknown = {name: found for name, found in knowledge.items() if not found.answerable}
    retained = [name for name in knowledge if name not in OUTSIDE_SCORE]
    if FORGET_DATASET in unknown:
        names = [FORGET_DATASET]
    elif all(name in unknown for name in retained):
        names = retained
    else:
        return None
    counts = ", ".join(f"0 of {len(unknown[name].questions.rows)} in {name}" for name in names)
    return (
        f"no answerable question: {counts} answered right in all 24 orders of the choices; "
        "unlearning needs an instruct model that knows the subject"
    )


@dataclass(frozen=True)
class _Evaluation:
    """The settings, texts and questions that all SAEs of one call share."""

    context: ModelContext
    config: UnlearningEvalConfig
    model: HookedTransformer
    chat: ChatFormat
    answers: LetterAnswers
    knowledge: Mapping[str, Knowledge]
    forget: Corpus
    retain: Corpus

    @property
    def asked(self) -> UnlearningEvalConfig:
        """The settings without questions of which none is answerable.

        SAEBench's own code fails on such a set; it would add nothing to the pooled accuracy.
        """
        known = [name for name, found in self.knowledge.items() if found.answerable]
        return replace(self.config, dataset_names=known)

    def run(self, evaluated: EvaluatedSAE, output: Path, report: Reporter) -> ScoreResult:
        """Evaluate one SAE."""
        _require_hook(evaluated, self.model)
        _require_double_decode(evaluated)
        config = self.config
        sae = evaluated.for_saebench(self.context.torch_dtype, self.context.device)
        general_utils.load_and_format_sae(evaluated.name, sae, self.context.device)
        windows = _WindowsHash()
        questions = {name: found.questions for name, found in self.knowledge.items()}
        with (
            tempfile.TemporaryDirectory(prefix="msae-unlearning-") as folder,
            adapted(self.model, self.chat, self.answers, questions),
            corpora_and_sweep(
                self.forget,
                self.retain,
                windows,
                lambda done, total: report(f"unlearning: {evaluated.name}", done, total),
            ),
            evaluation_environment(config.random_seed),
        ):
            artifacts = Path(folder)
            for found in self.knowledge.values():
                found.copy_to(artifacts)
            run_eval_single_sae(
                self.model, sae, self.asked, folder, evaluated.name, force_rerun=False
            )
            sweep = read_sweep(artifacts, evaluated.name, self.asked)
        metrics = {**sweep.metrics(), **self._answerable()}
        require_real(metrics, f"unlearning of {evaluated.name}")
        file = write_result(
            UnlearningEvalOutput,
            config,
            evaluated,
            sae,
            output,
            eval_result_metrics=UnlearningMetricCategories(
                unlearning=UnlearningMetrics(unlearning_score=sweep.score)
            ),
            eval_result_details=[],
            eval_result_unstructured=self._what_was_used(sweep),
        )
        return ScoreResult("measured", metrics, file, facts={"text": windows.sha256})

    def _answerable(self) -> dict[str, float]:
        retained = [f.answerable for n, f in self.knowledge.items() if n not in OUTSIDE_SCORE]
        return {
            "n_answerable_forget": float(self.knowledge[FORGET_DATASET].answerable),
            "n_answerable_retain": float(sum(retained)),
        }

    def _what_was_used(self, sweep: Sweep) -> dict[str, Any]:
        """Facts that SAEBench's schema has no field for; the questions may not be WMDP's."""
        return {
            "questions": {
                name: {
                    "source": found.questions.source,
                    "sha256": found.questions.sha256,
                    "number": len(found.questions.rows),
                    "answerable": found.answerable,
                }
                for name, found in self.knowledge.items()
            },
            "corpora": {
                name: {
                    "source": corpus.source,
                    "sha256": corpus.sha256,
                    "documents": len(corpus.documents),
                }
                for name, corpus in (("forget", self.forget), ("retain", self.retain))
            },
            "prompt_format": self.chat.for_saebench,
            "first_position": (
                "BOS: never intervened at"
                if self.chat.has_bos
                else "the first token of the prompt, for want of BOS: never intervened at"
            ),
            "qualifying_features": {str(k): count for k, count in sweep.features.items()},
            "interventions": sweep.interventions,
            "notes": sweep.notes(self.config.n_features_list),
        }


class _WindowsHash:
    """Remembers which windows of tokens the features were counted on."""

    def __init__(self) -> None:
        self.sha256 = ""

    def __call__(self, forget: torch.Tensor, retain: torch.Tensor) -> None:
        # Sorted: the order of the windows changes no count.
        content = [sorted(windows.tolist()) for windows in (forget, retain)]
        self.sha256 = hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _require_hook(evaluated: EvaluatedSAE, model: HookedTransformer) -> None:
    if evaluated.hook_name not in model.hook_dict:
        raise RunFailure(f"the model has no hook {evaluated.hook_name!r}, where this SAE reads")


def _require_double_decode(evaluated: EvaluatedSAE) -> None:
    """SAELens keeps these statistics of a token from `encode` to the first `decode` alone."""
    normalisation = evaluated.sae.cfg.normalize_activations
    if normalisation in ("layer_norm", "constant_norm_rescale"):
        raise RunFailure(
            f"SAEBench decodes twice per encode, which SAELens' normalize_activations="
            f"{normalisation!r} cannot: this SAE cannot be measured"
        )
