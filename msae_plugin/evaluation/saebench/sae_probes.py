"""SAEBench's sparse_probing_sae_probes with a model that is handed in.

`sae_bench.evals.sparse_probing_sae_probes.main.run_eval` runs unchanged, once per SAE, in an empty
folder that holds the model's activations and its baselines already (`sae_probes_model_side`): it
finds nothing to load a model for, and no result of another SAE.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.sparse_probing_sae_probes import main as sae_probes_main
from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
from sae_bench.evals.sparse_probing_sae_probes.eval_output import SaeProbesSaeMetrics
from sae_probes import DATASETS
from sae_probes.run_baselines import METHODS
from sae_probes.utils_data import get_dataset_sizes

from msae_plugin.common.cache import files_sha256, key_digest
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.missing import Missing
from msae_plugin.data.local_datasets import missing_disk
from msae_plugin.evaluation.outcomes import (
    SAEBENCH_ID,
    MetricDefinition,
    ModelContext,
    Outcome,
    Reporter,
    failure,
    require_real,
    result_file,
)
from msae_plugin.evaluation.saebench.checked_latents import CheckedLatents
from msae_plugin.evaluation.saebench.patching import (
    evaluation_environment,
    scratch_working_directory,
)
from msae_plugin.evaluation.saebench.sae_probes_model_side import (
    SaeProbesModelSide,
    dataset_file,
    lay_out,
)
from msae_plugin.saes.load import Subject

logger = logging.getLogger(__name__)

# Both classes equally often, 1000 to 2000 texts of 12 to 47 characters on average: the model's side
# is short on a CPU. In brackets the test accuracy of the baseline on SmolLM2-135M-Instruct, layer
# 9, float32, seed 42. Left out because the baseline leaves no room: the question types 131 and 132
# (1.00), spam 96 (.99), click bait 105 (.98).
OFFLINE_SAE_PROBES_DATASETS = (
    "117_us_state_FL",  # (.72)
    "119_us_state_TX",  # (.65)
    "154_athlete_sport_football",  # (.71)
    "155_athlete_sport_basketball",  # (.64)
    "125_world_country_Italy",  # (.94)
    "124_world_country_United_States",  # chosen by its size, not measured
    "114_nyc_borough_Manhattan",  # chosen by its size, not measured
    "134_context_type_Belief_states",  # (.87)
)
"""Datasets of the offline protocol."""

MEASURES = ("accuracy", "auc", "f1")

# Paths that SAEBench would be told; here they are always its own, in a folder made for one SAE.
_PATHS = ("results_path", "model_cache_path")


def run_sae_probes(
    context: ModelContext,
    settings: Mapping[str, Any],
    subjects: Sequence[Subject],
    seed: int,
    output: Path,
    report: Reporter,
) -> dict[str, Outcome]:
    """Evaluate SAEs with SAEBench's sparse_probing_sae_probes.

    Args:
        context: The model. Whatever its dtype, probes see float32: numpy has no bfloat16.
        settings: Fields of SAEBench's SparseProbingSaeProbesEvalConfig.
        subjects: The SAEs.
        seed: Of the split of every dataset and of the probes.
        output: Folder for SAEBench's JSON.
        report: Shows progress.

    Returns:
        An outcome per SAE.

    Raises:
        InputError: A setting cannot work.
    """
    config = _config(context, settings, seed)
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    with evaluation_environment(seed):
        files: dict[str, list[tuple[Path, Path | None]] | Exception] = {}
        for hook in dict.fromkeys(subject.hook_name for subject in subjects):
            files[hook] = _model_side(context, config, hook, report)
        for number, subject in enumerate(subjects):
            report(f"sae-probes: {subject.name}", number, len(subjects))
            try:
                outcomes[subject.name] = _evaluate(
                    context, config, subject, files[subject.hook_name], output
                )
            # Whatever one SAE raises is its own outcome: the others go on.
            except Exception as error:
                logger.info("sae-probes: %s failed", subject.name, exc_info=True)
                outcomes[subject.name] = failure(error)
    return outcomes


def missing_for_sae_probes(
    settings: Mapping[str, Any],
    *,
    cache: Path | None = None,
    d_model: int | None = None,
    runs: int = 1,
) -> list[Missing]:
    """What sae-probes with these settings lacks. Its data are inside its own package.

    Args:
        settings: Settings of `sparse_probing_sae_probes`.
        cache: Where activations are stored; None to leave the disk unchecked.
        d_model: Width of the activations.
        runs: Number of hooks; seeds share the activations.
    """
    names: Sequence[str] = settings.get("dataset_names") or DATASETS
    unknown = [name for name in names if name not in DATASETS]
    found = [Missing(f"sae-probes dataset {name!r}", _suggestion(name)) for name in unknown]
    if cache is not None and d_model is not None:
        sizes = get_dataset_sizes()
        texts = sum(sizes[name] for name in names if name in sizes)
        found += missing_disk(cache, 4 * d_model * texts * runs)
    return found


def known_ks() -> list[int]:
    """The values of k that SAEBench's result has fields for."""
    names = [field.name for field in dataclasses.fields(SaeProbesSaeMetrics)]
    found = [re.fullmatch(r"sae_top_(\d+)_test_accuracy", name) for name in names]
    return [int(match.group(1)) for match in found if match is not None]


def _suggestion(name: str) -> str:
    near = get_close_matches(name, DATASETS, n=3)
    return (
        f"did you mean {', '.join(near)}?"
        if near
        else f"choose from sae_probes.DATASETS: {DATASETS}"
    )


def _config(
    context: ModelContext, settings: Mapping[str, Any], seed: int
) -> SparseProbingSaeProbesEvalConfig:
    where = "sparse_probing_sae_probes"
    for path in _PATHS:
        if path in settings:
            raise InputError(f"{where}.{path} is not taken: activations go to cache:")
    # SAEBench puts the name into paths.
    name = context.name if ".." not in Path(context.name).parts else Path(context.name).name
    given: dict[str, Any] = {**settings, "model_name": name, "random_seed": seed}
    config = SparseProbingSaeProbesEvalConfig(**given)
    names = config.dataset_names
    if not names or len(set(names)) < len(names):
        raise InputError(f"{where}.dataset_names: name each dataset once, and at least one")
    for dataset in names:
        if dataset not in DATASETS:
            raise InputError(f"{where}: unknown dataset {dataset!r}: {_suggestion(dataset)}")
    unknown = [k for k in config.ks if k not in known_ks()]
    if unknown or not config.ks:
        raise InputError(
            f"{where}.ks is {config.ks}: SAEBench's result has fields for "
            f"{', '.join(map(str, known_ks()))} only"
        )
    if config.setting != "normal":
        raise InputError(f"{where}.setting is {config.setting!r}: SAEBench collects 'normal' only")
    if config.binarize:
        raise InputError(
            f"{where}.binarize is true: SAEBench 0.6 looks for the results under another name than "
            "sae-probes writes them, and finds none"
        )
    if config.reg_type not in ("l1", "l2"):
        raise InputError(f"{where}.reg_type is {config.reg_type!r}: use l1 or l2")
    if config.baseline_method not in METHODS:
        raise InputError(
            f"{where}.baseline_method is {config.baseline_method!r}: "
            f"use one of {', '.join(METHODS)}"
        )
    return config


def _model_side(
    context: ModelContext, config: SparseProbingSaeProbesEvalConfig, hook: str, report: Reporter
) -> list[tuple[Path, Path | None]] | Exception:
    """Activations and baseline of every dataset, or what they raised."""
    method = config.baseline_method if config.include_llm_baseline else None
    side = SaeProbesModelSide(context, hook, config.random_seed, method)
    files: list[tuple[Path, Path | None]] = []
    for number, dataset in enumerate(config.dataset_names):
        report(f"sae-probes: language model on {dataset}", number, len(config.dataset_names))
        try:
            files.append((side.activations(dataset), side.baseline(dataset)))
        # It fails the SAEs at this hook, not those at others.
        except Exception as error:
            logger.info("sae-probes: %s at %s failed", dataset, hook, exc_info=True)
            failed = RunFailure(f"dataset {dataset}: the language model's side failed ({error})")
            failed.__cause__ = error
            return failed
    return files


def _evaluate(
    context: ModelContext,
    config: SparseProbingSaeProbesEvalConfig,
    subject: Subject,
    files: list[tuple[Path, Path | None]] | Exception,
    output: Path,
) -> Outcome:
    if isinstance(files, Exception):
        raise files
    sae = subject.for_saebench(torch.float32, context.device)
    if sae.cfg.metadata.model_name is None:
        sae.cfg.metadata.model_name = context.name
    latents = CheckedLatents(sae, subject.name)
    with scratch_working_directory() as folder:
        cache = folder / str(config.model_cache_path)
        lay_out(cache, folder / config.results_path, config.model_name, files)
        result = sae_probes_main.run_eval(
            config, [(subject.name, sae)], context.device, "results", force_rerun=True
        )[f"{subject.name}_{SAEBENCH_ID}"]
        latents.require_active()
        metrics = _metrics(result, config, subject)
        file = result_file(output, subject)
        temporary = file.with_name(f".incomplete-{file.name}")
        shutil.copyfile(result_file(folder / "results", subject), temporary)
        temporary.replace(file)
    tables = {name: files_sha256([dataset_file(name)]) for name in config.dataset_names}
    # The seed splits each table anew.
    text = key_digest({"tables": tables, "seed": config.random_seed})
    return Outcome("measured", metrics, file, facts={"text": text})


def _metrics(
    result: Mapping[str, Any], config: SparseProbingSaeProbesEvalConfig, subject: Subject
) -> dict[str, float]:
    where = f"sae-probes of {subject.name}"
    details = len(result["eval_result_details"])
    if details != len(config.dataset_names):
        raise RunFailure(
            f"{where}: {details} of {len(config.dataset_names)} datasets have a result"
        )
    wanted = [f"sae_top_{k}_test_{measure}" for k in config.ks for measure in MEASURES]
    if config.include_llm_baseline:
        wanted += [f"llm_test_{measure}" for measure in MEASURES]
    reported = result["eval_result_metrics"]["sae"] | result["eval_result_metrics"]["llm"]
    for name in wanted:
        if reported[name] is None:
            raise RunFailure(f"{where}: SAEBench reports no {name}")
    metrics = {name: float(reported[name]) for name in wanted}
    require_real(metrics, where)
    return metrics


_TEXTS = (
    "the last token of each text (of at most 1024 tokens, cut on the left), whatever it is; up to "
    "1024 training texts, test texts the rest, both classes equally often in each"
)
_MEASURE = {
    "accuracy": "test accuracy",
    "auc": "test area under the ROC curve",
    "f1": "test F1, mean of both classes weighted by their size,",
}
_LLM = (
    "{measure} of sae-probes' baseline (baseline_method, by default a logistic regression whose "
    "regularisation is chosen on 100 training texts) on all residual stream channels; mean over "
    "datasets"
)
_SAE = (
    "{measure} of a logistic regression (penalty as reg_type says, its strength chosen on 100 "
    "training texts) on the {k} SAE latents whose normalised means differ most between the classes "
    "on the training texts; mean over datasets"
)


def _definitions() -> dict[str, MetricDefinition]:
    found: dict[str, MetricDefinition] = {}
    for measure, words in _MEASURE.items():
        unit = "share" if measure == "accuracy" else "0 to 1"
        # The model's own score is a reference, not a merit of the SAE.
        found[f"llm_test_{measure}"] = MetricDefinition(
            _LLM.format(measure=words), unit, _TEXTS, "saebench", None
        )
        for k in known_ks():
            found[f"sae_top_{k}_test_{measure}"] = MetricDefinition(
                _SAE.format(measure=words, k=k), unit, _TEXTS, "saebench", True
            )
    return found


DEFINITIONS: dict[str, MetricDefinition] = _definitions()
"""Every metric of `run_sae_probes`."""
