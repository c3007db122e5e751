"""SAEBench's sparse_probing_sae_probes with a model that is handed in.

`sae_bench.evals.sparse_probing_sae_probes.main.run_eval` runs unchanged, once per SAE, in an empty
folder that holds the model's activations and its baselines already (`SaeProbesModelSide`): it
finds nothing to load a model for, and no result of another SAE.

sae-probes computes both itself, for a model that it loads by name; it believes any activations file
of the right length, and any result file. Here `ensure_dataset_activations` and `run_baseline_evals`
run unchanged for one dataset at a time, with the loaded model, in a folder whose key covers
everything that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_bench.evals.sparse_probing_sae_probes import main as sae_probes_main
from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
from sae_probes import DATASETS, run_baseline_evals
from sae_probes.constants import DATA_PATH
from sae_probes.generate_model_activations import ensure_dataset_activations
from sae_probes.utils_data import get_dataset_sizes
from typing_extensions import override

from msae_plugin.common.errors import Problem, RunFailure
from msae_plugin.common.files import files_sha256, kept_folder, key_digest, versions
from msae_plugin.common.recipes import did_you_mean
from msae_plugin.evaluation.outcomes import (
    SAEBENCH_ID,
    ModelContext,
    ScoreResult,
    require_real,
    result_file,
)
from msae_plugin.evaluation.preflight import missing_disk
from msae_plugin.evaluation.saebench.adapter import Adapter, real
from msae_plugin.evaluation.saebench.patching import CheckedLatents, scratch_working_directory
from msae_plugin.saes.load import EvaluatedSAE

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


MEASURES = ("accuracy", "auc", "f1")

# Activations and, where it is measured, the baseline of one dataset.
Files = tuple[Path, Path | None]


class SaeProbes(Adapter):
    """Activations and baselines per hook, then SAEBench's function SAE by SAE.

    Whatever the model's dtype, probes see float32: numpy has no bfloat16.
    """

    title = "sae-probes"

    @override
    def prepare(self) -> dict[str, ScoreResult]:
        name = self.context.name
        # SAEBench puts the name into paths.
        safe = name if ".." not in Path(name).parts else Path(name).name
        self._config: SparseProbingSaeProbesEvalConfig = self.config(model_name=safe)
        hooks = dict.fromkeys(evaluated.hook_name for evaluated in self.saes)
        self._files = {hook: self._of_hook(hook) for hook in hooks}
        return {}

    def _of_hook(self, hook: str) -> list[Files | Exception]:
        config = self._config
        method = config.baseline_method if config.include_llm_baseline else None
        side = SaeProbesModelSide(self.context, hook, config.random_seed, method)
        files: list[Files | Exception] = []
        for number, dataset in enumerate(config.dataset_names):
            self.report(
                f"sae-probes: language model on {dataset}", number, len(config.dataset_names)
            )
            files.append(self.model_side(dataset, hook, partial(side.files, dataset)))
            if isinstance(files[-1], Exception):
                break
        return files

    @override
    def evaluate(self, evaluated: EvaluatedSAE) -> ScoreResult:
        config = self._config
        files = [real(found) for found in self._files[evaluated.hook_name]]
        sae = self.copy_of(evaluated, torch.float32)
        latents = CheckedLatents(sae, evaluated.name)
        with scratch_working_directory() as folder:
            cache = folder / str(config.model_cache_path)
            # Where sae-probes looks for those of this model.
            baselines = folder / config.results_path / f"baseline_results_{config.model_name}"
            for activations, baseline in files:
                _link(activations, cache / f"model_activations_{config.model_name}")
                if baseline is not None:
                    _link(baseline, baselines / "normal_setting")
            result = sae_probes_main.run_eval(
                config, [(evaluated.name, sae)], self.context.device, "results", force_rerun=True
            )[f"{evaluated.name}_{SAEBENCH_ID}"]
            latents.require_active()
            metrics = _metrics(result, config, evaluated)
            written = result_file(folder / "results", evaluated)
            file = self.keep_result(evaluated, partial(shutil.copyfile, written))
        tables = {name: files_sha256([dataset_file(name)]) for name in config.dataset_names}
        # The seed splits each table anew.
        text = key_digest({"tables": tables, "seed": config.random_seed})
        return ScoreResult("measured", metrics, file, facts={"text": text})


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
    """How many texts fit into one pass: sae-probes' 32 unless their attention is too large."""
    allowed = SCORE_BYTES.get(device.split(":", maxsplit=1)[0], SCORE_BYTES_ELSEWHERE)
    tokens = min(longest, MAX_TOKENS)
    return max(1, min(LARGEST_BATCH, allowed // (4 * n_heads * tokens * tokens)))


class SaeProbesModelSide:
    """The model's side of sae-probes for one hook."""

    def __init__(
        self, context: ModelContext, hook_name: str, seed: int, method: str | None
    ) -> None:
        self.context, self.hook_name, self.seed, self.method = context, hook_name, seed, method
        self._tokenizer = tokenizer_sha256(context.language_model.tokenizer)

    def files(self, dataset: str) -> Files:
        """Activations and baseline of a dataset."""
        return self.activations(dataset), self.baseline(dataset)

    def activations(self, dataset: str) -> Path:
        """(texts, d_in) float32 in a file, computed if need be."""
        model: Any = self.context.language_model.model
        # No text has more tokens than bytes, but for a token at each end.
        prompts = pd.read_csv(dataset_file(dataset), compression="zstd")["prompt"]
        longest = max(len(str(prompt).encode()) for prompt in prompts) + 2
        size = batch_size(longest, int(model.cfg.n_heads), self.context.device)
        key: dict[str, Any] = {
            **self._common(dataset),
            "tokenizer": self._tokenizer,
            "max_tokens": MAX_TOKENS,
            "batch_size": size,
            "versions": versions("torch", "transformer-lens", "transformers", "sae-probes"),
        }
        folder = kept_folder(
            self.context.cache.absolute(),
            ACTIVATIONS,
            key,
            lambda folder: self._compute_activations(folder, dataset, size),
        )
        return self._activations_file(folder, dataset)

    def _activations_file(self, folder: Path, dataset: str) -> Path:
        return folder / f"model_activations_{_MODEL}" / f"{dataset}_{self.hook_name}.pt"

    def _compute_activations(self, folder: Path, dataset: str, size: int) -> None:
        with _sides_restored(self.context.language_model.tokenizer):
            ensure_dataset_activations(
                model_name=_MODEL,
                dataset_short_names=[dataset],
                hook_names=[self.hook_name],
                model_cache_path=folder,
                device=self.context.device,
                max_seq_len=MAX_TOKENS,
                batch_size=size,
                model=_LastTokens(self.context.language_model.model),  # pyright: ignore[reportArgumentType]
            )
        file = self._activations_file(folder, dataset)
        found: torch.Tensor = torch.load(file, weights_only=True)
        # numpy, where the probes are trained, has no bfloat16. Widening changes no value.
        found = found.float()
        if not bool(torch.isfinite(found).all()):
            raise RunFailure(f"activations at {self.hook_name} are NaN or infinite")
        torch.save(found, file)

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
        folder = kept_folder(
            self.context.cache.absolute(),
            BASELINES,
            key,
            lambda folder: run_baseline_evals(
                model_name=_MODEL,
                hook_name=self.hook_name,
                setting="normal",
                method=self.method,  # pyright: ignore[reportArgumentType] - checked before
                results_path=folder,
                model_cache_path=activations.parent.parent,
                datasets=[dataset],
                device=self.context.device,
                seed=self.seed,
            ),
        )
        name = f"{dataset}_{self.hook_name}_{self.method}.json"
        return folder / f"baseline_results_{_MODEL}" / "normal_setting" / name

    def _common(self, dataset: str) -> dict[str, Any]:
        return {
            **self.context.key(),
            "format": FORMAT,
            "hook": self.hook_name,
            "dataset": dataset,
            "table": files_sha256([dataset_file(dataset)]),
        }


def _link(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Windows lets only some users make links.
    with suppress(OSError):
        (folder / source.name).symlink_to(source)
        return
    shutil.copyfile(source, folder / source.name)


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
        self._model, self.tokenizer = model, model.tokenizer

    def run_with_cache(
        self, tokens: torch.Tensor, names_filter: Sequence[str], **options: Any
    ) -> tuple[None, Mapping[str, _Copied]]:
        """Activations by hook."""
        cache = self._model.run_with_cache(tokens, names_filter=list(names_filter), **options)[1]
        return None, {name: _Copied(cache[name]) for name in names_filter}


@dataclass(frozen=True)
class _Copied:
    """A tensor whose parts do not keep the whole alive."""

    tensor: torch.Tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index].clone()


def missing_for_sae_probes(
    settings: Mapping[str, Any],
    *,
    cache: Path | None = None,
    d_model: int | None = None,
    runs: int = 1,
) -> list[Problem]:
    """Datasets and disk that sae-probes lacks; its data are inside its own package."""
    names: Sequence[str] = settings.get("dataset_names") or DATASETS
    unknown = [name for name in names if name not in DATASETS]
    found = [
        Problem(
            f"sae-probes dataset {name!r}",
            did_you_mean(name, DATASETS, "choose from sae_probes.DATASETS: ", shown=str, n=3),
        )
        for name in unknown
    ]
    if cache is not None and d_model is not None:
        sizes = get_dataset_sizes()
        texts = sum(sizes[name] for name in names if name in sizes)
        needed = 4 * d_model * texts * runs
        found += missing_disk(cache, needed, "fewer datasets or smaller probe sets")
    return found


def _metrics(
    result: Mapping[str, Any], config: SparseProbingSaeProbesEvalConfig, evaluated: EvaluatedSAE
) -> dict[str, float]:
    where = f"sae-probes of {evaluated.name}"
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
