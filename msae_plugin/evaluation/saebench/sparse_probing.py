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
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import kept_folder, key_digest
from msae_plugin.data.labelled_texts import (
    LABELLED_SOURCES,
    SAEBENCH_PROBING_SETS,
    LocalCopies,
    labelled_texts,
)
from msae_plugin.evaluation.outcomes import (
    ModelContext,
    Reporter,
    ScoreResult,
    definitions,
    require_real,
)
from msae_plugin.evaluation.saebench.each_sae import evaluate_each, reported_counts, write_result
from msae_plugin.evaluation.saebench.patching import (
    CheckedLatents,
    evaluation_environment,
    replaced,
)
from msae_plugin.models.packaged import PACKAGED_PREFIX
from msae_plugin.saes.load import EvaluatedSAE


@dataclass(frozen=True)
class ProbingTexts:
    """Texts of one probing set.

    Attributes:
        name: SAEBench's name of the set, or ours.
        classes: The classes that are probed.
        train: Texts by class.
        test: Texts by class.
        facts: What a reader must know about them.
    """

    name: str
    classes: list[str]
    train: dict[str, list[str]]
    test: dict[str, list[str]]
    facts: dict[str, str] = field(default_factory=dict[str, str])


def load_probing_texts(
    name: str,
    train_size: int,
    test_size: int,
    seed: int,
    local_copies: Mapping[str, str | Path],
) -> ProbingTexts:
    """Load a probing set as SAEBench would.

    Raises:
        InputError: There is no such set, or it cannot be had.
        RunFailure: It has too few texts of a class.
    """
    if name.startswith(PACKAGED_PREFIX):
        found = labelled_texts(name, train_size, test_size, seed)
        return ProbingTexts(name, list(found.train), found.train, found.test, found.facts)
    if name not in SAEBENCH_PROBING_SETS:
        known = ", ".join((*SAEBENCH_PROBING_SETS, *LABELLED_SOURCES))
        raise InputError(
            f"sparse_probing.dataset_names: {name!r} is not known: choose from {known}"
        )
    classes = list(dataset_info.chosen_classes_per_dataset[name])
    copies = LocalCopies(local_copies, dataset_utils.load_dataset)
    sizes = f"probe_train_set_size {train_size} and probe_test_set_size {test_size}"
    try:
        with replaced(dataset_utils, "load_dataset", copies.load_dataset):
            train, test = dataset_utils.get_multi_label_train_test_data(
                name, train_size, test_size, seed
            )
    except InputError:
        raise
    # What SAEBench's loaders raise where a class has too few rows: a failed assert, or pandas'
    # ValueError of a sample that is larger than its population.
    except (AssertionError, ValueError) as error:
        reason = str(error) or "a class has too few texts"
        raise RunFailure(
            f"dataset {name}: SAEBench's loader fails with {sizes} ({reason})"
        ) from error
    for label in classes:
        if label not in train:
            raise RunFailure(f"dataset {name}: class {label!r} has too few texts for {sizes}")
    facts = {"source": "local copy"} if SAEBENCH_PROBING_SETS[name] in local_copies else {}
    return ProbingTexts(
        name, classes, {c: train[c] for c in classes}, {c: test[c] for c in classes}, facts
    )


@contextmanager
def served(texts: ProbingTexts) -> Generator[None, None, None]:
    """Give SAEBench these texts under their name, for the time of the block."""

    def get_multi_label_train_test_data(
        dataset_name: str, *_sizes_and_seed: int
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        if dataset_name != texts.name:
            raise RunFailure(f"sparse_probing: SAEBench asks for {dataset_name!r}")
        return dict(texts.train), dict(texts.test)

    serve: Callable[..., Any] = get_multi_label_train_test_data
    classes = {**dataset_info.chosen_classes_per_dataset, texts.name: texts.classes}
    with (
        replaced(dataset_utils, "get_multi_label_train_test_data", serve),
        replaced(dataset_info, "chosen_classes_per_dataset", classes),
    ):
        yield


def tokens_sha256(texts: ProbingTexts, tokenizer: Any, context_length: int) -> str:
    """Hash of exactly what the model reads: covers texts, seed, sizes, tokenizer and context.

    Raises:
        RunFailure: A text holds nothing but BOS, EOS and PAD: its mean over tokens is NaN.
    """
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
                    f"dataset {texts.name}: {empty} texts of class {label!r} ({part}) hold nothing "
                    f"but BOS, EOS and PAD in their first {context_length} tokens: SAEBench's mean "
                    "over tokens is NaN"
                )
            digest.update(f"{part}|{label}|{tuple(ids.shape)}|".encode())
            digest.update(ids.contiguous().numpy().tobytes())
            digest.update(kept.contiguous().numpy().tobytes())
    return digest.hexdigest()


logger = logging.getLogger(__name__)

KIND = "sparse_probing"
# Raised when what is stored changes.
FORMAT = 1
# Where SAEBench knows no batch size for a model: its choice for the larger ones.
DEFAULT_LLM_BATCH_SIZE = 32
NOT_TRAINED = "sae_test_accuracy"

_OWN_SETTINGS = ("datasets",)
_FILES = "_activations.pt"


def run_sparse_probing(
    context: ModelContext,
    settings: Mapping[str, Any],
    saes: Sequence[EvaluatedSAE],
    seed: int,
    output: Path,
    report: Reporter,
) -> dict[str, ScoreResult]:
    """Evaluate SAEs with SAEBench's sparse probing.

    Returns:
        An outcome per SAE.

    Raises:
        InputError: A setting cannot work.
    """
    config = _config(context, settings, seed)
    copies: Mapping[str, str | Path] = settings.get("datasets") or {}
    hooks = {evaluated.hook_name: evaluated.layer for evaluated in saes}
    with evaluation_environment(seed):
        side = _ModelSide(context, config, hooks, copies)
        side.prepare(report)
        output.mkdir(parents=True, exist_ok=True)
        return evaluate_each(
            "sparse probing",
            saes,
            lambda evaluated: _evaluate(side, evaluated, output),
            report,
            side.model_back,
        )


def known_k() -> list[int]:
    """The values of k that SAEBench's result has fields for."""
    return reported_counts(SparseProbingSaeMetrics)


def _config(
    context: ModelContext, settings: Mapping[str, Any], seed: int
) -> SparseProbingEvalConfig:
    given: dict[str, Any] = {k: v for k, v in settings.items() if k not in _OWN_SETTINGS}
    if given.get("llm_batch_size") is None:
        given["llm_batch_size"] = activation_collection.LLM_NAME_TO_BATCH_SIZE.get(
            context.name, DEFAULT_LLM_BATCH_SIZE
        )
    given |= {"model_name": context.name, "random_seed": seed, "llm_dtype": context.dtype}
    return SparseProbingEvalConfig(**given)


class _ModelSide:
    """Activations and probes of the language model, per dataset and hook."""

    def __init__(
        self,
        context: ModelContext,
        config: SparseProbingEvalConfig,
        hooks: Mapping[str, int],
        copies: Mapping[str, str | Path],
    ) -> None:
        self.context = context
        self.config = config
        self.facts: dict[str, str] = {}
        self._hooks = hooks
        self._copies = copies
        self._folders: dict[tuple[str, str], Path] = {}
        self._failures: dict[tuple[str, str], Exception] = {}

    def prepare(self, report: Reporter) -> None:
        """Compute what is not on disk yet; what fails is remembered for the SAEs that need it."""
        digests: dict[str, str] = {}
        for number, name in enumerate(self.config.dataset_names):
            report(
                f"sparse probing: language model on {name}", number, len(self.config.dataset_names)
            )
            try:
                texts = load_probing_texts(
                    name,
                    self.config.probe_train_set_size,
                    self.config.probe_test_set_size,
                    self.config.random_seed,
                    self._copies,
                )
                digests[name] = tokens_sha256(
                    texts, self.context.language_model.tokenizer, self.config.context_length
                )
                self.facts |= {f"{key} of {name}": value for key, value in texts.facts.items()}
            # A dataset that cannot be had fails the SAEs, not the other evaluations.
            except Exception as error:
                logger.info("sparse probing: %s failed", name, exc_info=True)
                self._failures |= {(name, hook): error for hook in self._hooks}
                continue
            for hook in self._hooks:
                try:
                    self._folders[name, hook] = self._prepare(texts, digests[name], hook)
                except Exception as error:
                    logger.info("sparse probing: %s at %s failed", name, hook, exc_info=True)
                    self._failures[name, hook] = RunFailure(
                        f"dataset {name}: the language model's side failed ({error})"
                    )
                    self._failures[name, hook].__cause__ = error
        self.facts["text"] = key_digest(digests)

    def folder(self, name: str, hook: str) -> Path:
        """Where the activations of a dataset lie."""
        if (name, hook) in self._failures:
            raise self._failures[name, hook]
        return self._folders[name, hook]

    def model_back(self) -> None:
        """`lower_vram_usage` moves the model to the CPU, and an error leaves it there."""
        if self.config.lower_vram_usage:
            self.context.language_model.model.to(torch.device(self.context.device))

    def _prepare(self, texts: ProbingTexts, tokens: str, hook: str) -> Path:
        config = dataclasses.replace(self.config, dataset_names=[texts.name])
        key = {
            **self.context.key(
                "torch", "transformer-lens", "transformers", "sae-bench", "scikit-learn"
            ),
            "format": FORMAT,
            "hook": hook,
            "dataset": texts.name,
            "tokens": tokens,
            # The probes on activations take random numbers in the order of k.
            "k_values": config.k_values,
            "llm_batch_size": config.llm_batch_size,
            "seed": config.random_seed,
        }
        return kept_folder(
            self.context.cache.absolute(),
            KIND,
            key,
            lambda folder: self._compute(texts, config, hook, folder),
        )

    def _compute(
        self, texts: ProbingTexts, config: SparseProbingEvalConfig, hook: str, folder: Path
    ) -> None:
        stand_in = _StandIn(self._hooks[hook], hook, self.context.torch_dtype)
        try:
            with served(texts):
                probing_main.run_eval_single_sae(
                    config,
                    stand_in,  # pyright: ignore[reportArgumentType] - in place of any SAE
                    self.context.language_model.model,  # pyright: ignore[reportArgumentType]
                    self.context.device,
                    str(folder),
                )
        except _ModelSideDone:
            pass
        finally:
            self.model_back()
        if not any(file.name.endswith(_FILES) for file in folder.iterdir()):
            raise RunFailure("SAEBench stored no activations")


class _ModelSideDone(Exception):
    """SAEBench has stored the model's side and turns to the SAE."""


class _StandIn:
    """Stands for an SAE until SAEBench asks for latents, just after it stored the model's side."""

    def __init__(self, layer: int, hook_name: str, dtype: torch.dtype) -> None:
        self.cfg = SimpleNamespace(hook_layer=layer, hook_name=hook_name)
        self.dtype = dtype

    def encode(self, _activations: torch.Tensor) -> torch.Tensor:
        """Ends SAEBench's function."""
        raise _ModelSideDone


def _evaluate(side: _ModelSide, evaluated: EvaluatedSAE, output: Path) -> ScoreResult:
    context, config = side.context, side.config
    folders = {name: side.folder(name, evaluated.hook_name) for name in config.dataset_names}
    sae = evaluated.for_saebench(context.torch_dtype, context.device)
    if sae.cfg.metadata.model_name is None:
        sae.cfg.metadata.model_name = context.name
    general_utils.load_and_format_sae(evaluated.name, sae, context.device)
    latents = CheckedLatents(sae, evaluated.name)
    results: dict[str, dict[str, float]] = {}
    per_class: dict[str, Any] = {}
    for name, folder in folders.items():
        # Each dataset begins with the seed, hence its result does not depend on the others.
        result, classes = probing_main.run_eval_single_sae(
            dataclasses.replace(config, dataset_names=[name]),
            sae,
            context.language_model.model,  # pyright: ignore[reportArgumentType]
            context.device,
            str(folder),
        )
        # SAEBench's own name of a dataset's part, in the file too.
        part = f"{name}_results"
        results[part] = result[part]  # pyright: ignore[reportArgumentType]
        per_class |= classes
    latents.require_active()
    averages = general_utils.average_results_dictionaries(results, config.dataset_names)
    metrics = dict(averages)
    facts = dict(side.facts)
    if config.lower_vram_usage:
        # SAEBench's marker -1: it did not train this probe.
        del metrics[NOT_TRAINED]
        facts[NOT_TRAINED] = "not measured: lower_vram_usage leaves the probe on all latents out"
    require_real(metrics, f"sparse probing of {evaluated.name}")
    file = write_result(
        SparseProbingEvalOutput,
        config,
        evaluated,
        sae,
        output,
        eval_result_metrics=SparseProbingMetricCategories(
            llm=SparseProbingLlmMetrics(
                **{k: v for k, v in averages.items() if k.startswith("llm_")}
            ),
            sae=SparseProbingSaeMetrics(
                **{k: v for k, v in averages.items() if k.startswith("sae_")}
            ),
        ),
        eval_result_details=[
            SparseProbingResultDetail(dataset_name=part, **values)
            for part, values in results.items()
        ],
        eval_result_unstructured=per_class,
    )
    gc.collect()
    return ScoreResult("measured", metrics, file, facts=facts)


DEFINITIONS = definitions("sparse_probing", known_k())
"""Every metric of `run_sparse_probing`."""
