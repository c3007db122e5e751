"""SAEBench's sparse_probing_sae_probes with a model that is handed in.

`sae_bench.evals.sparse_probing_sae_probes.main.run_eval` runs unchanged, once per SAE, in an empty
folder that holds the model's activations and its baselines already (`sae_probes_model_side`): it
finds nothing to load a model for, and no result of another SAE.

sae-probes computes both itself, for a model that it loads by name; it believes any activations file
of the right length, and any result file. Here `ensure_dataset_activations` and `run_baseline_evals`
run unchanged for one dataset at a time, with the loaded model, in a folder whose key covers
everything that they depend on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_bench.evals.sparse_probing_sae_probes import main as sae_probes_main
from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
from sae_bench.evals.sparse_probing_sae_probes.eval_output import SaeProbesSaeMetrics
from sae_probes import DATASETS, run_baseline_evals
from sae_probes.constants import DATA_PATH
from sae_probes.generate_model_activations import ensure_dataset_activations
from sae_probes.run_baselines import METHODS
from sae_probes.utils_data import get_dataset_sizes

from msae_plugin.common.errors import InputError, Missing, RunFailure
from msae_plugin.common.files import (
    files_sha256,
    is_complete,
    key_digest,
    keyed_folder,
    mark_complete,
    versions,
)
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
from msae_plugin.evaluation.saebench.patching import (
    CheckedLatents,
    evaluation_environment,
    scratch_working_directory,
)
from msae_plugin.saes.load import Subject

ACTIVATIONS = "sae_probes_activations"
BASELINES = "sae_probes_baselines"
# Raised when what is stored changes.
FORMAT = 1

# sae-probes' own values.
MAX_TOKENS = 1024
LARGEST_BATCH = 32
# Attention scores of one layer may take this much, and TransformerLens holds about three such
# tensors: sae-probes' 32 texts of 1024 tokens would be 1.2 GB each on SmolLM2's nine heads.
SCORE_BYTES = {"cpu": 2**28}
SCORE_BYTES_ELSEWHERE = 2**31

# In a folder of our own no model's name is needed, and none can lead out of it.
_MODEL = "model"


def dataset_file(dataset: str) -> Path:
    """The table of a dataset inside the sae-probes wheel."""
    return DATA_PATH / "cleaned_data" / f"{dataset}.csv.zst"


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of how a tokenizer splits text, without the settings of its last call."""
    if getattr(tokenizer, "is_fast", False):
        state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        state = {k: v for k, v in state.items() if k not in ("truncation", "padding")}
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    state["special"] = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def batch_size(longest: int, n_heads: int, device: str) -> int:
    """How many texts fit into one pass: sae-probes' 32 unless their attention is too large.

    Args:
        longest: Tokens of the longest text.
        n_heads: Attention heads of a layer.
        device: A torch device.
    """
    allowed = SCORE_BYTES.get(device.split(":", maxsplit=1)[0], SCORE_BYTES_ELSEWHERE)
    tokens = min(longest, MAX_TOKENS)
    return max(1, min(LARGEST_BATCH, allowed // (4 * n_heads * tokens * tokens)))


class SaeProbesModelSide:
    """The model's side of sae-probes for one hook.

    Args:
        context: The model.
        hook_name: Where the SAEs read.
        seed: Of the split of every dataset and of the probes.
        method: sae-probes' name of the probe on the model; None for no such probe.
    """

    def __init__(
        self, context: ModelContext, hook_name: str, seed: int, method: str | None
    ) -> None:
        self.context = context
        self.hook_name = hook_name
        self.seed = seed
        self.method = method
        self._tokenizer = tokenizer_sha256(context.language_model.tokenizer)

    def activations(self, dataset: str) -> Path:
        """(texts, d_in) float32 in a file, computed if need be.

        Raises:
            RunFailure: An activation is NaN or infinite.
        """
        model = self.context.language_model.model
        longest = _longest(dataset)
        size = batch_size(longest, int(model.cfg.n_heads), self.context.device)
        key: dict[str, Any] = {
            **self._common(dataset),
            "tokenizer": self._tokenizer,
            "max_tokens": MAX_TOKENS,
            "batch_size": size,
            "versions": versions("torch", "transformer-lens", "transformers", "sae-probes"),
        }
        folder = keyed_folder(self.context.cache.absolute(), ACTIVATIONS, key)
        file = folder / f"model_activations_{_MODEL}" / f"{dataset}_{self.hook_name}.pt"
        if is_complete(folder):
            return file
        with _sides_restored(self.context.language_model.tokenizer):
            ensure_dataset_activations(
                model_name=_MODEL,
                dataset_short_names=[dataset],
                hook_names=[self.hook_name],
                model_cache_path=folder,
                device=self.context.device,
                max_seq_len=MAX_TOKENS,
                batch_size=size,
                model=_LastTokens(model),  # pyright: ignore[reportArgumentType] - as the model
            )
        found: torch.Tensor = torch.load(file, weights_only=True)
        # numpy, where the probes are trained, has no bfloat16. Widening changes no value.
        found = found.float()
        if not bool(torch.isfinite(found).all()):
            raise RunFailure(f"activations at {self.hook_name} are NaN or infinite")
        torch.save(found, file)
        mark_complete(folder, key)
        return file

    def baseline(self, dataset: str) -> Path | None:
        """sae-probes' JSON of the probe on the model's activations, computed if need be."""
        if self.method is None:
            return None
        activations = self.activations(dataset)
        key: dict[str, Any] = {
            **self._common(dataset),
            "activations": activations.parent.parent.name,
            "seed": self.seed,
            "method": self.method,
            "versions": versions("sae-probes", "scikit-learn", "xgboost", "numpy"),
        }
        folder = keyed_folder(self.context.cache.absolute(), BASELINES, key)
        if not is_complete(folder):
            run_baseline_evals(
                model_name=_MODEL,
                hook_name=self.hook_name,
                setting="normal",
                method=self.method,  # pyright: ignore[reportArgumentType] - checked before
                results_path=folder,
                model_cache_path=activations.parent.parent,
                datasets=[dataset],
                device=self.context.device,
                seed=self.seed,
            )
            mark_complete(folder, key)
        name = f"{dataset}_{self.hook_name}_{self.method}.json"
        return folder / f"baseline_results_{_MODEL}" / "normal_setting" / name

    def _common(self, dataset: str) -> dict[str, Any]:
        model = self.context.language_model.model
        return {
            "format": FORMAT,
            "model": self.context.weights_sha256,
            "model_config": str(sorted(model.cfg.to_dict().items(), key=str)),
            "dtype": self.context.dtype,
            "device": self.context.device.split(":")[0],
            "hook": self.hook_name,
            "dataset": dataset,
            "table": files_sha256([dataset_file(dataset)]),
        }


def lay_out(
    cache: Path, results: Path, model_name: str, files: Sequence[tuple[Path, Path | None]]
) -> None:
    """Put activations and baselines where sae-probes looks for those of `model_name`.

    Args:
        cache: sae-probes' `model_cache_path`.
        results: sae-probes' `results_path`.
        model_name: What sae-probes is told.
        files: For each dataset the activations and the baseline.
    """
    for activations, baseline in files:
        _link(activations, cache / f"model_activations_{model_name}" / activations.name)
        if baseline is not None:
            folder = results / f"baseline_results_{model_name}" / "normal_setting"
            _link(baseline, folder / baseline.name)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Windows lets only some users make links.
    with suppress(OSError):
        target.symlink_to(source)
        return
    shutil.copyfile(source, target)


def _longest(dataset: str) -> int:
    """No text has more tokens than bytes, but for a token at each end."""
    prompts = pd.read_csv(dataset_file(dataset), compression="zstd")["prompt"]
    return max(len(str(prompt).encode()) for prompt in prompts) + 2


@contextmanager
def _sides_restored(tokenizer: Any) -> Generator[None, None, None]:
    # sae-probes makes the tokenizer cut texts on the left, which would change what every later
    # evaluation reads.
    before = tokenizer.truncation_side, tokenizer.padding_side
    try:
        yield
    finally:
        tokenizer.truncation_side, tokenizer.padding_side = before


class _LastTokens:
    """The model as sae-probes uses it, without keeping what it does not want.

    sae-probes takes one token's activations of every text, on a CPU as views: the whole batch
    would stay in memory behind each, 9 GB for 4,000 texts of 1024 tokens and SmolLM2's width.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.tokenizer = model.tokenizer

    def run_with_cache(
        self, tokens: torch.Tensor, names_filter: Sequence[str], **options: Any
    ) -> tuple[None, Mapping[str, _Copied]]:
        """Activations by hook."""
        cache = self._model.run_with_cache(tokens, names_filter=list(names_filter), **options)[1]
        return None, {name: _Copied(cache[name]) for name in names_filter}


class _Copied:
    """A tensor whose parts do not keep the whole alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index].clone()


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
