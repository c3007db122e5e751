"""SAEBench's further evaluations: thin calls of its own `run_eval`, with the model handed in.

Absorption, SCR, TPP, RAVEL, autointerp and meta_structure run as SAEBench has them, one SAE at a
time, in an empty working directory. `RELIABILITY` says what is known of each. SAEBench's `mdl` is
not among them: it needs a package that SAEBench does not declare (loguru) and writes a table of
settings, no metrics; `msae saebench mdl` runs its script.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from sae_bench.evals.absorption import common as absorption_common
from sae_bench.evals.absorption import main as absorption_main
from sae_bench.evals.absorption.eval_output import AbsorptionMeanMetrics
from sae_bench.evals.autointerp import main as autointerp_main
from sae_bench.evals.autointerp.eval_output import AutoInterpMetrics
from sae_bench.evals.meta_structure import main as meta_structure_main
from sae_bench.evals.meta_structure.eval_output import MetaStructureMetrics
from sae_bench.evals.ravel import instance as ravel_instance
from sae_bench.evals.ravel import main as ravel_main
from sae_bench.evals.ravel.eval_output import RAVELMetricResults
from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp_main
from sae_bench.evals.scr_and_tpp.eval_output import ScrMetrics, TppMetrics
from sae_bench.sae_bench_utils import dataset_utils
from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE
from transformers import AutoModelForCausalLM, AutoTokenizer

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import (
    is_complete,
    kept_folder,
    keyed_folder,
    mark_complete,
)
from msae_plugin.data.labelled_texts import LocalCopies
from msae_plugin.evaluation.outcomes import (
    MetricDefinition,
    ModelContext,
    Reporter,
    ScoreResult,
    described,
    reliability,
    require_real,
    result_file,
)
from msae_plugin.evaluation.preflight import OPENAI_VARIABLE, RAVEL_DATASET
from msae_plugin.evaluation.protocols import SCHEMAS, config_class
from msae_plugin.evaluation.saebench.each_sae import evaluate_each, keep_result
from msae_plugin.evaluation.saebench.patching import (
    evaluation_environment,
    replaced,
    scratch_working_directory,
    seeded,
)
from msae_plugin.evaluation.saebench.sae_probes import tokenizer_sha256
from msae_plugin.models.loading import resolve_model
from msae_plugin.saes.load import EvaluatedSAE

METRICS: dict[str, type[Any]] = {
    "absorption": AbsorptionMeanMetrics,
    "scr": ScrMetrics,
    "tpp": TppMetrics,
    "ravel": RAVELMetricResults,
    "autointerp": AutoInterpMetrics,
    "meta_structure": MetaStructureMetrics,
}
"""SAEBench's class of results, by evaluation."""

NOT_OF_THE_SAE = frozenset({"train_time_seconds"})
"""Fields of SAEBench's results that measure the machine; they stay in its JSON."""

RELIABILITY = reliability()
"""Reliability of each evaluation, as far as it is known."""


def definition(evaluation: str, metric: str) -> MetricDefinition:
    """The definition of a metric, in SAEBench's own words, and what is known of it.

    Args:
        evaluation: Its name.
        metric: A field of SAEBench's results.

    Raises:
        KeyError: SAEBench's results have no such field.
    """
    fields = {item.name: item for item in dataclasses.fields(METRICS[evaluation])}
    # pydantic keeps title and description in what dataclasses call the default.
    description: str = cast("Any", fields[metric].default).description
    return described(evaluation, metric, description)


DEFAULT_BATCH_SIZE = 32
"""Where SAEBench knows no batch size for a model: its choice for the larger ones."""

# Its module, and what it divides the batch size by (`run_all_evals_custom_saes.py`).
_MAIN: dict[str, Any] = {
    "absorption": absorption_main,
    "scr": scr_and_tpp_main,
    "tpp": scr_and_tpp_main,
    "ravel": ravel_main,
    "autointerp": autointerp_main,
    "meta_structure": meta_structure_main,
}
_BATCH_DIVISOR = {"ravel": 4}


def run_other(
    kind: str,
    context: ModelContext,
    settings: Mapping[str, Any],
    saes: Sequence[EvaluatedSAE],
    seed: int,
    output: Path,
    report: Reporter,
) -> dict[str, ScoreResult]:
    """Run one of SAEBench's further evaluations.

    Returns:
        An outcome per SAE.

    Raises:
        InputError: There is no such evaluation.
    """
    if kind not in _MAIN:
        raise InputError(f"evaluation {kind!r} is none of {', '.join(_MAIN)}")
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    model = context.language_model.model

    def restore() -> None:
        # The model is shared. SAEBench may leave hooks behind, gradients (absorption takes some),
        # and the model on the CPU (lower_vram_usage).
        model.reset_hooks()
        model.zero_grad(set_to_none=True)
        if next(model.parameters()).device.type != torch.device(context.device).type:
            model.to(context.device)

    return evaluate_each(
        kind,
        saes,
        lambda evaluated: _evaluate(kind, context, settings, evaluated, seed, output),
        report,
        restore,
    )


def _evaluate(
    kind: str,
    context: ModelContext,
    settings: Mapping[str, Any],
    evaluated: EvaluatedSAE,
    seed: int,
    output: Path,
) -> ScoreResult:
    config = _config(kind, context, settings, seed)
    sae = evaluated.for_saebench(context.torch_dtype, context.device)
    with (
        evaluation_environment(seed),
        scratch_working_directory() as scratch,
        _adapted(kind, context, settings, config, evaluated, seed, scratch),
    ):
        arguments: dict[str, Any] = {
            "config": config,
            "selected_saes": [(evaluated.name, sae)],
            "device": context.device,
            "output_path": str(scratch / "results"),
            "force_rerun": True,
        }
        if kind == "autointerp":
            arguments["api_key"] = _openai_key()
        if kind in ("scr", "tpp"):
            # The activations of all texts, tens of GB, are of no use to another SAE here: the
            # random numbers that SAEBench draws differ when it finds them.
            arguments |= {"save_activations": False, "clean_up_activations": True}
        (scratch / "results").mkdir()
        _MAIN[kind].run_eval(**arguments)
        folder = scratch / "results" / (kind if kind in ("scr", "tpp") else "")
        written = result_file(folder, evaluated)
        if not written.is_file():
            return _nothing_written(kind, config)
        return _collect(kind, evaluated, written, output)


def _config(kind: str, context: ModelContext, settings: Mapping[str, Any], seed: int) -> Any:
    cls = cast("type[Any]", config_class(kind))
    known = {item.name for item in dataclasses.fields(cls)}
    given = {key: value for key, value in settings.items() if key not in SCHEMAS[kind].own}
    given |= {"random_seed": seed, "model_name": context.name, "llm_dtype": context.dtype}
    if kind in ("scr", "tpp"):
        given["perform_scr"] = kind == "scr"
    if kind == "ravel" or ("llm_batch_size" in known and cls().llm_batch_size is None):
        short = context.name.rsplit("/", 1)[-1]
        size = LLM_NAME_TO_BATCH_SIZE.get(short, DEFAULT_BATCH_SIZE)
        given.setdefault("llm_batch_size", size // _BATCH_DIVISOR.get(kind, 1))
    return cls(**{key: value for key, value in given.items() if key in known})


@contextmanager
def _adapted(
    kind: str,
    context: ModelContext,
    settings: Mapping[str, Any],
    config: Any,
    evaluated: EvaluatedSAE,
    seed: int,
    scratch: Path,
) -> Generator[None, None, None]:
    """The names that SAEBench's evaluation finds in place of its own."""
    copies = LocalCopies(settings.get("datasets") or {})
    with ExitStack() as stack:
        if hasattr(_MAIN[kind], "HookedTransformer"):
            stack.enter_context(replaced(_MAIN[kind], "HookedTransformer", _LoadedModel(context)))
        if kind in ("scr", "tpp", "autointerp"):
            stack.enter_context(replaced(dataset_utils, "load_dataset", copies.load_dataset))
        if kind in ("scr", "tpp"):
            stack.enter_context(replaced(dataset_creation, "load_dataset", copies.load_dataset))
        if kind == "absorption":
            probes = _absorption_probes(context, config, evaluated, seed)
            stack.enter_context(_absorption_paths(probes, scratch))
        if kind == "ravel":
            stack.enter_context(_ravel_names(context, settings, config, seed, scratch))
        yield


class _LoadedModel:
    """Stands for TransformerLens' HookedTransformer where SAEBench loads one by name."""

    def __init__(self, context: ModelContext) -> None:
        self._context = context

    def from_pretrained_no_processing(self, name: str, **_options: Any) -> Any:
        """The model that is loaded already; its device and dtype are the config's."""
        if name != self._context.name:
            raise RunFailure(
                f"SAEBench asks for the model {name!r}, loaded is {self._context.name!r}"
            )
        return self._context.language_model.model


def _nothing_written(kind: str, config: Any) -> ScoreResult:
    if kind == "absorption":
        return ScoreResult(
            "not_measurable",
            reason=f"fewer than {config.min_feats_for_eval} first letters can be read off the "
            f"model's activations with an F1 above {config.min_GT_probe_f1}: it cannot spell "
            "(min_feats_for_eval, min_GT_probe_f1)",
        )
    raise RunFailure(f"{kind}: SAEBench wrote no result and raised nothing")


def _collect(kind: str, evaluated: EvaluatedSAE, written: Path, output: Path) -> ScoreResult:
    categories: Mapping[str, Mapping[str, Any]] = json.loads(written.read_text(encoding="utf-8"))[
        "eval_result_metrics"
    ]
    metrics = {
        name: float(value)
        for category in categories.values()
        for name, value in category.items()
        # Null is what SAEBench writes for sizes that were not asked for.
        if value is not None and name not in NOT_OF_THE_SAE
    }
    if not metrics:
        raise RunFailure(f"{kind} of {evaluated.name}: SAEBench's result holds no number")
    require_real(metrics, f"{kind} of {evaluated.name}")
    return ScoreResult("measured", metrics, keep_result(written, evaluated, output))


def _openai_key() -> str:
    key = os.environ.get(OPENAI_VARIABLE)
    if not key:
        raise InputError(f"autointerp needs a key of OpenAI: export {OPENAI_VARIABLE}=...")
    return key


def _absorption_probes(
    context: ModelContext, config: Any, evaluated: EvaluatedSAE, seed: int
) -> Path:
    """Probes for first letters, which depend on the model alone: trained once, before any SAE.

    SAEBench keeps them inside its own package, under the name of the model, and trains them with
    the random numbers of the first SAE.
    """
    key: dict[str, Any] = {
        **context.key("torch", "transformer-lens", "transformers", "sae-bench"),
        "tokenizer": tokenizer_sha256(context.language_model.tokenizer),
        "layer": evaluated.layer,
        "template": config.prompt_template,
        "position": config.prompt_token_pos,
        "seed": seed,
    }

    def train(folder: Path) -> None:
        with seeded(seed):
            absorption_common.train_and_save_probes(
                context.language_model.model,  # pyright: ignore[reportArgumentType]
                layers=[evaluated.layer],
                base_template=config.prompt_template,
                pos_idx=config.prompt_token_pos,
                probes_dir=folder,
                device=context.device,
            )

    return kept_folder(context.cache.absolute(), "absorption_probes", key, train)


@contextmanager
def _absorption_paths(probes: Path, scratch: Path) -> Generator[None, None, None]:
    """SAEBench would write into its own package, and find there what another run left."""
    k_sparse: Callable[..., Any] = functools.partial(
        absorption_main.run_k_sparse_probing_experiment,
        probes_dir=probes,
        experiment_dir=scratch / "k_sparse_probing",
    )
    absorption: Callable[..., Any] = functools.partial(
        absorption_main.run_feature_absortion_experiment,
        probes_dir=probes,
        sparse_probing_experiment_dir=scratch / "k_sparse_probing",
        experiment_dir=scratch / "feature_absorption",
    )
    with (
        replaced(absorption_main, "run_k_sparse_probing_experiment", k_sparse),
        replaced(absorption_main, "run_feature_absortion_experiment", absorption),
    ):
        yield


@contextmanager
def _ravel_names(
    context: ModelContext, settings: Mapping[str, Any], config: Any, seed: int, scratch: Path
) -> Generator[None, None, None]:
    """RAVEL reads a Hugging Face model, not a HookedTransformer, and knows two names."""
    folder = resolve_model(context.name).folder
    copies: Mapping[str, str] = settings.get("datasets") or {}

    class Model:
        @staticmethod
        def from_pretrained(_name: str, **options: Any) -> Any:
            dtype = options.pop("torch_dtype", context.torch_dtype)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()

    class Tokenizer:
        @staticmethod
        def from_pretrained(_name: str) -> Any:
            return AutoTokenizer.from_pretrained(folder)

    def snapshot_download(*, local_dir: str, **options: Any) -> str:
        if RAVEL_DATASET in copies:
            shutil.copytree(copies[RAVEL_DATASET], local_dir, dirs_exist_ok=True)
            return local_dir
        options.pop("local_dir_use_symlinks", None)  # huggingface_hub no longer takes it
        return huggingface_hub.snapshot_download(local_dir=local_dir, **options)

    with (
        replaced(ravel_main, "AutoModelForCausalLM", Model),
        replaced(ravel_main, "AutoTokenizer", Tokenizer),
        replaced(ravel_main, "LLM_NAME_MAP", {context.name: context.name}),
        replaced(ravel_instance, "snapshot_download", snapshot_download),
        _ravel_completions(context, config, seed, scratch / config.artifact_dir),
    ):
        yield


@contextmanager
def _ravel_completions(
    context: ModelContext, config: Any, seed: int, artifacts: Path
) -> Generator[None, None, None]:
    """Let the model complete the prompts, hours of work on SAEBench's models, once for all SAEs.

    Not where SAEBench draws a part of the prompts: it then continues with other random numbers.
    """
    if config.full_dataset_downsample is not None:
        yield
        return
    key: dict[str, Any] = {
        **context.key("torch", "transformers", "sae-bench"),
        "name": context.name,
        "seed": seed,
        "config": {
            name: getattr(config, name)
            for name in (
                "entity_attribute_selection",
                "top_n_entities",
                "n_generated_tokens",
                "llm_batch_size",
            )
        },
    }
    folder = keyed_folder(context.cache.absolute(), "ravel", key)
    if is_complete(folder):
        shutil.copytree(folder / "artifacts", artifacts)
    yield
    if not is_complete(folder) and artifacts.is_dir():
        shutil.copytree(artifacts, folder / "artifacts", dirs_exist_ok=True)
        mark_complete(folder, key)
