"""Settings of each evaluation: SAEBench's own config classes, and what is added or fixed here.

The classes are read when settings are checked, not when this module is imported: importing
sae_bench takes seconds and needs the extra `eval`. Without it settings are taken as they are; the
preflight says what to install.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast, get_type_hints

from pydantic import ValidationError

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import as_mapping, coerce, did_you_mean, unknown_key_message
from msae_plugin.data.labelled_texts import LABELLED_SOURCES

_EVERYWHERE = {
    "model_name": "the model is model.name",
    "random_seed": "seeds are in seeds",
    "llm_dtype": "the model's dtype is model.dtype",
}
_COPIES: Mapping[str, Any] = {"datasets": dict[str, str]}
# Whole numbers that may be zero or negative.
_ANY_NUMBER = frozenset({"prompt_token_pos"})
_ZERO_ALLOWED = frozenset(
    {
        "heldout_documents",
        "buffer",
        "n_iw_sampled_ex_for_generation",
        "n_iw_sampled_ex_for_scoring",
        "n_random_ex_for_scoring",
        "override_latents",
        "early_stopping_patience",
    }
)
_SHARES = frozenset({"train_test_split", "min_GT_probe_f1", "act_threshold_frac"})


_TOP_K = r"sae_top_(\d+)_test_accuracy"


@dataclass(frozen=True)
class EvaluationSchema:
    """One evaluation."""

    package: str  # of `sae_bench.evals`
    config: str  # its config class
    results: str  # its class of results
    own: Mapping[str, Any] = field(default_factory=dict[str, Any])  # keys of ours and their types
    # SAEBench's fields that are not to be set, and why.
    fixed: Mapping[str, str] = field(default_factory=dict[str, str])
    # Values that work, where SAEBench's type allows more.
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    # The key with numbers of latents, and the fields of the results that can report one.
    counted: tuple[str, str] | None = None
    sets: bool = False  # whether `dataset_names` is limited to SAEBench's own, and ours


SCHEMAS = {
    "core": EvaluationSchema(
        "core",
        "CoreEvalConfig",
        "CoreMetricCategories",
        own={"heldout_documents": int, "trust_remote_code": bool},
        fixed={
            **{
                f"compute_{name}": "core always computes it"
                for name in ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
            },
            "verbose": "progress is shown anyway",
        },
    ),
    "sparse_probing": EvaluationSchema(
        "sparse_probing",
        "SparseProbingEvalConfig",
        "SparseProbingSaeMetrics",
        own=_COPIES,
        counted=("k_values", _TOP_K),
        sets=True,
    ),
    "sparse_probing_sae_probes": EvaluationSchema(
        "sparse_probing_sae_probes",
        "SparseProbingSaeProbesEvalConfig",
        "SaeProbesSaeMetrics",
        fixed={
            "results_path": "results go to --output",
            "model_cache_path": "caches are in cache",
            "binarize": "SAEBench 0.6 does not find sae-probes' results of binarised latents",
        },
        choices={
            "setting": ("normal",),
            "reg_type": ("l1", "l2"),
            "baseline_method": ("logreg", "pca", "knn", "xgboost", "mlp"),
        },
        counted=("ks", _TOP_K),
        sets=True,
    ),
    "unlearning": EvaluationSchema(
        "unlearning",
        "UnlearningEvalConfig",
        "UnlearningMetrics",
        own={
            "model": str | None,
            "forget_corpus": str | None,
            "retain_corpus": str | None,
            "questions": dict[str, str],
        },
    ),
    "absorption": EvaluationSchema("absorption", "AbsorptionEvalConfig", "AbsorptionMeanMetrics"),
    "scr": EvaluationSchema(
        "scr_and_tpp",
        "ScrAndTppEvalConfig",
        "ScrMetrics",
        own=_COPIES,
        fixed={"perform_scr": "the evaluations are scr and tpp"},
        counted=("n_values", r"scr_metric_threshold_(\d+)"),
        sets=True,
    ),
    "tpp": EvaluationSchema(
        "scr_and_tpp",
        "ScrAndTppEvalConfig",
        "TppMetrics",
        own=_COPIES,
        fixed={
            "perform_scr": "the evaluations are scr and tpp",
            "column1_vals_lookup": "only scr has pairs of classes",
        },
        counted=("n_values", r"tpp_threshold_(\d+)_total_metric"),
        sets=True,
    ),
    "ravel": EvaluationSchema(
        "ravel",
        "RAVELEvalConfig",
        "RAVELMetricResults",
        own=_COPIES,
        fixed={
            "artifact_dir": "caches are in cache",
            "train_mdas": "it ignores the SAE",
            "force_dataset_recompute": "SAEBench reads it nowhere",
            "top_n_templates": "SAEBench reads it nowhere",
        },
    ),
    "autointerp": EvaluationSchema(
        "autointerp", "AutoInterpEvalConfig", "AutoInterpMetrics", own=_COPIES
    ),
    "meta_structure": EvaluationSchema(
        "meta_structure", "MetaStructureEvalConfig", "MetaStructureMetrics"
    ),
}
"""The evaluations that `msae eval` runs, by the name in a config file."""


def check_settings(evaluation: str, settings: object) -> dict[str, Any]:
    """Check the settings of an evaluation against SAEBench's class and ours."""
    if evaluation not in SCHEMAS:
        hint = did_you_mean(evaluation, SCHEMAS, "choose from ", shown=str)
        raise InputError(f"evaluation {evaluation!r} is not known: {hint}")
    schema, cls = SCHEMAS[evaluation], config_class(evaluation)
    where = f"evaluations.{evaluation}"
    fixed = {**_EVERYWHERE, **schema.fixed}
    hints = {} if cls is None else get_type_hints(cls)
    theirs = {} if cls is None else {item.name: hints[item.name] for item in fields(cls)}
    kinds = {**theirs, **schema.own}
    checked: dict[str, Any] = {}
    for key, value in as_mapping({} if settings is None else settings, where).items():
        if key in fixed:
            raise InputError(f"{where}.{key} is not to be set: {fixed[key]}")
        if key not in kinds and cls is not None:
            raise InputError(unknown_key_message(key, kinds.keys() - fixed.keys(), where))
        # `llm_batch_size: int = None` is how SAEBench says that a default depends on the model;
        # null for n_latents is no default, but goes with override_latents.
        if value is None and key in theirs and key not in schema.own:
            if key == "n_latents":
                checked[key] = None
                continue
            if default_of(evaluation, key) is None:
                continue
        checked[key] = coerce(value, kinds.get(key, Any), f"{where}.{key}")
        if key in schema.choices and checked[key] not in schema.choices[key]:
            raise InputError(
                f"{where}.{key} must be {' or '.join(schema.choices[key])}, not {value!r}"
            )
    if cls is not None:
        given = {key: value for key, value in checked.items() if key not in schema.own}
        _check_against(cls, evaluation, given, where)
    for key, value in checked.items():
        _check_numbers(key, value, f"{where}.{key}")
        if isinstance(value, list):
            _check_list(cast("list[Any]", value), f"{where}.{key}")
    return checked


def config_class(evaluation: str) -> type[Any] | None:
    """SAEBench's config class of an evaluation; None where sae-bench is not installed."""
    return _class_of(SCHEMAS[evaluation].package, "eval_config", SCHEMAS[evaluation].config)


def default_of(evaluation: str, key: str) -> Any:
    """SAEBench's default of a field; None where sae-bench is not installed."""
    cls = config_class(evaluation)
    return None if cls is None else getattr(cls(), key)


def result_fields(evaluation: str) -> dict[str, Any]:
    """The fields of SAEBench's results; none where sae-bench is not installed."""
    schema = SCHEMAS[evaluation]
    cls = _class_of(schema.package, "eval_output", schema.results)
    return {} if cls is None else {item.name: item for item in fields(cls)}


def reported_counts(evaluation: str) -> list[int]:
    """The numbers of latents that SAEBench's results have fields for."""
    counted = SCHEMAS[evaluation].counted
    if counted is None:
        return []
    matches = [re.fullmatch(counted[1], name) for name in result_fields(evaluation)]
    return [int(match.group(1)) for match in matches if match is not None]


def _class_of(package: str, module: str, name: str) -> type[Any] | None:
    if importlib.util.find_spec("sae_bench") is None:
        return None
    try:
        found = importlib.import_module(f"sae_bench.evals.{package}.{module}")
    except ModuleNotFoundError:
        return None  # one of its own packages; the preflight names it
    return cast("type[Any]", getattr(found, name))


def _check_against(cls: type[Any], evaluation: str, given: Mapping[str, Any], where: str) -> None:
    """What SAEBench's class refuses, and what SAEBench refuses or forgets later."""
    try:
        cls(**given)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "assertion_error":  # AutoInterpEvalConfig's only check
            raise InputError(
                f"{where}: give either n_latents or override_latents; with override_latents set "
                "n_latents: null"
            ) from error
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}.{place}: {first['msg']}, not {first['input']!r}") from error
    _check_counts(evaluation, given, where)
    schema = SCHEMAS[evaluation]
    if schema.sets and "dataset_names" in given:
        known = [*cls().dataset_names]
        if schema.package == "sparse_probing":
            known += LABELLED_SOURCES
        for name in given["dataset_names"]:
            if name not in known:
                hint = did_you_mean(name, known, "choose from ", shown=str, n=2, listed=8)
                raise InputError(f"{where}.dataset_names: {name!r} is not known: {hint}")


def _check_counts(evaluation: str, settings: Mapping[str, Any], where: str) -> None:
    counted = SCHEMAS[evaluation].counted
    reported = reported_counts(evaluation)
    if counted is None or not reported:
        return
    for count in settings.get(counted[0], ()):
        if count not in reported:
            raise InputError(
                f"{where}.{counted[0]}: SAEBench's results have no field for {count}: choose from "
                f"{', '.join(map(str, reported))}"
            )


def _check_numbers(key: str, value: Any, where: str) -> None:
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if not math.isfinite(number):
            raise InputError(f"{where} must be a finite number, not {number}")
        if key in _SHARES and not 0 <= number <= 1:
            raise InputError(f"{where} must be between 0 and 1, not {number}")
        least = 0 if isinstance(number, float) or key in _ZERO_ALLOWED else 1
        if key not in _ANY_NUMBER and number < least:
            raise InputError(f"{where} must be at least {least}, not {number}")


def _check_list(values: list[Any], where: str) -> None:
    if not values:
        raise InputError(f"{where} is empty: leave it out for SAEBench's default")
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise InputError(f"{where} has {twice!r} twice: give it once")
