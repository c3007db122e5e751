"""The settings of the unlearning evaluation: SAEBench's fields, and where its data are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from pydantic import ValidationError
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE

from msae_plugin.common.errors import InputError

FORGET_DATASET = "wmdp-bio"
"""The questions that SAEBench's score is computed on, whatever they really are."""

OUTSIDE_SCORE = frozenset({FORGET_DATASET, "college_biology"})
"""Questions that SAEBench does not count among those to retain (`get_metrics_df`)."""

WIKITEXT = "wikitext"
"""SAEBench's own text to retain."""

DEFAULT_BATCH_SIZE = 4
"""For models that SAEBench has no batch size for: what it takes for Gemma 2."""

_OURS = frozenset({"model", "forget_corpus", "retain_corpus", "questions"})
_NOT_TAKEN = frozenset({"model_name", "random_seed"})
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
    """Check settings and fill them in.

    Args:
        settings: Fields of SAEBench's UnlearningEvalConfig and ours.
        model_name: What SAEBench is to record as the model's name.
        dtype: Of the loaded model.
        seed: Of the choice and order of the texts.

    Raises:
        InputError: A field is unknown, or has a value with which SAEBench's code cannot work.
    """
    known = {field.name for field in fields(UnlearningEvalConfig)} - _NOT_TAKEN
    for name in settings:
        if name not in known | _OURS:
            raise InputError(
                f"unlearning.{name} is not a setting: known are {', '.join(sorted(known | _OURS))}"
            )
    given = {name: value for name, value in settings.items() if name in known}
    if given.get("llm_dtype") not in (None, "", dtype) and model_name:
        raise InputError(
            f"unlearning.llm_dtype is {given['llm_dtype']} but the model is loaded in {dtype}: set "
            "model.dtype and leave llm_dtype out"
        )
    given["llm_dtype"] = dtype
    if given.get("llm_batch_size") is None:
        given["llm_batch_size"] = _default_batch_size(model_name)
    try:
        config = UnlearningEvalConfig(model_name=model_name, random_seed=seed, **given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"unlearning.{field}: {first['msg']}, got {first.get('input')!r}"
        ) from error
    _check_supported(config)
    _check_sweep(config)
    return UnlearningSettings(
        config=config,
        forget_corpus=settings.get("forget_corpus"),
        retain_corpus=settings.get("retain_corpus") or WIKITEXT,
        questions=_questions(settings, config.dataset_names),
    )


def _default_batch_size(model_name: str) -> int:
    # A fraction of the batch size for 128 tokens, because here they are 1024, as SAEBench does.
    known = LLM_NAME_TO_BATCH_SIZE.get(model_name.rsplit("/", 1)[-1])
    return DEFAULT_BATCH_SIZE if known is None else known // 8


def _questions(settings: Mapping[str, Any], names: list[str]) -> dict[str, str]:
    questions: object = settings.get("questions") or {}
    if not isinstance(questions, Mapping):
        raise InputError("unlearning.questions must map names of questions to paths or hub names")
    found = {str(key): str(value) for key, value in cast("Mapping[Any, Any]", questions).items()}
    for name in found:
        if name not in names:
            raise InputError(f"unlearning.questions has {name!r}, which is not in dataset_names")
    return found


def _check_supported(config: UnlearningEvalConfig) -> None:
    """What SAEBench's code offers but cannot do."""
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
                "file names: use numbers of at least 0.0001"
            )
    for name, least in (
        ("retain_thresholds", 0),
        ("n_features_list", 1),
        ("multipliers", 0),
        ("dataset_size", 1),
        ("seq_len", 2),
        ("llm_batch_size", 1),
    ):
        value = getattr(config, name)
        values: list[float] = value if isinstance(value, list) else [value]
        if not values or min(values) < least:
            raise InputError(f"unlearning.{name} must be at least {least}, got {value}")
