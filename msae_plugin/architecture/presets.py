"""Named recipes: `default`, `nested`, `features`, and the ten runs of the source.

A preset needs the length of the run, because SAELens tells an SAE the step but never the total.
What a preset asks of the trainer rather than of the SAE (schedules, accumulation) is listed beside
it; `msae train` applies it, other hosts cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig, mechanisms_off
from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import did_you_mean


@dataclass(frozen=True)
class Preset:
    """A named recipe."""

    summary: str  # One line: what it is for, or what a run of the source added
    sae: Mapping[str, Any]
    k_anneal_share: float = 0.0  # Share of the training steps over which k falls; 0 leaves k fixed
    # Options of `msae train` that belong to the recipe
    training: Mapping[str, Any] = field(default_factory=dict)


# Of k at the start, where it is annealed.
_ANNEAL_MULTIPLIER = 2.0
_FILE = Path(__file__).with_name("presets.yaml")


def _presets() -> dict[str, Preset]:
    stored: dict[str, dict[str, Any]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))

    def built(name: str) -> Preset:
        own = stored[name]
        base = built(own["extends"]) if "extends" in own else Preset("", mechanisms_off())
        return Preset(
            own["summary"],
            {**base.sae, **own.get("sae", {})},
            own.get("k_anneal_share", base.k_anneal_share),
            {**base.training, **own.get("training", {})},
        )

    return {name: built(name) for name in stored}


PRESETS: Mapping[str, Preset] = _presets()


def preset_names() -> list[str]:
    """Names that `preset` knows."""
    return list(PRESETS)


def get_preset(name: str) -> Preset:
    """The recipe of a name."""
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS, "known: ")
        raise InputError(f"preset must be a known name; got {name!r}: {hint}")
    return PRESETS[name]


def preset_summary(name: str) -> str:
    """One line on what a preset is for."""
    return get_preset(name).summary


def preset(
    name: str, *, d_in: int, d_sae: int, k: float, training_steps: int, **overrides: Any
) -> MultiScaleTrainingSAEConfig:
    """Configuration of a named preset, with its schedules filled in for the length of the run.

    Args:
        name: One of `preset_names()`.
        d_in: Width of the activations.
        d_sae: Number of latents.
        k: Mean number of active latents per token.
        training_steps: Number of optimiser steps of the run.
        **overrides: Any field of MultiScaleTrainingSAEConfig.

    Returns:
        The configuration.

    Raises:
        InputError: Unknown preset or field, or an impossible value.
    """
    recipe = get_preset(name)
    if training_steps < 1:
        raise InputError(f"training_steps must be at least 1; got {training_steps}")
    if k > d_sae:
        raise InputError(f"k must not exceed d_sae={d_sae}; got {k!r}")
    known = {item.name for item in fields(MultiScaleTrainingSAEConfig)}
    for field_name in overrides:
        if field_name not in known:
            hint = did_you_mean(field_name, sorted(known))
            raise InputError(
                f"{field_name!r} is not a field of MultiScaleTrainingSAEConfig: {hint}"
            )
    values: dict[str, Any] = {key: _copied(value) for key, value in recipe.sae.items()}
    if recipe.k_anneal_share:
        values["k_anneal_steps"] = round(recipe.k_anneal_share * training_steps)
        values["k_initial_multiplier"] = max(1.0, min(_ANNEAL_MULTIPLIER, d_sae / k))
    values.update(overrides)
    return MultiScaleTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **values)


def _copied(value: Any) -> Any:
    # Configurations are mutable and go through JSON: lists must not be shared between them.
    return list(value) if isinstance(value, list) else value
