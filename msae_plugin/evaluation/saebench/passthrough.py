"""SAEBench's further evaluations: thin calls of its own `run_eval`, with the model handed in.

Absorption, SCR, TPP, RAVEL, autointerp and meta_structure run as SAEBench has them, one SAE at a
time, in an empty working directory. `metrics.yaml` says what is known of each. SAEBench's `mdl` is
not among them: it needs a package that SAEBench does not declare (loguru) and writes a table of
settings, no metrics; `msae saebench mdl` runs its script.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
from sae_bench.evals.absorption import common as absorption_common
from sae_bench.evals.absorption import main as absorption_main
from sae_bench.evals.autointerp import main as autointerp_main
from sae_bench.evals.meta_structure import main as meta_structure_main
from sae_bench.evals.ravel import instance as ravel_instance
from sae_bench.evals.ravel import main as ravel_main
from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp_main
from sae_bench.sae_bench_utils import dataset_utils
from transformers import AutoModelForCausalLM, AutoTokenizer
from typing_extensions import override

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import is_complete, kept_folder, keyed_folder, mark_complete
from msae_plugin.data.labelled_texts import LocalCopies
from msae_plugin.evaluation.outcomes import ModelContext, ScoreResult, require_real, result_file
from msae_plugin.evaluation.preflight import OPENAI_VARIABLE, RAVEL_DATASET
from msae_plugin.evaluation.saebench.adapter import Adapter
from msae_plugin.evaluation.saebench.patching import (
    Change,
    all_replaced,
    scratch_working_directory,
    seeded,
)
from msae_plugin.evaluation.saebench.sae_probes import tokenizer_sha256
from msae_plugin.models.loading import resolve_model
from msae_plugin.saes.load import EvaluatedSAE

# Fields of SAEBench's results that measure the machine; they stay in its JSON.
NOT_OF_THE_SAE = frozenset({"train_time_seconds"})

_MAIN: dict[str, Any] = {
    "absorption": absorption_main,
    "scr": scr_and_tpp_main,
    "tpp": scr_and_tpp_main,
    "ravel": ravel_main,
    "autointerp": autointerp_main,
    "meta_structure": meta_structure_main,
}


class Passthrough(Adapter):
    """SAEBench's `run_eval` for one SAE, in an empty working directory."""

    @override
    def restore(self) -> None:
        # SAEBench may leave hooks behind, and gradients (absorption takes some).
        self.context.language_model.model.reset_hooks()
        self.context.language_model.model.zero_grad(set_to_none=True)
        super().restore()

    @override
    def evaluate(self, evaluated: EvaluatedSAE) -> ScoreResult:
        kind, probing = self.evaluation, self.evaluation in ("scr", "tpp")
        config = self.config(**({"perform_scr": kind == "scr"} if probing else {}))
        sae = evaluated.for_saebench(self.context.torch_dtype, self.context.device)
        with scratch_working_directory() as scratch, self._adapted(config, evaluated, scratch):
            arguments: dict[str, Any] = {
                "config": config,
                "selected_saes": [(evaluated.name, sae)],
                "device": self.context.device,
                "output_path": str(scratch / "results"),
                "force_rerun": True,
            }
            if kind == "autointerp":
                if not (key := os.environ.get(OPENAI_VARIABLE)):
                    needed = f"autointerp needs a key of OpenAI: export {OPENAI_VARIABLE}=..."
                    raise InputError(needed)
                arguments["api_key"] = key
            if probing:
                # The activations of all texts, tens of GB, are of no use to another SAE here: the
                # random numbers that SAEBench draws differ when it finds them.
                arguments |= {"save_activations": False, "clean_up_activations": True}
            (scratch / "results").mkdir()
            _MAIN[kind].run_eval(**arguments)
            written = result_file(scratch / "results" / (kind if probing else ""), evaluated)
            if written.is_file():
                return self._collected(evaluated, written)
        if kind == "absorption":
            return ScoreResult(
                "not_measurable",
                reason=f"fewer than {config.min_feats_for_eval} first letters can be read off the "
                f"model's activations with an F1 above {config.min_GT_probe_f1}: it cannot spell "
                "(min_feats_for_eval, min_GT_probe_f1)",
            )
        raise RunFailure(f"{kind}: SAEBench wrote no result and raised nothing")

    def _collected(self, evaluated: EvaluatedSAE, written: Path) -> ScoreResult:
        categories: Mapping[str, Mapping[str, Any]] = json.loads(
            written.read_text(encoding="utf-8")
        )["eval_result_metrics"]
        metrics = {
            name: float(value)
            for category in categories.values()
            for name, value in category.items()
            # Null is what SAEBench writes for sizes that were not asked for.
            if value is not None and name not in NOT_OF_THE_SAE
        }
        where = f"{self.evaluation} of {evaluated.name}"
        if not metrics:
            raise RunFailure(f"{where}: SAEBench's result holds no number")
        require_real(metrics, where)
        file = self.keep_result(evaluated, functools.partial(shutil.copyfile, written))
        return ScoreResult("measured", metrics, file)

    @contextmanager
    def _adapted(
        self, config: Any, evaluated: EvaluatedSAE, scratch: Path
    ) -> Generator[None, None, None]:
        """The names that SAEBench's evaluation finds in place of its own."""
        kind, context, main = self.evaluation, self.context, _MAIN[self.evaluation]
        local: Mapping[str, str] = self.settings.get("datasets") or {}
        load_dataset = LocalCopies(local).load_dataset
        changes: list[Change] = []
        if hasattr(main, "HookedTransformer"):
            changes.append((main, "HookedTransformer", _LoadedModel(context)))
        if kind in ("scr", "tpp", "autointerp"):
            changes.append((dataset_utils, "load_dataset", load_dataset))
        if kind in ("scr", "tpp"):
            changes.append((dataset_creation, "load_dataset", load_dataset))
        completions: AbstractContextManager[None] = nullcontext()
        if kind == "absorption":
            probes = _absorption_probes(context, config, evaluated, self.seed)
            changes += _absorption_paths(probes, scratch)
        if kind == "ravel":
            changes += _ravel_names(context, local)
            completions = _ravel_completions(context, config, scratch / config.artifact_dir)
        with all_replaced(*changes), completions:
            yield


@dataclass(frozen=True)
class _LoadedModel:
    """Stands for TransformerLens' HookedTransformer where SAEBench loads one by name."""

    context: ModelContext

    def from_pretrained_no_processing(self, name: str, **_options: Any) -> Any:
        """The model that is loaded already; its device and dtype are the config's."""
        if name != self.context.name:
            raise RunFailure(
                f"SAEBench asks for the model {name!r}, loaded is {self.context.name!r}"
            )
        return self.context.language_model.model


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


def _absorption_paths(probes: Path, scratch: Path) -> list[Change]:
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
    return [
        (absorption_main, "run_k_sparse_probing_experiment", k_sparse),
        (absorption_main, "run_feature_absortion_experiment", absorption),
    ]


def _ravel_names(context: ModelContext, copies: Mapping[str, str]) -> list[Change]:
    """RAVEL reads a Hugging Face model, not a HookedTransformer, and knows two names."""
    folder = resolve_model(context.name).folder

    def load_model(_name: str, **options: Any) -> Any:
        dtype = options.pop("torch_dtype", context.torch_dtype)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()

    def load_tokenizer(_name: str) -> Any:
        return AutoTokenizer.from_pretrained(folder)

    def snapshot_download(*, local_dir: str, **options: Any) -> str:
        if RAVEL_DATASET in copies:
            shutil.copytree(copies[RAVEL_DATASET], local_dir, dirs_exist_ok=True)
            return local_dir
        options.pop("local_dir_use_symlinks", None)  # huggingface_hub no longer takes it
        return huggingface_hub.snapshot_download(local_dir=local_dir, **options)

    return [
        (ravel_main, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=load_model)),
        (ravel_main, "AutoTokenizer", SimpleNamespace(from_pretrained=load_tokenizer)),
        (ravel_main, "LLM_NAME_MAP", {context.name: context.name}),
        (ravel_instance, "snapshot_download", snapshot_download),
    ]


_OF_COMPLETIONS = (
    "entity_attribute_selection", "top_n_entities", "n_generated_tokens", "llm_batch_size",
)  # fmt: skip


@contextmanager
def _ravel_completions(
    context: ModelContext, config: Any, artifacts: Path
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
        "seed": config.random_seed,
        "config": {name: getattr(config, name) for name in _OF_COMPLETIONS},
    }
    folder = keyed_folder(context.cache.absolute(), "ravel", key)
    if is_complete(folder):
        shutil.copytree(folder / "artifacts", artifacts)
    yield
    if not is_complete(folder) and artifacts.is_dir():
        shutil.copytree(artifacts, folder / "artifacts", dirs_exist_ok=True)
        mark_complete(folder, key)
