"""Settings, questions and texts of the unlearning evaluation."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import datasets
import datasets.config
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE

from msae_plugin.common.errors import InputError
from msae_plugin.data.local_datasets import in_datasets_cache
from msae_plugin.data.text_files import (
    is_saved_dataset,
    open_text,
    read_column,
    read_rows,
    saved_dataset,
)
from msae_plugin.evaluation.saebench.patching import replaced
from msae_plugin.models.hub_access import require_repository

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


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions under one of SAEBench's names.

    Args:
        name: SAEBench's name.
        source: Where they are from: a path or a hub name.
        rows: `question`, `choices` (4 texts) and `answer` (0 to 3) of each.
    """

    name: str
    source: str
    rows: list[dict[str, Any]]

    @property
    def sha256(self) -> str:
        """Hash of the rows as JSON: of what is asked, whatever file it came in."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Documents.

    Args:
        source: Where they are from: a path or a hub name.
        documents: Their text.
    """

    source: str
    documents: list[str]

    @property
    def sha256(self) -> str:
        """Hash of the documents as JSON."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


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
