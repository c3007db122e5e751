"""What the files of earlier commands hold, and reading them: they may be damaged, or not ours.

A type names what the readers rely on; everything else in a file is let through.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field, with_config
from typing_extensions import Required, TypedDict

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import coerce

_stored = with_config(ConfigDict(extra="allow", strict=True))
Facts = dict[str, Any]
SeedText = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
"""A seed where JSON has room for text alone."""


@_stored
class StoredTraining(TypedDict, total=False):
    """Settings of the training architecture that an export keeps."""

    k: float | None
    aux_loss_coefficient: float | None
    prefix_fractions: list[float] | None
    sparsity_scales: list[float] | None
    revival_every: int | None


@_stored
class StoredRunnerConfig(TypedDict, total=False):
    """SAELens' runner_cfg.json."""

    lr: float | None
    training_tokens: int | None
    train_batch_size_tokens: int | None
    accumulation_steps: int | None


@_stored
class StoredMetadata(TypedDict, total=False):
    """`metadata` of SAELens' cfg.json."""

    model_name: str | None
    hook_name: str | None
    context_size: int | None
    training_steps: int | None
    training_tokens: int | None
    seed: int | None
    l0: float | None
    training_architecture: str | None
    training_architecture_details: StoredTraining | None
    model_from_pretrained_kwargs: Facts | None
    dataset_path: str | None
    sae_lens_version: str | None


@_stored
class StoredConfig(TypedDict, total=False):
    """SAELens' cfg.json."""

    architecture: str
    dtype: str
    metadata: StoredMetadata | None


@_stored
class StoredFinding(TypedDict, total=False):
    """One finding of the health check."""

    kind: Required[str]
    message: Required[str]


@_stored
class StoredExport(TypedDict, total=False):
    """`export.json`."""

    l0_exported: Required[float | None]
    l0_target: float | None
    explained_variance: float | None
    jumprelu_obstacle: str | None
    agreement: dict[str, float | None] | None
    jumprelu_agreement: dict[str, float | None] | None
    health: list[StoredFinding] | None
    weights_sha256: dict[str, str]


StoredRow = dict[str, float | None]
"""A line of `metrics.jsonl`."""


@_stored
class StoredRunSAE(TypedDict, total=False):
    """One SAE of a `run.json`."""

    folder: str
    hook: str | None
    architecture: str | None
    final: StoredRow | None
    export: Facts | None
    tokens_per_second: float | None


@_stored
class StoredRun(TypedDict, total=False):
    """`run.json`."""

    status: str
    failure: str | None
    seed: int | None
    steps: int
    tokens: int
    wall_seconds: float
    versions: Facts
    model: Facts
    data: Facts
    saes: dict[str, StoredRunSAE]
    config: Facts
    resumed_at_steps: list[int]


@_stored
class StoredOutcome(TypedDict, total=False):
    """One SAE of an `outcomes.json`."""

    key: Required[str]
    status: Required[str]
    metrics: Required[dict[str, float | None]]
    file: Required[str | None]
    facts: Required[Facts]


@with_config(ConfigDict(extra="forbid", strict=True))
class _StoredTrial(TypedDict, total=False):
    coefficient: Required[float]
    l0: Required[float]
    tokens: Required[int]
    whole: bool


@_stored
class StoredSearch(TypedDict, total=False):
    """The search for a coefficient of a comparison."""

    key: Required[str]
    target: Required[float]
    trials: Required[list[_StoredTrial]]
    coefficient: Required[float | None]
    settled: Required[bool]


@_stored
class StoredMetrics(TypedDict, total=False):
    """Numbers of one SAE of a comparison."""

    key: Required[str]
    metrics: Required[dict[str, float | None]]


@_stored
class StoredDefinition(TypedDict, total=False):
    """What a metric means."""

    definition: str
    unit: str
    tokens: str
    source: str
    higher_is_better: bool | None


@_stored
class StoredComparisonRow(TypedDict, total=False):
    """One SAE of a `comparison.json`."""

    name: Required[str]
    method: Required[str]
    metrics: Required[Facts]
    architecture: str | None
    preset: str | None
    mechanism: str | None
    claim: str | None
    hook: str | None
    seed: int | None
    folder: str | None
    group: str | None
    reason: str | None
    against: str | None


@_stored
class StoredComparison(TypedDict, total=False):
    """`comparison.json`."""

    kind: str
    rows: Required[list[StoredComparisonRow]]
    definitions: Required[Facts]
    not_measured: list[Facts] | None
    reference: str | None
    versions: Facts
    model: Facts | None
    protocol: Facts


@_stored
class StoredScore(TypedDict, total=False):
    """One metric of an SAE, over the seeds of its evaluation."""

    mean: Required[float | None]
    std: float | None
    per_seed: Required[dict[SeedText, float | None]]


@_stored
class StoredResult(TypedDict, total=False):
    """One SAE and evaluation of a `summary.json`."""

    sae: Required[str]
    evaluation: Required[str]
    status: str
    reason: str | None
    note: str | None
    seeds: list[int]
    files: list[str] | None
    metrics: dict[str, StoredScore]
    facts: Facts | None


@_stored
class StoredEvaluatedSAE(TypedDict, total=False):
    """One SAE of a `summary.json`."""

    weights_sha256: str
    reference: str
    architecture: str


@_stored
class _StoredEvaluationConfig(TypedDict, total=False):
    evaluations: dict[str, Facts] | None


@_stored
class StoredSummary(TypedDict, total=False):
    """`summary.json`."""

    saes: Required[dict[str, StoredEvaluatedSAE]]
    results: Required[list[StoredResult]]
    metrics: Required[dict[str, StoredDefinition]]
    model: Facts | None
    seeds: list[int]
    config: _StoredEvaluationConfig | None
    versions: Facts


@_stored
class _StoredRows(TypedDict, total=False):
    rows: Required[int]
    dtype: Required[str]
    model: Required[Facts]
    data: Required[Facts]
    sha256: dict[str, list[str]]


@_stored
class StoredCache(_StoredRows, total=False):
    """`cache.json`."""

    key: Required[Facts]
    hooks: Required[dict[str, int]]


@_stored
class StoredActivations(_StoredRows, total=False):
    """`activations.json` of a comparison."""

    format: Required[int]
    key: Required[str]
    training_rows: Required[int]
    batch_size: Required[int]
    hooks: Required[Facts]
    metadata: Required[Facts]


@_stored
class _StoredPass(TypedDict, total=False):
    hooks: Required[Facts]


@_stored
class StoredProgress(TypedDict, total=False):
    """`progress.json` of a pass that goes on."""

    facts: Required[_StoredPass]
    done: Required[int]
    sha256: dict[str, list[str]]
    position_sha256: str


def parsed(text: str, where: str) -> Any:
    """JSON that can be written again, as text and into a page."""
    try:
        content: Any = json.loads(text)
        if "\\ud" in text.lower():  # halves of characters, which no file can hold
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read: {error}") from error
    return content


def read_json_object(path: Path, shape: Any = Facts) -> dict[str, Any]:
    """The JSON object in a file, checked against one of the types above."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    return checked(parsed(text, repr(str(path))), repr(str(path)), shape)


def read_format(path: Path, expected: int, shape: Any) -> dict[str, Any]:
    """The same of a file that says its format; another one than expected is refused."""
    content = read_json_object(path)
    if content.get("format") != expected:
        raise InputError(
            f"{str(path)!r} is of format {content.get('format')!r} and this version reads "
            f"{expected}: make it again with this version of msae_plugin"
        )
    return checked(content, repr(str(path)), shape)


# What keys of `export.json` were called before version 0.2.
_EARLIER_KEYS = {"twin_obstacle": "jumprelu_obstacle", "twin_agreement": "jumprelu_agreement"}


def checked(content: Any, where: str, shape: Any) -> Any:
    """The content, if it is what the readers rely on."""
    if not isinstance(content, dict):
        raise InputError(f"{where} does not hold a JSON object")
    if shape is StoredExport:
        stored = cast("Facts", content)
        content = {_EARLIER_KEYS.get(key, key): value for key, value in stored.items()}
    try:
        coerce(content, shape, "")
    except InputError as error:
        raise InputError(f"{where} is damaged, or of another program: {error}") from error
    return content
