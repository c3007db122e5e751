"""SAEBench's unlearning evaluation, for any instruct model, questions and texts.

Features that are active on text about a subject and not on other text are clamped to negative
values; the score is how many of the subject's questions the model then gets wrong while it keeps
99 % of the others. All of it is SAEBench's code; what it loads by name is handed in.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
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
from sae_bench.evals.unlearning.utils.feature_activation import (
    get_top_features,
    load_sparsity_data,
)
from sae_bench.sae_bench_utils import general_utils
from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

from msae_plugin.common.errors import InputError, Problem, RunFailure
from msae_plugin.data.labelled_texts import in_datasets_cache
from msae_plugin.data.text_files import (
    is_saved_dataset,
    open_text,
    read_column,
    read_rows,
    saved_dataset,
)
from msae_plugin.evaluation.outcomes import (
    ModelContext,
    Reporter,
    ScoreResult,
    definitions,
    no_report,
    require_real,
)
from msae_plugin.evaluation.saebench.each_sae import evaluate_each, write_result
from msae_plugin.evaluation.saebench.instruct_model import (
    ChatFormat,
    Corpus,
    Knowledge,
    LetterAnswers,
    Questions,
    adapted,
    chat_format,
    corpora_and_sweep,
    find_knowledge,
    letter_tokens,
)
from msae_plugin.evaluation.saebench.patching import evaluation_environment, replaced
from msae_plugin.models.hub_access import require_repository
from msae_plugin.saes.load import EvaluatedSAE

FORGET_DATASET = "wmdp-bio"
"""The questions that SAEBench's score is computed on, whatever they really are."""

OUTSIDE_SCORE = frozenset({FORGET_DATASET, "college_biology"})
"""Questions that SAEBench does not count among those to retain (`get_metrics_df`)."""

WIKITEXT = "wikitext"
"""SAEBench's own text to retain."""

DEFAULT_BATCH_SIZE = 4
"""For models that SAEBench has no batch size for: what it takes for Gemma 2."""

_DATASET_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# `get_params` of SAEBench's main.py finds these in the names of its files.
_THRESHOLD = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class UnlearningSettings:
    """Checked settings.

    Args:
        config: SAEBench's own; its batch size is for text, questions take twice as many.
        forget_corpus: A file of text, or None where none is given.
        retain_corpus: A file of text, or `wikitext`.
        questions: A local path or hub name by SAEBench's name of the questions; names that are not
            in it are SAEBench's own, from the hub.
    """

    config: UnlearningEvalConfig
    forget_corpus: str | None
    retain_corpus: str
    questions: Mapping[str, str]

    @property
    def question_batch_size(self) -> int:
        """Prompts at a time, as SAEBench computes it."""
        return self.config.llm_batch_size * 2


def read_settings(
    settings: Mapping[str, Any], *, model_name: str = "", dtype: str = "float32", seed: int = 42
) -> UnlearningSettings:
    """Fill in settings that `check_settings` has taken, and check what only this module knows.

    Raises:
        InputError: A field has a value with which SAEBench's code cannot work.
    """
    known = {field.name for field in fields(UnlearningEvalConfig)}
    given = {name: value for name, value in settings.items() if name in known}
    given |= {"model_name": model_name, "random_seed": seed, "llm_dtype": dtype}
    if given.get("llm_batch_size") is None:
        given["llm_batch_size"] = _default_batch_size(model_name)
    config = UnlearningEvalConfig(**given)
    _check_supported(config)
    _check_sweep(config)
    questions: dict[str, str] = settings.get("questions") or {}
    for name in questions:
        if name not in config.dataset_names:
            raise InputError(f"unlearning.questions has {name!r}, which is not in dataset_names")
    return UnlearningSettings(
        config=config,
        forget_corpus=settings.get("forget_corpus"),
        retain_corpus=settings.get("retain_corpus") or WIKITEXT,
        questions=questions,
    )


def _default_batch_size(model_name: str) -> int:
    # A fraction of the batch size for 128 tokens, because here they are 1024, as SAEBench does.
    known = LLM_NAME_TO_BATCH_SIZE.get(model_name.rsplit("/", 1)[-1])
    return DEFAULT_BATCH_SIZE if known is None else known // 8


def _check_supported(config: UnlearningEvalConfig) -> None:
    """Refuse settings that SAEBench offers but cannot run with."""
    if config.target_metric != "correct":
        raise InputError(
            f"unlearning.target_metric must be correct, got {config.target_metric!r}: SAEBench "
            "writes the other question ids under names that it does not read"
        )
    if config.intervention_method != "clamp_feature_activation":
        raise InputError(
            "unlearning.intervention_method must be clamp_feature_activation, got "
            f"{config.intervention_method!r}: SAEBench implements no other"
        )
    if not config.save_metrics:
        raise InputError("unlearning.save_metrics must be true: the score is read from these files")


def _check_sweep(config: UnlearningEvalConfig) -> None:
    names = config.dataset_names
    if FORGET_DATASET not in names:
        raise InputError(
            f"unlearning.dataset_names must have {FORGET_DATASET}, the questions that SAEBench's "
            "score is computed on; other questions are put in its place with unlearning.questions"
        )
    if not set(names) - OUTSIDE_SCORE:
        raise InputError(
            "unlearning.dataset_names has no questions to retain: SAEBench counts neither "
            f"{FORGET_DATASET} nor college_biology among them"
        )
    if len({name.replace("_", "-") for name in names}) < len(names):
        raise InputError("unlearning.dataset_names has two names that SAEBench cannot tell apart")
    for name in names:
        if not _DATASET_NAME.fullmatch(name) or name == "loss_added":
            raise InputError(
                f"unlearning.dataset_names: {name!r} cannot name questions; use letters, digits, "
                "_, - and . only, and put a path or a hub name in unlearning.questions"
            )
    for threshold in config.retain_thresholds:
        if not _THRESHOLD.fullmatch(str(threshold)):
            raise InputError(
                f"unlearning.retain_thresholds: {threshold} cannot be read back from SAEBench's "
                "file names",
                "use numbers of at least 0.0001",
            )
    if config.seq_len < 2:
        raise InputError(f"unlearning.seq_len must be at least 2, got {config.seq_len}")


_COLUMNS = ("question", "choices", "answer")
_CHOICES = 4
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
_CORPUS_SUFFIXES = (".jsonl", ".txt")


def load_questions(name: str, source: str | None) -> Questions:
    """Questions from a file, a folder, or the hub.

    Args:
        name: SAEBench's name.
        source: A .json, .jsonl, .parquet or .csv file or a folder of such files or of
            `save_to_disk`; a hub name, `organisation/name` or `organisation/name:config`, of which
            the split `test` is read; SAEBench's own data set of this name if None.

    Raises:
        InputError: They cannot be had, or a row is not a question with four choices.
    """
    if source is None:
        hub = ("cais/wmdp", FORGET_DATASET) if name == FORGET_DATASET else ("cais/mmlu", name)
        return _from_hub(name, *hub)
    path = Path(source).expanduser()
    if path.exists():
        return Questions(name, str(path), _checked(_rows_of(path), str(path)))
    if path.is_absolute() or path.suffix in _FILE_SUFFIXES or source.count("/") != 1:
        raise InputError(f"unlearning.questions: {name}: there is no {path}")
    repository, _, config = source.partition(":")
    return _from_hub(name, repository, config or None)


def load_corpora(forget: str | None, retain: str) -> tuple[Corpus, Corpus]:
    """The text to find features of what is to be forgotten, and of what is to be retained.

    Args:
        forget: A .jsonl file with {"text"} per line, or a .txt file with a document per line.
        retain: The same, or `wikitext`, SAEBench's own from the hub.

    Raises:
        InputError: A corpus is not given or cannot be had, or holds no text.
    """
    if not forget:
        raise InputError(
            "unlearning.forget_corpus is not given: SAEBench's is gated and in no package; name "
            "the file bio-forget-corpus.jsonl, or another text on what is to be forgotten"
        )
    retained = load_wikitext() if retain == WIKITEXT else _corpus("retain_corpus", retain)
    return _corpus("forget_corpus", forget), retained


def require_corpus_file(field: str, source: str) -> Path:
    """The file of a corpus.

    Raises:
        InputError: There is none, or its name says another format.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"unlearning.{field}: there is no file {path}")
    if path.suffix not in _CORPUS_SUFFIXES:
        raise InputError(
            f"unlearning.{field}: {path} must be a .jsonl file with {{'text'}} per line, or a .txt "
            "file with a document per line"
        )
    return path


def _corpus(field: str, source: str) -> Corpus:
    path = require_corpus_file(field, source)
    if path.suffix == ".jsonl":
        documents = [text for text in read_column(path, "text") if isinstance(text, str)]
    else:
        # SAEBench reads text files so, a line with its line break.
        with open_text(path) as lines:
            documents = [line for line in lines if line.strip()]
    if not documents:
        raise InputError(f"unlearning.{field}: {path} holds no text")
    return Corpus(str(path), documents)


def load_wikitext() -> Corpus:
    """SAEBench's own text to retain, from the hub or its cache.

    Raises:
        InputError: It cannot be had.
    """
    name, config = WIKITEXT, "wikitext-2-raw-v1"
    rows = _downloaded(
        "retain_corpus", f"{name}:{config}", feature_activation.load_dataset, name, config
    )
    return Corpus(f"{name}:{config} (test)", [str(row["text"]) for row in rows])


def _from_hub(name: str, repository: str, config: str | None) -> Questions:
    source = repository if config is None else f"{repository}:{config}"
    rows = _downloaded(f"questions: {name}", source, metrics.load_dataset, repository, config)
    return Questions(name, f"{source} (test)", _checked(rows, source))


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
        reason = " ".join(str(error).split())[:150]
        raise InputError(
            f"unlearning.{field}: {source} cannot be had from the hub ({reason})",
            "name a local copy",
        ) from error


def _rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.is_dir():
        if is_saved_dataset(path):
            return cast("Iterator[Mapping[str, Any]]", iter(saved_dataset(path, "test")))
        files = sorted(file for file in path.iterdir() if file.suffix in _FILE_SUFFIXES)
        if not files:
            raise InputError(f"unlearning.questions: folder {path} holds no questions")
        # A copy of a hub repository: SAEBench reads the split `test`.
        tests = [file for file in files if file.name.startswith("test")]
        return (row for file in tests or files for row in _file_rows(file))
    if path.suffix not in _FILE_SUFFIXES:
        raise InputError(
            f"unlearning.questions: {path} must be one of {', '.join(_FILE_SUFFIXES)} or a folder"
        )
    return _file_rows(path)


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix != ".json":
        return (row for _, row in read_rows(path, typed=True))
    try:
        return iter(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"unlearning.questions: {path} cannot be read ({reason})") from error


def _checked(rows: Iterator[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    checked = [
        _question(row, f"unlearning.questions: {source}, row {number}")
        for number, row in enumerate(rows, start=1)
    ]
    if not checked:
        raise InputError(f"unlearning.questions: {source} holds no questions")
    return checked


def _question(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping) or any(column not in row for column in _COLUMNS):
        raise InputError(f"{where}: expected the columns {', '.join(_COLUMNS)}")
    values = cast("Mapping[str, Any]", row)
    choices = _choices(values["choices"], where)
    answer = values["answer"]
    if isinstance(answer, bool) or answer not in range(_CHOICES):
        raise InputError(f"{where}: answer must be 0, 1, 2 or 3, got {answer!r}")
    if not isinstance(values["question"], str):
        raise InputError(f"{where}: question must be text")
    return {"question": values["question"], "choices": choices, "answer": int(answer)}


def _choices(value: Any, where: str) -> list[str]:
    if isinstance(value, str):  # a cell of a .csv file
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise InputError(f"{where}: choices must be a list such as ['a', 'b', ...]") from error
    choices: list[Any] = list(value)
    if len(choices) != _CHOICES or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{where}: choices must be {_CHOICES} texts, got {choices!r}")
    return choices


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
