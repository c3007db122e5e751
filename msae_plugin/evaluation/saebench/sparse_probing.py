"""SAEBench's sparse probing with a model that is handed in.

`sae_bench.evals.sparse_probing.main.run_eval_single_sae` runs unchanged, once per SAE and dataset.
The model's side - activations of the texts and the probes on them - is computed before any SAE is
looked at, and kept under a key of everything that it depends on: SAEBench's own cache file is named
after the dataset alone, and the probes that it trains when the file is missing take random numbers
from those of the first SAE.

What SAEBench's code is given instead of its own names, inside `with` blocks only:
`dataset_utils.load_dataset` reads local copies, `dataset_info.chosen_classes_per_dataset` also
knows our labelled sets, `dataset_utils.get_multi_label_train_test_data` gives texts loaded before.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_bench.evals.sparse_probing import main as probing_main
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.sparse_probing.eval_output import (
    SparseProbingEvalOutput,
    SparseProbingLlmMetrics,
    SparseProbingMetricCategories,
    SparseProbingResultDetail,
    SparseProbingSaeMetrics,
)
from sae_bench.sae_bench_utils import (
    activation_collection,
    dataset_info,
    dataset_utils,
    general_utils,
)
from typing_extensions import override

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import kept_folder, key_digest
from msae_plugin.data.labelled_texts import (
    SAEBENCH_PROBING_SETS,
    LabelledTexts,
    LocalCopies,
    labelled_texts,
)
from msae_plugin.evaluation.outcomes import ScoreResult, require_real
from msae_plugin.evaluation.saebench.adapter import Adapter, real
from msae_plugin.evaluation.saebench.patching import CheckedLatents, replaced
from msae_plugin.models.packaged import PACKAGED_PREFIX
from msae_plugin.saes.load import EvaluatedSAE

KIND = "sparse_probing"
# Raised when what is stored changes.
FORMAT = 1
NOT_TRAINED = "sae_test_accuracy"
_FILES = "_activations.pt"


class SparseProbing(Adapter):
    """Activations and probes of the language model per dataset and hook, then SAE by SAE."""

    title = "sparse probing"

    @override
    def prepare(self) -> dict[str, ScoreResult]:
        self._config: SparseProbingEvalConfig = self.config()
        self._folders: dict[tuple[str, str], Path | Exception] = {}
        self._facts: dict[str, str] = {}
        self._layers = {evaluated.hook_name: evaluated.layer for evaluated in self.saes}
        digests: dict[str, str] = {}
        names = self._config.dataset_names
        for number, name in enumerate(names):
            self.report(f"sparse probing: language model on {name}", number, len(names))
            loaded = self.attempted(name, partial(self._texts, name))
            if isinstance(loaded, Exception):
                self._folders |= {(name, hook): loaded for hook in self._layers}
                continue
            texts, digests[name] = loaded
            self._facts |= {f"{key} of {name}": value for key, value in texts.facts.items()}
            for hook in self._layers:
                self._folders[name, hook] = self.model_side(
                    name, hook, partial(self._kept, name, texts, digests[name], hook)
                )
        self._facts["text"] = key_digest(digests)
        return {}

    def _texts(self, name: str) -> tuple[LabelledTexts, str]:
        config = self._config
        texts = load_probing_texts(name, config, self.settings.get("datasets") or {})
        tokenizer = self.context.language_model.tokenizer
        return texts, tokens_sha256(name, texts, tokenizer, config.context_length)

    def _kept(self, name: str, texts: LabelledTexts, tokens: str, hook: str) -> Path:
        config = dataclasses.replace(self._config, dataset_names=[name])
        key = {
            **self.context.key(
                "torch", "transformer-lens", "transformers", "sae-bench", "scikit-learn"
            ),
            "format": FORMAT,
            "hook": hook,
            "dataset": name,
            "tokens": tokens,
            # The probes on activations take random numbers in the order of k.
            "k_values": config.k_values,
            "llm_batch_size": config.llm_batch_size,
            "seed": config.random_seed,
        }

        def compute(folder: Path) -> None:
            try:
                with served(name, texts):
                    self._run(config, _StandIn(self._layers[hook], hook, self), folder)
            except _ModelSideDone:
                pass
            finally:
                self.model_back()
            if not any(file.name.endswith(_FILES) for file in folder.iterdir()):
                raise RunFailure("SAEBench stored no activations")

        return kept_folder(self.context.cache.absolute(), KIND, key, compute)

    def _run(self, config: SparseProbingEvalConfig, sae: Any, folder: Path) -> Any:
        return probing_main.run_eval_single_sae(
            config,
            sae,
            self.context.language_model.model,  # pyright: ignore[reportArgumentType]
            self.context.device,
            str(folder),
        )

    @override
    def evaluate(self, evaluated: EvaluatedSAE) -> ScoreResult:
        config = self._config
        folders = {
            name: real(self._folders[name, evaluated.hook_name]) for name in config.dataset_names
        }
        sae = self.copy_of(evaluated)
        general_utils.load_and_format_sae(evaluated.name, sae, self.context.device)
        latents = CheckedLatents(sae, evaluated.name)
        results: dict[str, dict[str, float]] = {}
        per_class: dict[str, Any] = {}
        for name, folder in folders.items():
            # Each dataset begins with the seed, hence its result does not depend on the others.
            alone = dataclasses.replace(config, dataset_names=[name])
            result, classes = self._run(alone, sae, folder)
            # SAEBench's own name of a dataset's part, in the file too.
            part = f"{name}_results"
            results[part] = result[part]
            per_class |= classes
        latents.require_active()
        averages = general_utils.average_results_dictionaries(results, config.dataset_names)
        metrics, facts = dict(averages), dict(self._facts)
        if config.lower_vram_usage:
            # SAEBench's marker -1: it did not train this probe.
            del metrics[NOT_TRAINED]
            facts[NOT_TRAINED] = (
                "not measured: lower_vram_usage leaves the probe on all latents out"
            )
        require_real(metrics, f"sparse probing of {evaluated.name}")

        def of(side: str) -> dict[str, float]:
            return {key: value for key, value in averages.items() if key.startswith(side)}

        file = self.write_result(
            SparseProbingEvalOutput,
            config,
            evaluated,
            sae,
            eval_result_metrics=SparseProbingMetricCategories(
                llm=SparseProbingLlmMetrics(**of("llm_")), sae=SparseProbingSaeMetrics(**of("sae_"))
            ),
            eval_result_details=[
                SparseProbingResultDetail(dataset_name=part, **values)
                for part, values in results.items()
            ],
            eval_result_unstructured=per_class,
        )
        gc.collect()
        return ScoreResult("measured", metrics, file, facts=facts)


class _ModelSideDone(Exception):
    """SAEBench has stored the model's side and turns to the SAE."""


class _StandIn:
    """Stands for an SAE until SAEBench asks for latents, just after it stored the model's side."""

    def __init__(self, layer: int, hook_name: str, adapter: Adapter) -> None:
        self.cfg = SimpleNamespace(hook_layer=layer, hook_name=hook_name)
        self.dtype = adapter.context.torch_dtype

    def encode(self, _activations: torch.Tensor) -> torch.Tensor:
        """Ends SAEBench's function."""
        raise _ModelSideDone


def load_probing_texts(
    name: str, config: SparseProbingEvalConfig, local_copies: Mapping[str, str | Path]
) -> LabelledTexts:
    """Load a probing set as SAEBench would."""
    sizes = (config.probe_train_set_size, config.probe_test_set_size, config.random_seed)
    if name.startswith(PACKAGED_PREFIX):
        return labelled_texts(name, *sizes)
    copies = LocalCopies(local_copies, dataset_utils.load_dataset)
    asked = f"probe_train_set_size {sizes[0]} and probe_test_set_size {sizes[1]}"
    try:
        with replaced(dataset_utils, "load_dataset", copies.load_dataset):
            train, test = dataset_utils.get_multi_label_train_test_data(name, *sizes)
    except InputError:
        raise
    # What SAEBench's loaders raise where a class has too few rows: a failed assert, or pandas'
    # ValueError of a sample that is larger than its population.
    except (AssertionError, ValueError) as error:
        reason = str(error) or "a class has too few texts"
        raise RunFailure(
            f"dataset {name}: SAEBench's loader fails with {asked} ({reason})"
        ) from error
    classes = dataset_info.chosen_classes_per_dataset[name]
    for label in classes:
        if label not in train:
            raise RunFailure(f"dataset {name}: class {label!r} has too few texts for {asked}")
    facts = {"source": "local copy"} if SAEBENCH_PROBING_SETS[name] in local_copies else {}
    return LabelledTexts({c: train[c] for c in classes}, {c: test[c] for c in classes}, facts)


@contextmanager
def served(name: str, texts: LabelledTexts) -> Generator[None, None, None]:
    """Give SAEBench these texts under their name, for the time of the block."""

    def get_multi_label_train_test_data(
        dataset_name: str, *_sizes_and_seed: int
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        if dataset_name != name:
            raise RunFailure(f"sparse_probing: SAEBench asks for {dataset_name!r}")
        return dict(texts.train), dict(texts.test)

    serve: Callable[..., Any] = get_multi_label_train_test_data
    classes = {**dataset_info.chosen_classes_per_dataset, name: list(texts.train)}
    with (
        replaced(dataset_utils, "get_multi_label_train_test_data", serve),
        replaced(dataset_info, "chosen_classes_per_dataset", classes),
    ):
        yield


def tokens_sha256(name: str, texts: LabelledTexts, tokenizer: Any, context_length: int) -> str:
    """Hash of exactly what the model reads: covers texts, seed, sizes, tokenizer and context."""
    digest = hashlib.sha256()
    for part, by_class in (("train", texts.train), ("test", texts.test)):
        tokenised = dataset_utils.tokenize_data_dictionary(
            by_class, tokenizer, context_length, "cpu"
        )
        for label, fields in tokenised.items():
            ids = fields["input_ids"]
            kept = activation_collection.get_bos_pad_eos_mask(ids, tokenizer)
            empty = int((~kept.any(dim=1)).sum())
            if empty:
                raise RunFailure(
                    f"dataset {name}: {empty} texts of class {label!r} ({part}) hold nothing but "
                    f"BOS, EOS and PAD in their first {context_length} tokens: SAEBench's mean "
                    "over tokens is NaN"
                )
            digest.update(f"{part}|{label}|{tuple(ids.shape)}|".encode())
            digest.update(ids.contiguous().numpy().tobytes())
            digest.update(kept.contiguous().numpy().tobytes())
    return digest.hexdigest()
