"""The values that evaluations exchange: the model, each SAE's result, what a metric means."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from msae_plugin.common.errors import RunFailure
from msae_plugin.common.files import versions
from msae_plugin.common.progress import Report, warnings_alone
from msae_plugin.models.loading import LanguageModel
from msae_plugin.saes.load import EvaluatedSAE


@dataclass(frozen=True)
class MetricDefinition:
    """The meaning of a number; parts that a file lacks are empty."""

    definition: str = "no definition was given"  # a formula or a sentence
    unit: str = ""  # `nats per token`, `share`, `latents per token`, ...
    tokens: str = ""  # which tokens or examples it covers, and whether BOS is among them
    source: str = ""  # `saebench` (its number, under its name) or `msae` (computed here)
    higher_is_better: bool | None = None  # None where neither is, or nobody said

    @property
    def direction(self) -> str:
        """Which way is better, in words."""
        return {None: "neither", True: "higher", False: "lower"}[self.higher_is_better]

    @property
    def arrow(self) -> str:
        """The same as an arrow, empty where neither is better."""
        return {None: "", True: "↑", False: "↓"}[self.higher_is_better]


@cache
def _contents() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(Path(__file__).with_name("metrics.yaml").read_text(encoding="utf-8"))


def definitions(evaluation: str, counts: Iterable[int] = ()) -> dict[str, MetricDefinition]:
    """The metrics of an evaluation by name.

    `counts` are what `{k}` in names and definitions stands for.
    """
    found: dict[str, MetricDefinition] = {}
    for name, entry in _contents()[evaluation].items():
        for k in counts if "{k}" in name else (0,):
            text = str(entry["definition"]).replace("{k}", str(k))
            values: dict[str, Any] = {**entry, "definition": text}
            found[name.replace("{k}", str(k))] = MetricDefinition(**values)
    return found


def reliability() -> dict[str, str]:
    """Reliability of SAEBench's further evaluations, as far as it is known, by evaluation."""
    return {name: entry["reliability"] for name, entry in _contents()["passthrough"].items()}


def described(evaluation: str, metric: str, description: str) -> MetricDefinition:
    """The definition of a metric that SAEBench describes itself, with what is known of it."""
    entry = _contents()["passthrough"][evaluation]
    patterns: dict[str, dict[str, Any]] = entry["metrics"]
    found = next(value for pattern, value in patterns.items() if re.fullmatch(pattern, metric))
    return MetricDefinition(
        definition=f"{description.rstrip('.')}. Reliability: {entry['reliability']}",
        tokens=entry["tokens"],
        source="saebench",
        **found,
    )


Status = Literal["measured", "failed", "skipped", "not_measurable"]

SAEBENCH_ID = "custom_sae"
"""SAEBench's name for every SAE that it is given as an object, in file names too."""

SAEBENCH_MARKER = -1
"""SAEBench's mark for a NaN, and for a probe that it did not train."""


@dataclass(frozen=True)
class ModelContext:
    """The language model of an evaluation, loaded once for all SAEs."""

    # `.model` has TransformerLens' hooks, is in eval mode and already in `dtype`.
    language_model: LanguageModel
    weights_sha256: str  # hash of its parameters
    dtype: str  # `float32`, `bfloat16` or `float16`
    device: str  # a torch device
    name: str  # what SAEBench writes as `model_name`
    cache: Path  # root of the model-side caches

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return getattr(torch, self.dtype)

    def key(self, *distributions: str) -> dict[str, Any]:
        """The part of a cache's key that names the model, its dtype and device, and software."""
        model: Any = self.language_model.model
        config = model.cfg.to_dict()
        return {
            "model": self.weights_sha256,
            "model_config": str(sorted(config.items(), key=str)),
            "dtype": self.dtype,
            "device": torch.device(self.device).type,
            "versions": versions(*distributions),
        }


@dataclass(frozen=True)
class ScoreResult:
    """The result of one evaluation of one SAE with one seed."""

    # `measured`; `failed` (an error); `skipped` (something is missing and the user asked to skip);
    # `not_measurable` (everything worked, but there is nothing to measure).
    status: Status
    # Value by metric name, empty unless measured.
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    file: Path | None = None  # SAEBench's own JSON
    reason: str | None = None
    # What the number depends on and a reader must know. `text` is a hash of the text: seeds with
    # the same one are not independent.
    facts: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class EvaluationRun:
    """One evaluation with one seed."""

    evaluation: str  # its name in a config file
    context: ModelContext
    settings: Mapping[str, Any]  # fields of SAEBench's config class and ours, checked
    seed: int  # of the choice and order of texts, and of all that is trained
    output: Path  # folder for SAEBench's JSON
    report: Report = warnings_alone


def require_real(metrics: Mapping[str, float], where: str) -> None:
    """Refuse numbers that were not measured."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunFailure(f"{where}: {name} is {value}: nothing is reported for this SAE")
        if value == SAEBENCH_MARKER:
            raise RunFailure(
                f"{where}: {name} is -1, which SAEBench writes for NaN: nothing is reported"
            )


def failure(error: Exception) -> ScoreResult:
    """The outcome of an SAE whose evaluation raised."""
    text = " ".join(str(error).split())
    return ScoreResult("failed", reason=text if text else type(error).__name__)


def result_file(output: Path, evaluated: EvaluatedSAE) -> Path:
    """Where SAEBench's JSON of an SAE goes, under the name that SAEBench gives it."""
    return output / f"{evaluated.name}_{SAEBENCH_ID}_eval_results.json"
