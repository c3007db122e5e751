"""Definitions of all metrics, read from `metrics.yaml` beside this file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class MetricDefinition:
    """The meaning of a number of `summary.json`.

    Args:
        definition: A formula or a sentence.
        unit: `nats per token`, `share`, `latents per token`, ...
        tokens: Which tokens or examples it covers, and whether BOS is among them.
        source: `saebench` (its number, under its name) or `msae` (computed here).
        higher_is_better: None where neither is.
    """

    definition: str
    unit: str
    tokens: str
    source: Literal["saebench", "msae"]
    higher_is_better: bool | None = None


@cache
def _contents() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def definitions(evaluation: str, counts: Iterable[int] = ()) -> dict[str, MetricDefinition]:
    """The metrics of an evaluation by name.

    Args:
        evaluation: A section of `metrics.yaml`.
        counts: What `{k}` in the names and definitions stands for.
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
