"""From the `sae:` or `saes:` section of a recipe to SAELens training configurations."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

import msae_plugin
from msae_plugin.errors import InputError
from msae_plugin.training.hook_names import parse_hook_name
from msae_plugin.training.parsing import coerce, unknown_key_message
from msae_plugin.training.seeding import RandomStream, derive_seed

DEFAULT_ARCHITECTURE = "multiscale"
DEFAULT_PRESET = "default"

# What the runner itself decides: a value in the recipe would be overwritten or would break loading.
_DECIDED_ELSEWHERE = {
    "device": "model.device",
    "metadata": "the run itself",
    "reshape_activations": "the hook",
}
# Hooks whose activations have the width of the residual stream, by the end of their name.
_RESIDUAL_WIDTH = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_mlp_out",
    "hook_attn_out",
)


@dataclass(frozen=True)
class SAEPlan:
    """One SAE to train at one hook.

    Attributes:
        name: Its name in the run, `<name>_layer<L>` when there are several hooks.
        base_name: Its name in the recipe.
        hook: Where its activations come from.
        config: SAELens' training configuration.
        lr: Its own learning rate; None for the run's.
        alone: Whether it is the only SAE of the run, and so owns the run's folder.
    """

    name: str
    base_name: str
    hook: str
    config: TrainingSAEConfig
    lr: float | None
    alone: bool

    def folder(self, output: Path) -> Path:
        """Where the SAE's results go in the run's folder."""
        return output if self.alone else output / self.name


def plan_saes(
    sections: Mapping[str, Mapping[str, Any]],
    hooks: Sequence[str],
    *,
    d_model: int,
    training_steps: int,
) -> list[SAEPlan]:
    """One plan per SAE and hook.

    Args:
        sections: The recipe's SAE sections by name.
        hooks: The hooks.
        d_model: Width of the model's residual stream.
        training_steps: Length of the run, which presets fit their schedules to.

    Raises:
        InputError: For an unknown architecture, preset or field, or a value that cannot work.
    """
    names = _names_by_hook(hooks)
    alone = len(sections) * len(hooks) == 1
    plans: list[SAEPlan] = []
    for base_name, section in sections.items():
        where = "sae" if alone and base_name == "sae" else f"saes.{base_name}"
        for hook in hooks:
            config, lr = _configure(dict(section), where, hook, d_model, training_steps)
            plans.append(
                SAEPlan(
                    name=base_name + names[hook],
                    base_name=base_name,
                    hook=hook,
                    config=config,
                    lr=lr,
                    alone=alone,
                )
            )
    by_name = {plan.name: plan for plan in plans}
    if len(by_name) < len(plans):
        raise InputError(
            "two SAEs of the run get the same name "
            f"({', '.join(sorted(plan.name for plan in plans))}): rename one in 'saes'"
        )
    return plans


def _names_by_hook(hooks: Sequence[str]) -> dict[str, str]:
    if len(hooks) == 1:
        return {hooks[0]: ""}
    layers = [parse_hook_name(hook).layer for hook in hooks]
    if None in layers or len(set(layers)) < len(layers):
        # Two hooks of one layer: only the whole name tells them apart.
        return {hook: "_" + hook.replace(".", "_") for hook in hooks}
    return {hook: f"_layer{layer}" for hook, layer in zip(hooks, layers, strict=True)}


def _configure(
    section: dict[str, Any], where: str, hook: str, d_model: int, training_steps: int
) -> tuple[TrainingSAEConfig, float | None]:
    architecture = section.pop("architecture", DEFAULT_ARCHITECTURE)
    config_class = _config_class(architecture, where)
    preset = section.pop("preset", None)
    if preset is not None and architecture != DEFAULT_ARCHITECTURE:
        raise InputError(f"'{where}.preset' is for multiscale; {architecture!r} has no presets")
    lr = coerce(section.pop("lr", None), float | None, f"{where}.lr")
    if lr is not None and not lr > 0:
        raise InputError(f"'{where}.lr' must be a positive number, not {lr}")
    hints = get_type_hints(config_class)
    known = {item.name for item in dataclasses.fields(config_class)} - set(_DECIDED_ELSEWHERE)
    for key in section:
        if key in _DECIDED_ELSEWHERE:
            raise InputError(
                f"'{where}.{key}' is not set here: {_DECIDED_ELSEWHERE[key]} decides it"
            )
        if key not in known:
            raise InputError(
                unknown_key_message(key, known | {"architecture", "preset", "lr"}, where)
            )
    values = {key: coerce(value, hints[key], f"{where}.{key}") for key, value in section.items()}
    values["d_in"] = _d_in(values, where, hook, d_model)
    if "d_sae" not in values:
        raise InputError(f"'{where}.d_sae' is missing: give the number of latents")
    _check_sizes(values, where, architecture)
    try:
        if architecture == DEFAULT_ARCHITECTURE:
            return _from_preset(preset or DEFAULT_PRESET, values, where, training_steps), lr
        return config_class(**values), lr
    except (ValueError, TypeError) as error:
        raise InputError(f"{where!r}: {error}") from error


def _config_class(architecture: Any, where: str) -> type[TrainingSAEConfig]:
    known = sorted(SAE_TRAINING_CLASS_REGISTRY)
    if architecture not in known:
        nearest = difflib.get_close_matches(str(architecture), known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(known)}"
        raise InputError(f"'{where}.architecture' {architecture!r} is unknown: {hint}")
    return get_sae_training_class(architecture)[1]


def _d_in(values: Mapping[str, Any], where: str, hook: str, d_model: int) -> int:
    given = values.get("d_in")
    residual = hook.endswith(_RESIDUAL_WIDTH)
    if residual and given is not None and given != d_model:
        raise InputError(
            f"'{where}.d_in' is {given} but hook {hook!r} has width {d_model}: leave d_in out"
        )
    return d_model if given is None else int(given)


def _check_sizes(values: Mapping[str, Any], where: str, architecture: str) -> None:
    if values["d_sae"] < 1:
        raise InputError(f"'{where}.d_sae' must be at least 1, not {values['d_sae']}")
    k = values.get("k")
    if k is None:
        return
    if not k > 0:
        raise InputError(f"'{where}.k' must be positive, not {k}")
    if k > values["d_sae"]:
        raise InputError(
            f"'{where}.k' is {k} but there are only {values['d_sae']} latents "
            f"(architecture {architecture}): lower k or raise d_sae"
        )


def _from_preset(
    preset: str, values: dict[str, Any], where: str, training_steps: int
) -> TrainingSAEConfig:
    if preset not in msae_plugin.preset_names():
        known = sorted(msae_plugin.preset_names())
        nearest = difflib.get_close_matches(str(preset), known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(known)}"
        raise InputError(f"'{where}.preset' {preset!r} is unknown: {hint}")
    required = {key: values.pop(key) for key in ("d_in", "d_sae", "k") if key in values}
    if "k" not in required:
        raise InputError(f"'{where}.k' is missing: give the mean number of active latents")
    return msae_plugin.preset(preset, **required, training_steps=training_steps, **values)


def build_sae(plan: SAEPlan, seed: int, device: str) -> TrainingSAE[Any]:
    """Initialise an SAE from a seed of its own: adding another SAE to a run does not change it.

    Args:
        plan: What to build.
        seed: Seed of the run.
        device: Where it will live.

    Raises:
        InputError: If the architecture refuses its configuration.
    """
    config = dataclasses.replace(plan.config, device=device)
    sae_class = get_sae_training_class(config.architecture())[0]
    stream = RandomStream(derive_seed(seed, "init", plan.base_name, plan.hook), device)
    try:
        with stream.active():
            return sae_class(config)
    except (ValueError, TypeError) as error:
        raise InputError(f"SAE {plan.name!r}: {error}") from error


def default_device(setting: str) -> str:
    """The device that `model.device` means.

    Args:
        setting: auto, cpu, cuda or mps.
    """
    if setting != "auto":
        return setting
    return "cuda" if torch.cuda.is_available() else "cpu"
