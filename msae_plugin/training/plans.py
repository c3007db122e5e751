"""From `sae:` or `saes:` of a recipe to SAELens training configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import psutil
import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from msae_plugin.architecture.config import InputNormalization
from msae_plugin.architecture.presets import PRESETS
from msae_plugin.architecture.presets import preset as build_preset
from msae_plugin.common.errors import InputError, shown
from msae_plugin.common.files import human_bytes, json_safe
from msae_plugin.common.recipes import (
    Count,
    Positive,
    PositiveOrZero,
    coerce,
    did_you_mean,
    unknown_key_message,
)
from msae_plugin.common.seeding import RandomStream, derive_seed
from msae_plugin.models.hook_names import parse_hook_name
from msae_plugin.saes.find import StoredSAE, is_checkpoint, read_checkpoint
from msae_plugin.training.schedules import GradientRateConfig

DEFAULT_ARCHITECTURE = "multiscale"
DEFAULT_PRESET = "default"

# Keys of an SAE that are the trainer's, not the architecture's.
_RATES: Mapping[str, Any] = {
    "lr": Positive,
    "lr_floor": PositiveOrZero,
    "gradient_lr": GradientRateConfig,
}
_INPUT_NORMALIZATION = "input_normalization"
_OWN_KEYS = {"architecture", "preset", _INPUT_NORMALIZATION, *_RATES}
# What the runner itself decides: a value in the recipe would be overwritten or would break loading.
_DECIDED_ELSEWHERE = {
    "device": "model.device decides it",
    "decode_kernel": "training.decode_kernel decides it",
    "cuda_graphs": "training.cuda_graphs decides it",
    "metadata": "the run itself decides it",
    # Everything between the model and the export works on (tokens, d_in).
    "reshape_activations": "the heads of hook_z are always joined to n_heads * d_head; call "
    "turn_on_forward_pass_hook_z_reshaping() on the loaded SAE where they are apart",
}
_DTYPES = ("float32", "bfloat16", "float64")
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
    """One SAE to train at one hook."""

    name: str  # Its name in the run, `<name>_layer<L>` when there are several hooks
    base_name: str  # Its name in the recipe
    hook: str  # Where its activations come from
    config: TrainingSAEConfig
    lr: float | None  # Its own learning rate; None for the run's
    lr_floor: float | None  # Its own floor of the rate; None for the run's
    gradient_lr: GradientRateConfig | None  # Its own gradient-driven rule; None for the run's
    centres_inputs: bool  # Whether the trainer centres and scales its activations
    alone: bool  # Whether it is the only SAE of the run, and so owns the run's folder
    # Whether the recipe gives `d_in`; else it is the width that the hook turns out to have
    width_given: bool

    def folder(self, output: Path) -> Path:
        """Where the SAE's results go in the run's folder."""
        return output if self.alone else output / self.name

    def fitted(self, width: int) -> SAEPlan:
        """The same for the width measured at the hook; refused if the recipe gives another."""
        if self.config.d_in == width:
            return self
        if self.width_given:
            raise InputError(
                f"SAE {self.name!r} has d_in {self.config.d_in} but the activations at "
                f"{self.hook!r} have width {width}: leave d_in out"
            )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, d_in=width))


def plan_saes(
    sections: Mapping[str, Mapping[str, Any]],
    hooks: Sequence[str],
    *,
    d_model: int,
    training_steps: int,
    accumulation_steps: int = 1,
) -> list[SAEPlan]:
    """One plan per SAE section and hook.

    Presets fit their schedules to the steps of the run, and some prescribe its accumulation.
    """
    labels = hook_labels(hooks)
    alone = len(sections) * len(hooks) == 1
    plans: list[SAEPlan] = []
    for base_name, section in sections.items():
        where = "sae" if alone and base_name == "sae" else f"saes.{base_name}"
        own = dict(section)
        rates = _own_rates(own, where)
        centres_inputs = _centres_inputs(own, where)
        _check_accumulation(section, accumulation_steps, where)
        for hook in hooks:
            config = _configure(dict(own), where, hook, d_model, training_steps)
            if centres_inputs:
                _check_can_be_centred(config, where)
            plans.append(
                SAEPlan(
                    name=base_name + labels[hook],
                    base_name=base_name,
                    hook=hook,
                    config=config,
                    **rates,
                    centres_inputs=centres_inputs,
                    alone=alone,
                    width_given=own.get("d_in") is not None,
                )
            )
    if len({plan.name.lower() for plan in plans}) < len(plans):
        raise InputError(
            "two SAEs of the run get the same name, or names that differ in case alone "
            f"({', '.join(sorted(plan.name for plan in plans))}): rename one in 'saes'"
        )
    return plans


def hook_labels(hooks: Sequence[str], separator: str = "_") -> dict[str, str]:
    """What names get for a hook: nothing for a single one, `_layer9`, or all of the hook's name."""
    if len(hooks) == 1:
        return {hooks[0]: ""}
    layers = [parse_hook_name(hook).layer for hook in hooks]
    if None in layers or len(set(layers)) < len(layers):
        # Two hooks of one layer: only the whole name tells them apart.
        return {hook: "_" + hook.replace(".", separator) for hook in hooks}
    return {hook: f"_layer{layer}" for hook, layer in zip(hooks, layers, strict=True)}


def _configure(
    section: dict[str, Any], where: str, hook: str, d_model: int, training_steps: int
) -> TrainingSAEConfig:
    architecture = section.pop("architecture", DEFAULT_ARCHITECTURE)
    wanted = config_class(architecture, where)
    preset = section.pop("preset", None)
    if preset is not None and architecture != DEFAULT_ARCHITECTURE:
        raise InputError(f"'{where}.preset' is for multiscale; {architecture!r} has no presets")
    hints = get_type_hints(wanted)
    known = {item.name for item in dataclasses.fields(wanted)} - set(_DECIDED_ELSEWHERE)
    for key in section:
        if key in _DECIDED_ELSEWHERE:
            raise InputError(f"'{where}.{key}' is not set here: {_DECIDED_ELSEWHERE[key]}")
        if key not in known:
            raise InputError(unknown_key_message(key, known | _OWN_KEYS, where))
    values = {key: coerce(value, hints[key], f"{where}.{key}") for key, value in section.items()}
    if values.get("dtype", "float32") not in _DTYPES:
        raise InputError(
            f"'{where}.dtype' must be {' or '.join(_DTYPES)}, not {values['dtype']!r}: in float16 "
            "Adam's epsilon, 1e-8, is zero (model.dtype may be float16)"
        )
    values["d_in"] = _d_in(values, where, hook, d_model)
    if "d_sae" not in values:
        raise InputError(f"'{where}.d_sae' is missing: give the number of latents")
    _check_sizes(values, where, architecture)
    try:
        if architecture == DEFAULT_ARCHITECTURE:
            return _from_preset(preset or DEFAULT_PRESET, values, where, training_steps)
        return wanted(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where!r}: {error}") from error


def _own_rates(section: dict[str, Any], where: str) -> dict[str, Any]:
    """Take the SAE's own learning-rate settings out of its section; a preset's are the default."""
    given = {key: section.pop(key) for key in _RATES if key in section}
    values = {**preset_training(section), **given}
    return {
        key: None if values.get(key) is None else coerce(values[key], kind, f"{where}.{key}")
        for key, kind in _RATES.items()
    }


def _check_can_be_centred(cfg: Any, where: str) -> None:
    """Refuse a configuration into whose weights the centre does not fold."""
    if cfg.normalize_activations != "none":
        raise InputError(
            f"'{where}' sets input_normalization and normalize_activations: leave one out"
        )
    if not cfg.apply_b_dec_to_input:
        raise InputError(
            f"'{where}.input_normalization' folds into b_dec, which this SAE does not subtract: "
            "set apply_b_dec_to_input to true"
        )


def _centres_inputs(section: dict[str, Any], where: str) -> bool:
    """Take `input_normalization` out of the section of an architecture that lacks the field."""
    if section.get("architecture", DEFAULT_ARCHITECTURE) == DEFAULT_ARCHITECTURE:
        return False
    value = section.pop(_INPUT_NORMALIZATION, "none")
    return coerce(value, InputNormalization, f"{where}.{_INPUT_NORMALIZATION}") != "none"


def preset_training(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the preset of an SAE's section asks of the trainer; empty for an unknown preset."""
    if section.get("architecture", DEFAULT_ARCHITECTURE) != DEFAULT_ARCHITECTURE:
        return {}
    preset = PRESETS.get(section.get("preset", DEFAULT_PRESET))
    return {} if preset is None else preset.training


def _check_accumulation(section: Mapping[str, Any], steps: int, where: str) -> None:
    # Mini-batches are shared by all SAEs, so this cannot be an SAE's own.
    wanted = preset_training(section).get("accumulation_steps", steps)
    if wanted != steps:
        raise InputError(
            f"'{where}.preset' {section.get('preset')!r} accumulates {wanted} mini-batches per "
            f"step but the run {steps}: set training.accumulation_steps to {wanted}, or train it "
            "in a run of its own"
        )


def config_class(architecture: Any, where: str) -> type[TrainingSAEConfig]:
    """SAELens' config class of an architecture."""
    known = sorted(SAE_TRAINING_CLASS_REGISTRY)
    if architecture not in known:
        hint = did_you_mean(str(architecture), known)
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
    coerce(values["d_sae"], Count, f"{where}.d_sae")
    k = values.get("k")
    if k is not None and not k > 0:
        raise InputError(f"'{where}.k' must be positive, not {shown(k)}")
    if k is not None and k > values["d_sae"]:
        raise InputError(
            f"'{where}.k' is {shown(k)} but there are only {values['d_sae']} latents "
            f"(architecture {architecture}): lower k or raise d_sae"
        )


def _from_preset(
    preset: str, values: dict[str, Any], where: str, training_steps: int
) -> TrainingSAEConfig:
    required = {key: values.pop(key) for key in ("d_in", "d_sae", "k") if key in values}
    if "k" not in required:
        raise InputError(f"'{where}.k' is missing: give the mean number of active latents")
    return build_preset(preset, **required, training_steps=training_steps, **values)


def require_room(needed: int, device: str, what: str, setting: str) -> None:
    """Refuse what takes more bytes than a device has; lowering the setting helps."""
    present = memory_of(device)
    if needed > present:
        raise InputError(f"{what}, and this machine has {human_bytes(present)}: lower {setting}")


def require_memory(plans: Sequence[SAEPlan], device: str) -> None:
    """Refuse SAEs that this machine cannot hold: weights, gradients and two moments of Adam."""

    def size(plan: SAEPlan) -> int:
        own = plan.config
        return 4 * 2 * own.d_in * own.d_sae * getattr(torch, own.dtype).itemsize

    needed, largest = sum(map(size, plans)), max(plans, key=size)
    what = (
        f"SAE {largest.name!r} with d_sae {shown(largest.config.d_sae)} takes "
        f"{human_bytes(size(largest))} to train, all SAEs {human_bytes(needed)}"
    )
    require_room(needed, device, what, "d_sae")


def buffer_bytes(rows: int, llm_batch_rows: int, d_ins: Sequence[int]) -> int:
    """Peak of the mixing buffer: its rows, overfilled by one LLM batch, and a shuffled copy."""
    return 2 * torch.float32.itemsize * (rows + llm_batch_rows) * sum(d_ins)


def memory_of(device: str) -> int:
    """Bytes of memory that a device has, used ones included."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[1]
    return psutil.virtual_memory().total


def build_sae(plan: SAEPlan, seed: int, device: str) -> TrainingSAE[Any]:
    """Initialise an SAE from a seed of its own: adding another SAE to a run does not change it."""
    config = dataclasses.replace(plan.config, device=device)
    sae_class = get_sae_training_class(config.architecture())[0]
    stream = RandomStream(derive_seed(seed, "init", plan.base_name, plan.hook), device)
    try:
        with stream.active():
            return sae_class(config)
    except (ValueError, TypeError) as error:
        raise InputError(f"SAE {plan.name!r}: {error}") from error


def as_begun(plan: SAEPlan, begun: StoredSAE) -> SAEPlan:
    """The plan with the settings that its checkpoint or its export records.

    A recipe names presets, and what a preset stands for may differ between versions: an SAE goes on
    with what it was begun with.
    """
    stored = begun.config
    if begun.kind != "training checkpoint":  # What concerns training is in its metadata.
        details = dict(begun.details)
        planned = plan.config.get_training_architecture_details()
        if plan.config.normalize_activations == "covariance_whitening":
            # Before the whitening SAELens folds the decoder's norms, and switches this off.
            for settings in (details, planned):
                settings.pop("rescale_acts_by_decoder_norm", None)
        values = plan.config.to_dict()
        stored = {name: values[name] for name in values if name not in planned} | details
    own = {"metadata": plan.config.metadata.to_dict(), "device": plan.config.device}
    config = type(plan.config).from_dict({**stored, **own})
    return dataclasses.replace(plan, config=config)


def plans_as_begun(plans: Sequence[SAEPlan], checkpoint: Path) -> list[SAEPlan]:
    """The plans with the settings of the SAEs in a checkpoint's folder."""
    return [
        # Of an SAE that is not there, loading its weights says so.
        as_begun(plan, read_checkpoint(folder))
        if is_checkpoint(folder := checkpoint / plan.name)
        else plan
        for plan in plans
    ]


def changed_settings(begun: SAEPlan, plan: SAEPlan) -> dict[str, str]:
    """What differs between an SAE as it was begun and the plan for it, in words by field."""
    then, now = (json_safe(item.config.to_dict()) for item in (begun, plan))
    return {
        name: f"{name} {shown(then[name])} (now {shown(now[name])})"
        for name in then
        if name != "metadata" and then[name] != now[name]
    }


def default_device(setting: str) -> str:
    """The device that `model.device` (auto, cpu, cuda, cuda:N or mps) means; refused if absent."""
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = setting.partition(":")
    present = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(kind)
    if present is not None and int(number or 0) >= present:
        raise InputError(
            f"'model.device' is {setting} but torch finds {present or 'no'} {kind} device"
            f"{'s' if present > 1 else ''} here: use auto or cpu, or install torch for your GPU"
        )
    return setting
