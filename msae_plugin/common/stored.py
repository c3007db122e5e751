"""What the files of earlier commands hold, and reading them: they may be damaged, or not ours.

A shape names what the readers rely on; everything else in a file is let through. A `total=False`
TypedDict each: what a file must have is marked, anything else may be absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field, with_config
from typing_extensions import Required, TypedDict

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import coerce

Facts = dict[str, Any]
SeedText = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
"""A seed where JSON has room for text alone."""
StoredRow = dict[str, float | None]
"""A line of `metrics.jsonl`."""


def _shape(
    name: str, required: Mapping[str, Any] | None = None, *, more: bool = True, **optional: Any
) -> Any:
    """A JSON object with fields of these types, and with others where there may be `more`."""
    marked = {key: cast("Any", Required)[kind] for key, kind in (required or {}).items()}
    shape = cast("Any", TypedDict)(name, {**marked, **optional}, total=False)
    return with_config(ConfigDict(extra="allow" if more else "forbid", strict=True))(shape)


def _each(kind: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, kind)


_TEXT, _WHOLE, _NUMBER = str | None, int | None, float | None

StoredTraining = _shape(  # settings of the training architecture that an export keeps
    "StoredTraining",
    **_each(_NUMBER, "k", "aux_loss_coefficient"),
    **_each(list[float] | None, "prefix_fractions", "sparsity_scales"),
    revival_every=_WHOLE,
)
StoredRunnerConfig = _shape(  # SAELens' runner_cfg.json
    "StoredRunnerConfig",
    lr=_NUMBER,
    **_each(_WHOLE, "training_tokens", "train_batch_size_tokens", "accumulation_steps"),
)
StoredMetadata = _shape(  # `metadata` of SAELens' cfg.json
    "StoredMetadata",
    **_each(_TEXT, "model_name", "hook_name"),
    **_each(_WHOLE, "context_size", "training_steps", "training_tokens", "seed"),
    l0=_NUMBER,
    training_architecture=_TEXT,
    training_architecture_details=StoredTraining | None,
    model_from_pretrained_kwargs=Facts | None,
    **_each(_TEXT, "dataset_path", "sae_lens_version"),
)
StoredConfig = _shape(  # SAELens' cfg.json
    "StoredConfig", **_each(str, "architecture", "dtype"), metadata=StoredMetadata | None
)
StoredFinding = _shape("StoredFinding", _each(str, "kind", "message"))  # of the health check
StoredExport = _shape(  # `export.json`
    "StoredExport",
    {"l0_exported": _NUMBER},
    **_each(_NUMBER, "l0_target", "explained_variance"),
    jumprelu_obstacle=_TEXT,
    **_each(StoredRow | None, "agreement", "jumprelu_agreement"),
    health=list[StoredFinding] | None,
    weights_sha256=dict[str, str],
)
StoredRunSAE = _shape(  # one SAE of a `run.json`
    "StoredRunSAE",
    folder=str,
    **_each(_TEXT, "hook", "architecture"),
    final=StoredRow | None,
    export=Facts | None,
    tokens_per_second=_NUMBER,
)
StoredRun = _shape(  # `run.json`
    "StoredRun",
    status=str,
    failure=_TEXT,
    seed=_WHOLE,
    **_each(int, "steps", "tokens"),
    wall_seconds=float,
    **_each(Facts, "versions", "model", "data"),
    saes=dict[str, StoredRunSAE],
    config=Facts,
    resumed_at_steps=list[int],
)
StoredOutcome = _shape(  # one SAE of an `outcomes.json`
    "StoredOutcome",
    {**_each(str, "key", "status"), "metrics": StoredRow, "file": _TEXT, "facts": Facts},
)
_StoredTrial = _shape(
    "_StoredTrial", {**_each(float, "coefficient", "l0"), "tokens": int}, more=False, whole=bool
)
StoredSearch = _shape(  # the search for a coefficient of a comparison
    "StoredSearch",
    {"key": str, "target": float, "trials": list[_StoredTrial], "coefficient": _NUMBER,
     "settled": bool},
)  # fmt: skip
StoredMetrics = _shape("StoredMetrics", {"key": str, "metrics": StoredRow})  # of one SAE compared
StoredDefinition = _shape(  # what a metric means
    "StoredDefinition",
    **_each(str, "definition", "unit", "tokens", "source"),
    higher_is_better=bool | None,
)
StoredComparisonRow = _shape(  # one SAE of a `comparison.json`
    "StoredComparisonRow",
    {**_each(str, "name", "method"), "metrics": Facts},
    **_each(_TEXT, "architecture", "preset", "mechanism", "claim", "hook"),
    seed=_WHOLE,
    **_each(_TEXT, "folder", "group", "reason", "against"),
)
StoredComparison = _shape(  # `comparison.json`
    "StoredComparison",
    {"rows": list[StoredComparisonRow], "definitions": Facts},
    kind=str,
    not_measured=list[Facts] | None,
    reference=_TEXT,
    **_each(Facts, "versions", "protocol"),
    model=Facts | None,
)
StoredScore = _shape(  # one metric of an SAE, over the seeds of its evaluation
    "StoredScore", {"mean": _NUMBER, "per_seed": dict[SeedText, float | None]}, std=_NUMBER
)
StoredResult = _shape(  # one SAE and evaluation of a `summary.json`
    "StoredResult",
    _each(str, "sae", "evaluation"),
    status=str,
    **_each(_TEXT, "reason", "note"),
    seeds=list[int],
    files=list[str] | None,
    metrics=dict[str, StoredScore],
    facts=Facts | None,
)
StoredEvaluatedSAE = _shape(  # one SAE of a `summary.json`
    "StoredEvaluatedSAE", **_each(str, "weights_sha256", "reference", "architecture")
)
_StoredEvaluationConfig = _shape("_StoredEvaluationConfig", evaluations=dict[str, Facts] | None)
StoredSummary = _shape(  # `summary.json`
    "StoredSummary",
    {"saes": dict[str, StoredEvaluatedSAE], "results": list[StoredResult],
     "metrics": dict[str, StoredDefinition]},
    model=Facts | None,
    seeds=list[int],
    config=_StoredEvaluationConfig | None,
    versions=Facts,
)  # fmt: skip
_ROWS = {"rows": int, "dtype": str, "model": Facts, "data": Facts}
StoredCache = _shape(  # `cache.json`
    "StoredCache",
    {**_ROWS, "key": Facts, "hooks": dict[str, int]},
    sha256=dict[str, list[str]],
)
StoredActivations = _shape(  # `activations.json` of a comparison
    "StoredActivations",
    {**_ROWS, **_each(int, "format", "training_rows", "batch_size"), "key": str,
     **_each(Facts, "hooks", "metadata")},
    sha256=dict[str, list[str]],
)  # fmt: skip
_StoredPass = _shape("_StoredPass", {"hooks": Facts})
StoredProgress = _shape(  # `progress.json` of a pass that goes on
    "StoredProgress",
    {"facts": _StoredPass, "done": int},
    sha256=dict[str, list[str]],
    position_sha256=str,
)


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
    stored = cast("Facts", content)
    renamed = {_EARLIER_KEYS.get(key, key): value for key, value in stored.items()}
    try:
        coerce(renamed, shape, "")
    except InputError as error:
        raise InputError(f"{where} is damaged, or of another program: {error}") from error
    return renamed
