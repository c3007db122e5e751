"""SAEBench's unlearning evaluation, for any instruct model, questions and texts.

Features that are active on text about a subject and not on other text are clamped to negative
values; the score is how many of the subject's questions the model then gets wrong while it keeps
99 % of the others. All of it is SAEBench's code; what it loads by name is handed in.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import datasets.config
import numpy as np
import torch
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.eval_output import (
    UnlearningEvalOutput,
    UnlearningMetricCategories,
    UnlearningMetrics,
)
from sae_bench.evals.unlearning.main import get_metrics_df, get_unlearning_scores
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from sae_bench.evals.unlearning.utils.eval import run_eval_single_sae
from sae_bench.evals.unlearning.utils.feature_activation import get_top_features, load_sparsity_data
from sae_bench.sae_bench_utils import general_utils
from transformers import AutoTokenizer
from typing_extensions import override

from msae_plugin.common.errors import InputError, Problem, RunFailure
from msae_plugin.data.labelled_texts import in_datasets_cache
from msae_plugin.data.text_files import (
    is_saved_dataset,
    open_text,
    read_column,
    read_rows,
    saved_dataset,
)
from msae_plugin.evaluation.outcomes import ScoreResult, require_real
from msae_plugin.evaluation.saebench.adapter import Adapter, saebench_config
from msae_plugin.evaluation.saebench.instruct_model import (
    Documents,
    Knowledge,
    LetterAnswers,
    Questions,
    adapted,
    chat_format,
    corpora_and_sweep,
    find_knowledge,
    instruct_model,
    json_sha256,
    letter_tokens,
)
from msae_plugin.evaluation.saebench.patching import replaced
from msae_plugin.models.hub_access import require_repository
from msae_plugin.saes.load import EvaluatedSAE

FORGET_DATASET = "wmdp-bio"
"""The questions that SAEBench's score is computed on, whatever they really are."""

OUTSIDE_SCORE = frozenset({FORGET_DATASET, "college_biology"})
"""Questions that SAEBench does not count among those to retain (`get_metrics_df`)."""

WIKITEXT = "wikitext"
"""SAEBench's own text to retain."""

_DATASET_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# `get_params` of SAEBench's main.py finds these in the names of its files.
_THRESHOLD = re.compile(r"\d+(\.\d+)?")


_COLUMNS = ("question", "choices", "answer")
_CHOICES = 4
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")


class Unlearning(Adapter):
    """The model is asked what it knows, then SAEBench's function clamps features SAE by SAE."""

    @override
    def prepare(self) -> dict[str, ScoreResult]:
        config: UnlearningEvalConfig = self.config()
        check_config(config, self.settings)
        model = instruct_model(self.context)
        if config.seq_len > model.cfg.n_ctx:
            raise InputError(
                f"unlearning.seq_len is {config.seq_len}, longer than the model's context of "
                f"{model.cfg.n_ctx}",
                "lower it",
            )
        tokenizer, name = self.context.language_model.tokenizer, self.context.name
        bos = bool(model.cfg.default_prepend_bos)
        self._model, self._chat = model, chat_format(tokenizer, name, default_prepend_bos=bos)
        self._answers = LetterAnswers(model, self._chat, letter_tokens(tokenizer, name))
        self.report("unlearning: reading questions and texts")
        sources: Mapping[str, str] = self.settings.get("questions") or {}
        self._questions = {n: load_questions(n, sources.get(n)) for n in config.dataset_names}
        self._forget, self._retain = (
            load_corpus(key, self.settings.get(key)) for key in ("forget_corpus", "retain_corpus")
        )
        with adapted(model, self._chat, self._answers, self._questions):
            self._knowledge = find_knowledge(
                self.context,
                self._answers,
                self._questions,
                config.llm_batch_size * 2,  # of text; questions take twice as many
                self.report,
            )
        # SAEBench's own code fails on questions of which none is answerable; they would add nothing
        # to the pooled accuracy.
        known = [name for name, found in self._knowledge.items() if found.answerable]
        self._config, self._asked = config, dataclasses.replace(config, dataset_names=known)
        reason = _nothing_to_measure(self._knowledge)
        nothing = ScoreResult("not_measurable", reason=reason)
        return {} if reason is None else {evaluated.name: nothing for evaluated in self.saes}

    @override
    def restore(self) -> None:
        """`hooks_set_aside` does it."""

    @override
    def evaluate(self, evaluated: EvaluatedSAE) -> ScoreResult:
        if evaluated.hook_name not in self._model.hook_dict:
            raise RunFailure(f"the model has no hook {evaluated.hook_name!r}, where this SAE reads")
        normalisation = evaluated.sae.cfg.normalize_activations
        # SAELens keeps statistics of a token from `encode` to the first `decode` alone.
        if normalisation in ("layer_norm", "constant_norm_rescale"):
            raise RunFailure(
                f"SAEBench decodes twice per encode, which SAELens' normalize_activations="
                f"{normalisation!r} cannot: this SAE cannot be measured"
            )
        sae = self.copy_of(evaluated)
        general_utils.load_and_format_sae(evaluated.name, sae, self.context.device)
        seen: list[str] = []

        def windows_seen(*windows: torch.Tensor) -> None:
            # Sorted: the order of the windows changes no count.
            seen.append(json_sha256([sorted(part.tolist()) for part in windows]))

        with (
            tempfile.TemporaryDirectory(prefix="msae-unlearning-") as folder,
            adapted(self._model, self._chat, self._answers, self._questions),
            corpora_and_sweep(
                self._forget,
                self._retain,
                windows_seen,
                lambda done, total: self.report(f"unlearning: {evaluated.name}", done, total),
            ),
        ):
            for found in self._knowledge.values():
                found.copy_to(Path(folder))
            run_eval_single_sae(
                self._model, sae, self._asked, folder, evaluated.name, force_rerun=False
            )
            sweep = read_sweep(Path(folder), evaluated.name, self._asked)
        known = {name: float(found.answerable) for name, found in self._knowledge.items()}
        numbers = {
            **sweep.metrics(),
            "n_answerable_forget": known[FORGET_DATASET],
            "n_answerable_retain": sum(known[n] for n in known if n not in OUTSIDE_SCORE),
        }
        require_real(numbers, f"unlearning of {evaluated.name}")
        file = self.write_result(
            UnlearningEvalOutput,
            self._config,
            evaluated,
            sae,
            eval_result_metrics=UnlearningMetricCategories(
                unlearning=UnlearningMetrics(unlearning_score=sweep.score)
            ),
            eval_result_details=[],
            eval_result_unstructured=self._what_was_used(sweep),
        )
        return ScoreResult("measured", numbers, file, facts={"text": seen[-1] if seen else ""})

    def _what_was_used(self, sweep: Sweep) -> dict[str, Any]:
        """Facts that SAEBench's schema has no field for; the questions may not be WMDP's."""
        return {
            "questions": {
                name: {
                    **_facts(found.questions.source, found.questions.rows, "number"),
                    "answerable": found.answerable,
                }
                for name, found in self._knowledge.items()
            },
            "corpora": {
                name: _facts(corpus.source, corpus.documents, "documents")
                for name, corpus in (("forget", self._forget), ("retain", self._retain))
            },
            "prompt_format": self._chat.for_saebench,
            "first_position": (
                "BOS: never intervened at"
                if self._chat.has_bos
                else "the first token of the prompt, for want of BOS: never intervened at"
            ),
            "qualifying_features": {str(k): count for k, count in sweep.features.items()},
            "interventions": sweep.interventions,
            "notes": sweep.notes(self._config.n_features_list),
        }


def _facts(source: str, content: Sequence[Any], counted: str) -> dict[str, Any]:
    return {"source": source, "sha256": json_sha256(content), counted: len(content)}


RETAINED = 0.99
"""The accuracy on the questions to retain below which SAEBench ignores an intervention."""


@dataclass(frozen=True)
class Sweep:
    """All interventions of one SAE."""

    score: float  # SAEBench's
    # A row of SAEBench's table for each: accuracy by questions' name, `n_features` (those really
    # clamped), `multiplier`, `retain_thres`, `all_side_effects_mcq`.
    interventions: list[dict[str, Any]]
    features: dict[float, int]  # how many features qualify, by retain threshold

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
    """Read what SAEBench's `run_eval_single_sae` has left."""
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


def check_config(config: UnlearningEvalConfig, settings: Mapping[str, Any]) -> None:
    """Refuse settings that SAEBench offers but cannot run with."""
    for refusal in _refusals(config, settings):
        raise InputError(f"unlearning.{refusal}")


def _refusals(config: UnlearningEvalConfig, settings: Mapping[str, Any]) -> Iterator[str]:
    names = config.dataset_names
    if (metric := config.target_metric) != "correct":
        yield (
            f"target_metric must be correct, got {metric!r}: SAEBench writes the other question "
            "ids under names that it does not read"
        )
    if (method := config.intervention_method) != "clamp_feature_activation":
        yield (
            f"intervention_method must be clamp_feature_activation, got {method!r}: SAEBench "
            "implements no other"
        )
    if not config.save_metrics:
        yield "save_metrics must be true: the score is read from these files"
    if FORGET_DATASET not in names:
        yield (
            f"dataset_names must have {FORGET_DATASET}, the questions that SAEBench's score is "
            "computed on; other questions are put in its place with unlearning.questions"
        )
    if not set(names) - OUTSIDE_SCORE:
        yield (
            f"dataset_names has no questions to retain: SAEBench counts neither {FORGET_DATASET} "
            "nor college_biology among them"
        )
    if len({name.replace("_", "-") for name in names}) < len(names):
        yield "dataset_names has two names that SAEBench cannot tell apart"
    for name in names:
        if not _DATASET_NAME.fullmatch(name) or name == "loss_added":
            yield (
                f"dataset_names: {name!r} cannot name questions; use letters, digits, _, - and . "
                "only, and put a path or a hub name in unlearning.questions"
            )
    for threshold in config.retain_thresholds:
        if not _THRESHOLD.fullmatch(str(threshold)):
            yield (
                f"retain_thresholds: {threshold} cannot be read back from SAEBench's file names: "
                "use numbers of at least 0.0001"
            )
    if config.seq_len < 2:
        yield f"seq_len must be at least 2, got {config.seq_len}"
    for name in settings.get("questions") or {}:
        if name not in names:
            yield f"questions has {name!r}, which is not in dataset_names"


def missing_for_unlearning(
    settings: Mapping[str, Any], tokenizer_folder: Path | None
) -> list[Problem]:
    """List what the evaluation lacks, without loading a model.

    Questions and texts that are on the hub alone are fetched here: they are small.
    """
    config: UnlearningEvalConfig = saebench_config("unlearning", settings, None, 0)
    check_config(config, settings)
    missing: list[Problem] = []
    for key in ("forget_corpus", "retain_corpus"):
        try:
            load_corpus(key, settings.get(key))
        except InputError as error:
            how = error.how if key == "forget_corpus" and not settings.get(key) else None
            missing.append(Problem(error.what, how or f"correct unlearning.{key}"))
    sources: Mapping[str, str] = settings.get("questions") or {}
    for name in config.dataset_names:
        try:
            load_questions(name, sources.get(name))
        except InputError as error:
            how = (
                "name a local copy (.json, .jsonl, .parquet or .csv with the columns question, "
                f"choices, answer) as unlearning.questions.{name}"
            )
            missing.append(Problem(error.what, how))
    return missing + ([] if tokenizer_folder is None else _missing_in_tokenizer(tokenizer_folder))


def _missing_in_tokenizer(folder: Path) -> list[Problem]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        chat_format(tokenizer, str(folder))
        letter_tokens(tokenizer, str(folder))
    except InputError as error:
        return [Problem(error.what, "choose another instruct model as unlearning.model")]
    except (OSError, ValueError, KeyError) as error:
        return [
            Problem(f"unlearning: {folder} has no usable tokenizer ({_short(error)})", "save one")
        ]
    return []


def load_questions(name: str, source: str | None) -> Questions:
    """Questions from a file, a folder, or the hub.

    A .json, .jsonl, .parquet or .csv file, a folder of such files or of `save_to_disk`, or the
    split `test` of a hub name, `organisation/name` or `organisation/name:config`; SAEBench's own
    data set of this name if None.
    """
    path = None if source is None else Path(source).expanduser()
    if path is not None and path.exists():
        rows, shown = _rows_of(path), str(path)
        found = shown
    else:
        repository, config = ("cais/wmdp" if name == FORGET_DATASET else "cais/mmlu"), name
        if source is not None and path is not None:
            if path.is_absolute() or path.suffix in _FILE_SUFFIXES or source.count("/") != 1:
                raise InputError(f"unlearning.questions: {name}: there is no {path}")
            repository, _, config = source.partition(":")
        shown = f"{repository}:{config}" if config else repository
        found = f"{shown} (test)"
        load = metrics.load_dataset
        rows = _downloaded(f"questions: {name}", shown, load, repository, config or None)
    checked = [
        _question(row, f"unlearning.questions: {shown}, row {number}")
        for number, row in enumerate(rows, start=1)
    ]
    if not checked:
        raise InputError(f"unlearning.questions: {shown} holds no questions")
    return Questions(name, found, checked)


def load_corpus(field: str, source: str | None) -> Documents:
    """The text to find features of what is to be forgotten, or of what is to be retained."""
    if field == "retain_corpus" and source in (None, "", WIKITEXT):
        config = "wikitext-2-raw-v1"
        shown, load = f"{WIKITEXT}:{config}", feature_activation.load_dataset
        rows = _downloaded(field, shown, load, WIKITEXT, config)
        return Documents(f"{shown} (test)", [str(row["text"]) for row in rows])
    if not source:
        raise InputError(
            f"unlearning.{field}, the text on what is to be forgotten",
            "SAEBench's, bio-forget-corpus.jsonl, is gated: request access as "
            "https://huggingface.co/datasets/cais/wmdp-corpora says, and give the path of the "
            "file; or give another text (.jsonl with {'text'}, or .txt) that goes with the "
            "questions",
        )
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"unlearning.{field}: there is no file {path}")
    if path.suffix == ".jsonl":
        documents = [text for text in read_column(path, "text") if isinstance(text, str)]
    elif path.suffix == ".txt":
        # SAEBench reads text files so, a line with its line break.
        with open_text(path) as lines:
            documents = [line for line in lines if line.strip()]
    else:
        raise InputError(
            f"unlearning.{field}: {path} must be a .jsonl file with {{'text'}} per line, or a .txt "
            "file with a document per line"
        )
    if not documents:
        raise InputError(f"unlearning.{field}: {path} holds no text")
    return Documents(str(path), documents)


def _downloaded(
    field: str, source: str, load_dataset: Any, repository: str, config: str | None
) -> Iterator[Mapping[str, Any]]:
    # Asked first: without a network `datasets` retries for 20 seconds per data set, cached or not.
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        require_repository(repository, "dataset")
    except InputError as error:
        if not in_datasets_cache(repository):
            raise InputError(f"unlearning.{field}: {error.what}", error.how) from error
        offline = True
    try:
        with replaced(datasets.config, "HF_HUB_OFFLINE", offline):
            return iter(load_dataset(repository, config, split="test"))
    # datasets, huggingface_hub and their HTTP client raise errors without a common base class.
    except Exception as error:
        raise InputError(
            f"unlearning.{field}: {source} cannot be had from the hub ({_short(error)})",
            "name a local copy",
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:150]


def _rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    if is_saved_dataset(path):
        return cast("Iterator[Mapping[str, Any]]", iter(saved_dataset(path, "test")))
    files = [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in _FILE_SUFFIXES)
        # A copy of a hub repository: SAEBench reads the split `test`.
        files = [file for file in found if file.name.startswith("test")] or found
        if not files:
            raise InputError(f"unlearning.questions: folder {path} holds no questions")
    elif path.suffix not in _FILE_SUFFIXES:
        raise InputError(
            f"unlearning.questions: {path} must be one of {', '.join(_FILE_SUFFIXES)} or a folder"
        )
    return (row for file in files for row in _file_rows(file))


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix != ".json":
        return (row for _, row in read_rows(path, typed=True))
    try:
        return iter(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"unlearning.questions: {path} cannot be read ({_short(error)})"
        ) from error


def _question(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping) or any(column not in row for column in _COLUMNS):
        raise InputError(f"{where}: expected the columns {', '.join(_COLUMNS)}")
    question, choices, answer = (cast("Mapping[str, Any]", row)[column] for column in _COLUMNS)
    if isinstance(choices, str):  # a cell of a .csv file
        try:
            choices = ast.literal_eval(choices)
        except (ValueError, SyntaxError) as error:
            raise InputError(f"{where}: choices must be a list such as ['a', 'b', ...]") from error
    texts: list[Any] = list(choices)
    if len(texts) != _CHOICES or not all(isinstance(choice, str) for choice in texts):
        raise InputError(f"{where}: choices must be {_CHOICES} texts, got {texts!r}")
    if isinstance(answer, bool) or answer not in range(_CHOICES):
        raise InputError(f"{where}: answer must be 0, 1, 2 or 3, got {answer!r}")
    if not isinstance(question, str):
        raise InputError(f"{where}: question must be text")
    return {"question": question, "choices": texts, "answer": int(answer)}
