"""What the adapters of SAEBench's evaluations share: the model's side once, then SAE after SAE."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from sae_bench.sae_bench_utils import get_eval_uuid, get_sae_bench_version, get_sae_lens_version
from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE
from sae_lens import SAE

from msae_plugin.common.errors import RunFailure
from msae_plugin.common.files import file_written_atomically
from msae_plugin.evaluation.outcomes import (
    SAEBENCH_ID,
    EvaluationRun,
    ModelContext,
    ScoreResult,
    failure,
    result_file,
)
from msae_plugin.evaluation.recipe import config_class
from msae_plugin.evaluation.saebench.patching import evaluation_environment
from msae_plugin.saes.load import EvaluatedSAE

logger = logging.getLogger(__name__)

T = TypeVar("T")

ADAPTERS = {
    "core": "core.Core",
    "sparse_probing": "sparse_probing.SparseProbing",
    "sparse_probing_sae_probes": "sae_probes.SaeProbes",
    "unlearning": "unlearning.Unlearning",
}
"""Module and class of the evaluations that have their own; `passthrough` runs the rest."""

# Where SAEBench knows no batch size for a model: its choice for the larger ones. Prompts of two
# evaluations are longer (`run_all_evals_custom_saes.py`, `unlearning/main.py`).
DEFAULT_BATCH_SIZE = 32
_BATCH_DIVISOR = {"ravel": 4, "unlearning": 8}


class Adapter(ABC):
    """One of SAEBench's evaluations with one seed."""

    title = ""
    """The evaluation in messages, where that is not its name in a config file."""

    def __init__(self, run: EvaluationRun, saes: Sequence[EvaluatedSAE]) -> None:
        self.evaluation, self.context, self.settings = run.evaluation, run.context, run.settings
        self.saes, self.seed, self.report = saes, run.seed, run.report
        self.output = run.output.absolute()
        self.title = self.title or run.evaluation

    def prepare(self) -> dict[str, ScoreResult]:
        """Compute what depends on the model alone; the results of SAEs that are known by then."""
        return {}

    @abstractmethod
    def evaluate(self, evaluated: EvaluatedSAE) -> ScoreResult:
        """Evaluate one SAE."""

    def restore(self) -> None:
        """Put right what SAEBench leaves behind in the model, which is shared."""
        self.model_back()

    def run(self) -> dict[str, ScoreResult]:
        """Evaluate the SAEs one by one: whatever one raises is its own result."""
        with evaluation_environment(self.seed):
            found = self.prepare()
        self.output.mkdir(parents=True, exist_ok=True)
        for number, evaluated in enumerate(self.saes):
            if evaluated.name in found:
                continue
            self.report(f"{self.title}: {evaluated.name}", number, len(self.saes))
            try:
                with evaluation_environment(self.seed):
                    found[evaluated.name] = self.evaluate(evaluated)
            except Exception as error:
                logger.info("%s: %s failed", self.title, evaluated.name, exc_info=True)
                found[evaluated.name] = failure(error)
            finally:
                self.restore()
        return found

    def config(self, **fixed: Any) -> Any:
        """SAEBench's settings: those given, the model, the seed, and its defaults for the rest."""
        given = {**self.settings, **fixed}
        return saebench_config(self.evaluation, given, self.context, self.seed)

    def copy_of(self, evaluated: EvaluatedSAE, dtype: torch.dtype | None = None) -> SAE[Any]:
        """A copy of an SAE that SAEBench may change, in the model's dtype or another."""
        sae = evaluated.for_saebench(dtype or self.context.torch_dtype, self.context.device)
        if sae.cfg.metadata.model_name is None:
            sae.cfg.metadata.model_name = self.context.name
        return sae

    def attempted(self, what: str, compute: Callable[[], T]) -> T | Exception:
        """What is computed of the model alone, or what it raised: it fails SAEs, not the others."""
        try:
            return compute()
        except Exception as error:
            logger.info("%s: %s failed", self.title, what, exc_info=True)
            return error

    def model_side(self, dataset: str, hook: str, compute: Callable[[], T]) -> T | Exception:
        """The model's side of a dataset; an error, which fails the SAEs at this hook alone."""
        found = self.attempted(f"{dataset} at {hook}", compute)
        if not isinstance(found, Exception):
            return found
        failed = RunFailure(f"dataset {dataset}: the language model's side failed ({found})")
        failed.__cause__ = found
        return failed

    def model_back(self) -> None:
        """`lower_vram_usage` moves the model to the CPU, and an error leaves it there."""
        model, device = self.context.language_model.model, torch.device(self.context.device)
        if next(model.parameters()).device.type != device.type:
            model.to(device)

    def write_result(
        self, kind: type[Any], config: Any, evaluated: EvaluatedSAE, sae: SAE[Any], **parts: Any
    ) -> Path:
        """Write SAEBench's JSON of one SAE; `parts` are the evaluation's own fields."""
        result = kind(
            eval_config=config,
            eval_id=get_eval_uuid(),
            datetime_epoch_millis=int(time.time() * 1000),
            sae_bench_commit_hash=get_sae_bench_version(),
            sae_lens_id=SAEBENCH_ID,
            sae_lens_release_id=evaluated.name,
            sae_lens_version=get_sae_lens_version(),
            sae_cfg_dict=sae.cfg.to_dict(),
            **parts,
        )
        return self.keep_result(evaluated, partial(result.to_json_file, indent=2))

    def keep_result(self, evaluated: EvaluatedSAE, write: Callable[[str], object]) -> Path:
        """The file of SAEBench's JSON of one SAE, which `write` writes to the path it is given."""
        file = result_file(self.output, evaluated)
        with file_written_atomically(file) as temporary:
            write(str(temporary))
        return file


def saebench_config(
    evaluation: str, settings: Mapping[str, Any], context: ModelContext | None, seed: int
) -> Any:
    """An object of SAEBench's config class; without a model only what a preflight asks is right."""
    cls = cast("type[Any]", config_class(evaluation))
    known = {item.name for item in dataclasses.fields(cls)}
    name, dtype = ("", "float32") if context is None else (context.name, context.dtype)
    given: dict[str, Any] = {"model_name": name, "random_seed": seed, "llm_dtype": dtype}
    given |= settings
    divisor = _BATCH_DIVISOR.get(evaluation, 1)
    if "llm_batch_size" in known and given.get("llm_batch_size") is None:
        # RAVEL's default of 2048 fits no model into memory.
        if cls().llm_batch_size is None or divisor > 1:
            size = LLM_NAME_TO_BATCH_SIZE.get(name.rsplit("/", 1)[-1], DEFAULT_BATCH_SIZE)
            given["llm_batch_size"] = size // divisor
        else:
            given.pop("llm_batch_size", None)
    return cls(**{key: value for key, value in given.items() if key in known})


def real(result: T | Exception) -> T:
    """What was computed; raises what it failed with."""
    if isinstance(result, Exception):
        raise result
    return result


def run_evaluation(run: EvaluationRun, saes: Sequence[EvaluatedSAE]) -> dict[str, ScoreResult]:
    """Run one evaluation with one seed; its result by SAE."""
    module, _, name = ADAPTERS.get(run.evaluation, "passthrough.Passthrough").partition(".")
    found = importlib.import_module(f"msae_plugin.evaluation.saebench.{module}")
    adapter: type[Adapter] = getattr(found, name)
    return adapter(run, saes).run()
