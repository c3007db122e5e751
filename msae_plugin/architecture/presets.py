"""Named recipes: `default`, `reconstruction`, and the ten runs of the source.

A preset needs the length of the run, because SAELens tells an SAE the step but never the total.
What a preset asks of the trainer rather than of the SAE (schedules, accumulation) is listed beside
it; `msae train` applies it, other hosts cannot.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig, mechanisms_off
from msae_plugin.common.errors import InputError


@dataclass(frozen=True)
class Preset:
    """A named recipe."""

    summary: str  # One line: what it is for, or what a run of the source added
    sae: Mapping[str, Any]
    k_anneal_share: float = 0.0  # Share of the training steps over which k falls; 0 leaves k fixed
    # Options of `msae train` that belong to the recipe
    training: Mapping[str, Any] = field(default_factory=dict)


# Measured in docs/results.md, "How the first presets were chosen".
_ANNEAL_MULTIPLIER, _ANNEAL_SHARE = 2.0, 0.4

_RECONSTRUCTION: dict[str, Any] = {
    **mechanisms_off(),
    "sparsity_scales": [2.0],
    "sparsity_scale_weight": 0.25,
    "firing_floor": 0.1,
    "dense_share_limit": 0.3,
    "input_normalization": "first_batch",
}
_DEFAULT: dict[str, Any] = {
    **_RECONSTRUCTION,
    "prefix_fractions": [1 / 4, 1 / 2],
    "prefix_weight": 0.1,
    "prefix_sort_every": 100,
}
# `default` up to 0.1. Its narrow prefixes find a hierarchy of features, and pay in dense latents
# on a language model.
_FEATURES: dict[str, Any] = {
    **_DEFAULT,
    "dense_share_limit": 1.0,
    "prefix_fractions": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2],
    "prefix_weight": 0.25,
    "orthogonality_coefficient": 0.1,
    "orthogonality_pairs": "chunks",
    "orthogonality_weighting": "none",
}

_SOURCE_1: dict[str, Any] = {
    **mechanisms_off(),
    "selection": "zscore",
    "zscore_z": 2.0,
    "l1_coefficient": 0.04,
    "l1_warm_up_steps": 1000,
    "aux_loss_coefficient": 0.0,
    "orthogonality_coefficient": 0.1,
    "orthogonality_pairs": "chunks",
    "orthogonality_weighting": "none",
    "sketch_rank": 32,
}
_SOURCE_2 = {
    **_SOURCE_1,
    "weight_init": "inverse_sqrt_d",
    "decoder_init_norm": 1.0,
    "unit_norm_decoder": True,
    "zscore_z": 1.5,
    "orthogonality_coefficient": 0.01,
}
_SOURCE_4 = {**_SOURCE_2, "skip_scale": 0.1}
_SOURCE_5 = {**_SOURCE_4, "importance_power": 0.5}
_SOURCE_6 = {**_SOURCE_5, "norm_scales": [1.0]}
_SOURCE_7 = {**_SOURCE_6, "norm_gate": True}
# Attention over a single branch is a constant: two scales are the fewest it can weigh.
_SOURCE_8 = {
    **_SOURCE_7,
    "norm_scales": [0.5, 1.0],
    "norm_eps": 0.1,
    "norm_eps_mode": "relative",
    "norm_attention": True,
}
_SOURCE_9 = {**_SOURCE_8, "norm_scales": [0.1, 0.5, 1.0, 2.0]}
_SOURCE_PLAN = {
    **_SOURCE_9,
    "orthogonality_pairs": "neighbours",
    "orthogonality_weighting": "coactivation",
    "revival_every": 100,
    "revival_min_cosine": 0.2,
}
_FALLING_LR = {"gradient_lr": {"enabled": True}, "lr_floor": 1e-5}
_ACCUMULATION = {**_FALLING_LR, "accumulation_steps": 4}

PRESETS: dict[str, Preset] = {
    "default": Preset(
        "for language models: the loss at 2 k, two nested prefixes ordered by firing rate, a floor "
        "under the firing rates, a limit on what dense latents take",
        _DEFAULT,
        _ANNEAL_SHARE,
    ),
    "features": Preset(
        "features first, where they form a hierarchy: five nested prefixes and decoder directions "
        "kept apart; costs variance and dense latents on language models",
        _FEATURES,
        _ANNEAL_SHARE,
    ),
    "reconstruction": Preset(
        "reconstruction first: the loss at 2 k, a floor under the firing rates, a limit on what "
        "dense latents take",
        _RECONSTRUCTION,
        _ANNEAL_SHARE,
    ),
    "source-run-1": Preset(
        "z-score thresholds (z = 2), orthogonality 0.1, rank-32 co-activation sketch, L1 0.04",
        _SOURCE_1,
    ),
    "source-run-2": Preset(
        "run 1 + init 1/sqrt(d), unit-norm decoder, z 1.5, orthogonality 0.01", _SOURCE_2
    ),
    "source-run-3": Preset(
        "run 2 + a learning rate that falls when gradients are large, floor 1e-5",
        _SOURCE_2,
        training=_FALLING_LR,
    ),
    "source-run-4": Preset(
        "run 3 + skip connection of scale 0.1 in forward", _SOURCE_4, training=_FALLING_LR
    ),
    "source-run-5": Preset(
        "run 4 + gradients and L1 weighted by feature importance", _SOURCE_5, training=_FALLING_LR
    ),
    "source-run-6": Preset(
        "run 5 + layer normalisation with learned gain and bias", _SOURCE_6, training=_FALLING_LR
    ),
    "source-run-7": Preset("run 6 + a sigmoid gate on the gain", _SOURCE_7, training=_FALLING_LR),
    "source-run-8": Preset(
        "run 7 + attention over two normalisation scales, keys of width d/4",
        _SOURCE_8,
        training=_FALLING_LR,
    ),
    "source-run-9": Preset(
        "run 8 with the four scales 0.1, 0.5, 1, 2", _SOURCE_9, training=_FALLING_LR
    ),
    "source-run-10": Preset(
        "run 9 + gradients accumulated over 4 mini-batches", _SOURCE_9, training=_ACCUMULATION
    ),
    "source-plan": Preset(
        "run 10 + penalty weighted by co-activation over neighbours, revival of interfering "
        "latents",
        _SOURCE_PLAN,
        training=_ACCUMULATION,
    ),
}


def preset_names() -> list[str]:
    """Names that `preset` knows."""
    return list(PRESETS)


def get_preset(name: str) -> Preset:
    """The recipe of a name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}"
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
            near = difflib.get_close_matches(field_name, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{field_name!r} is not a field of MultiScaleTrainingSAEConfig{hint}")
    values: dict[str, Any] = {key: _copied(value) for key, value in recipe.sae.items()}
    if recipe.k_anneal_share:
        values["k_anneal_steps"] = round(recipe.k_anneal_share * training_steps)
        values["k_initial_multiplier"] = max(1.0, min(_ANNEAL_MULTIPLIER, d_sae / k))
    values.update(overrides)
    return MultiScaleTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **values)


def _copied(value: Any) -> Any:
    # Configurations are mutable and go through JSON: lists must not be shared between them.
    return list(value) if isinstance(value, list) else value
