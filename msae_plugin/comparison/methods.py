"""From methods, sparsities and seeds to single SAEs to train, and the controls beside them.

- `k` (topk, batchtopk, matryoshka_batchtopk, multiscale, ...) and `max_iterations`
  (matching_pursuit) are the L0.
- `jumprelu` gets `target_l0` in SAELens' quadratic loss; at the end its thresholds are scaled by
  one factor to that mean L0, as the threshold of every BatchTopK is set.
- `standard` and `gated` (`l1_coefficient`), and `jumprelu` with another loss (`l0_coefficient`),
  have a coefficient that is searched.

- The residual stream itself, as an "SAE" whose latents are the activations.
- A trained SAE with its decoder rows permuted: the encoder, hence every probe on latents, stays as
  it was; reconstruction is destroyed. What a metric gives here, it does not owe to the decoder.

The third control, a frozen random decoder (arXiv 2602.14111), is trained: set
`sae.W_dec.requires_grad_(False)` before training.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from typing_extensions import override

from msae_plugin.architecture.calibration import calibrated_threshold
from msae_plugin.architecture.peers import peer_section
from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import Count, coerce
from msae_plugin.comparison.ladder import Variant, chosen_variants
from msae_plugin.comparison.recipe import SYNTHETIC_HOOK, CompareConfig
from msae_plugin.saes.export import dense
from msae_plugin.training.plans import (
    DEFAULT_ARCHITECTURE,
    SAEPlan,
    config_class,
    hook_labels,
    plan_saes,
    preset_training,
)
from msae_plugin.training.recipe import TrainingSettings, check_schedule

_MODE = "jumprelu_sparsity_loss_mode"
_DIRECT = ("k", "max_iterations")
_SEARCHED = ("l1_coefficient", "l0_coefficient")
# SAELens' widths for Matryoshka in the authors' experiments are powers of two of the whole.
_MATRYOSHKA_SHARES = (32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class SparsitySetting:
    """What sets the L0 of an architecture."""

    name: str  # Field of its config
    searched: bool  # Whether the value that gives an L0 has to be found
    start: float = 0.0  # Where a search begins


def sparsity_setting(section: Mapping[str, Any], where: str) -> SparsitySetting:
    """The setting of an SAE's section, which has `architecture` and any fields of its config."""
    architecture = str(section.get("architecture", DEFAULT_ARCHITECTURE))
    fields = {item.name: item for item in dataclasses.fields(config_class(architecture, where))}
    direct = next((name for name in _DIRECT if name in fields), None)
    if direct is None and "target_l0" in fields:
        mode = section.get(_MODE, "quadratic")
        direct = "target_l0" if mode == "quadratic" else None
    if direct is not None:
        if direct in section:
            raise InputError(f"'{where}.{direct}' is not set here: 'l0' of the comparison sets it")
        return SparsitySetting(direct, searched=False)
    for name in _SEARCHED:
        if name in fields:
            given = section.get(name, fields[name].default)
            start: float = coerce(given, float, f"{where}.{name}")
            if not start > 0:
                raise InputError(
                    f"'{where}.{name}' is where the search for the L0 begins: it must be positive"
                )
            return SparsitySetting(name, searched=True, start=start)
    raise InputError(
        f"'{where}.architecture' {architecture!r} has no setting that its L0 could be set with"
    )


def with_l0(
    section: Mapping[str, Any], sparsity: SparsitySetting, l0: float, d_sae: int
) -> dict[str, Any]:
    """The section of one target L0; a searched setting is left as it is."""
    found = dict(section)
    if not sparsity.searched:
        found[sparsity.name] = l0
    if sparsity.name == "target_l0":
        found.setdefault(_MODE, "quadratic")
    if found.get("architecture") == "matryoshka_batchtopk" and "matryoshka_widths" not in found:
        widths = {max(1, d_sae // share) for share in _MATRYOSHKA_SHARES}
        found["matryoshka_widths"] = sorted(widths)
    return found


@torch.no_grad()
def mean_l0(sae: TrainingSAE[Any], batches: Sequence[torch.Tensor]) -> float:
    """Active latents per token of an SAE whose `encode` in eval mode is that of its export.

    Batches (n_tokens, d_in) are scaled as training batches are.
    """
    active = sum(int((dense(sae.encode(batch)) != 0).sum()) for batch in batches)
    return active / sum(len(batch) for batch in batches)


@torch.no_grad()
def scale_thresholds(
    sae: JumpReLUTrainingSAE, batches: Sequence[torch.Tensor], l0: float
) -> dict[str, float]:
    """Multiply all thresholds of a JumpReLU by one factor, so that its mean L0 is the target.

    Batches (n_tokens, d_in) are scaled as training batches are. Gives `l0_before`, `l0_after` and
    `threshold`, the mean over the latents.
    """
    before = mean_l0(sae, batches)
    # A threshold of zero could not be scaled.
    floor = 1e-3 * float(sae.threshold.median()) or 1e-6
    original = sae.threshold.data.clamp(min=floor)
    # Latent i is on where pre_i / threshold_i is above the factor, which is a threshold of these.
    factor = calibrated_threshold(
        batches,
        lambda batch: sae.encode_with_hidden_pre(batch)[1] / original,
        lambda ratios: ratios,
        l0,
    )
    assert factor is not None, "there are no batches"
    sae.threshold.data = original * max(factor, 1e-6)
    return {
        "l0_before": before,
        "l0_after": mean_l0(sae, batches),
        "threshold": float(sae.threshold.mean()),
    }


SAES_FOLDER = "saes"
FROZEN = "frozen_decoder"
RESIDUAL_STREAM = "residual_stream"
_PERMUTED = re.compile(r"permuted_decoder of (\S+)")


@dataclass(frozen=True)
class Method:
    """Everything about a method but its sparsity and its seed."""

    name: str
    # Keys of an SAE in a recipe, `d_sae` among them; no `peer` or `control`
    section: Mapping[str, Any]
    sparsity: SparsitySetting
    accumulation_steps: int
    frozen_decoder: bool = False  # Train without changing the decoder
    variant: Variant | None = None  # Where it stands in the ladder, if it does


@dataclass(frozen=True)
class Entry:
    """One SAE to train."""

    name: str  # Unique in the comparison; the name of its folder
    method: Method
    hook: str
    l0: float
    seed: int  # Of its initialisation, the order of its data, and what it draws

    @property
    def seed_group(self) -> str:
        """The name without the seed: what the seeds share is a coefficient."""
        return self.name.rpartition("_seed")[0]


@dataclass(frozen=True)
class Control:
    """A control that is made, not trained."""

    name: str
    method: str
    hook: str
    of: Entry | None  # The SAE whose decoder is permuted; None for the residual stream


@dataclass(frozen=True)
class Expansion:
    """Everything that a comparison consists of."""

    entries: list[Entry]
    controls: list[Control]  # What is evaluated beside them
    methods: dict[str, Method]
    plans: dict[str, SAEPlan]  # By the SAE's name; a searched setting is where the search begins


def _entry_name(method: str, label: str, l0: float, seed: int) -> str:
    """`<method>[_layer9]_l0-<k>_seed<s>`, with the label that tells several hooks apart."""
    return f"{method}{label}_l0-{l0:g}_seed{seed}"


def sae_folder(output: Path, name: str) -> Path:
    """Folder of an SAE in a comparison's folder."""
    return output / SAES_FOLDER / name


def expand(config: CompareConfig, d_in: Mapping[str, int]) -> Expansion:
    """All SAEs of a comparison, each checked against its architecture."""
    sections = {name: dict(section) for name, section in config.saes.items()}
    variants: dict[str, Variant] = {}
    if config.ladder is not None:
        for variant in chosen_variants(list(config.ladder.groups), config.ladder.leave_out):
            if variant.name in sections:
                raise InputError(
                    f"'saes.{variant.name}' has the name of a variant of the ladder: rename it"
                )
            sections[variant.name] = dict(variant.section)
            variants[variant.name] = variant
    methods: dict[str, Method] = {}
    untrained: dict[str, str] = {}
    for name, section in sections.items():
        control = coerce(section.pop("control", None), str | None, f"saes.{name}.control")
        if control is not None and control != FROZEN:
            if section:
                raise InputError(f"'saes.{name}': an untrained control has no further keys")
            untrained[name] = control
            continue
        methods[name] = _method(config, name, section, control == FROZEN, variants.get(name))
    if config.reference is not None and config.reference not in methods:
        raise InputError(f"'reference' {config.reference!r} is no method of 'saes' or 'ladder'")
    labels = hook_labels(config.hooks or [SYNTHETIC_HOOK], "-")
    entries = [
        Entry(_entry_name(method.name, label, l0, seed), method, hook, l0, seed)
        for method in methods.values()
        for hook, label in labels.items()
        for l0 in config.l0
        for seed in config.seeds
    ]
    plans = {
        entry.name: plan_entry(entry, config, d_in[entry.hook], coefficient=None)
        for entry in entries
    }
    controls = [
        control
        for name, kind in untrained.items()
        for control in _controls(name, kind, entries, labels)
    ]
    if controls and config.synthetic is not None:
        residual = [control for control in controls if control.of is None]
        if residual:
            raise InputError(
                f"'saes.{residual[0].name}.control' residual_stream: the true features are the "
                "reference on ground truth; remove it"
            )
    return Expansion(entries, controls, methods, plans)


def _method(
    config: CompareConfig,
    name: str,
    section: dict[str, Any],
    frozen: bool,
    variant: Variant | None,
) -> Method:
    where = f"saes.{name}"
    wanted = preset_training(section).get("accumulation_steps", config.training.accumulation_steps)
    given = section.pop("accumulation_steps", wanted)
    steps: int = coerce(given, Count, f"{where}.accumulation_steps")
    peer = coerce(section.pop("peer", None), str | None, f"{where}.peer")
    if peer is not None:
        if "architecture" in section or "preset" in section:
            raise InputError(f"'{where}.peer' decides the architecture: remove the other key")
        total = config.training.tokens // (config.training.batch_size_tokens * steps)
        section = {**peer_section(peer, total), **section}
    if frozen and "preset" not in section:
        section.setdefault("architecture", "batchtopk")
    section = {**config.common, **section}
    if "d_sae" not in section:
        raise InputError(f"'{where}.d_sae' is missing: give it here or once in 'common'")
    section["d_sae"] = coerce(section["d_sae"], int, f"{where}.d_sae")
    sparsity = sparsity_setting(section, where)
    return Method(name, section, sparsity, steps, frozen, variant)


def _controls(
    name: str, kind: str, entries: list[Entry], labels: Mapping[str, str]
) -> list[Control]:
    if kind == RESIDUAL_STREAM:
        return [Control(name + label, name, hook, None) for hook, label in labels.items()]
    found = _PERMUTED.fullmatch(kind)
    if found is None:
        raise InputError(
            f"'saes.{name}.control' must be {RESIDUAL_STREAM}, {FROZEN} or permuted_decoder of "
            f"NAME, not {kind!r}"
        )
    of = [entry for entry in entries if entry.method.name == found[1]]
    if not of:
        raise InputError(f"'saes.{name}.control': there is no method {found[1]!r} in 'saes'")
    return [
        Control(
            _entry_name(name, labels[entry.hook], entry.l0, entry.seed), name, entry.hook, entry
        )
        for entry in of
    ]


def entry_training(entry: Entry, config: CompareConfig, tokens: int) -> TrainingSettings:
    """The training section of one SAE for a run of so many tokens.

    Warm-up, decay and the dead window are scaled: to the SAE's own number of mini-batches per step,
    and to the length of a short trial, whose schedule is that of the whole run in small.
    """
    training, accumulation = config.training, entry.method.accumulation_steps
    share = tokens / training.tokens
    scaled = dataclasses.replace(
        training,
        tokens=tokens,
        accumulation_steps=accumulation,
        lr_warm_up_steps=round(training.lr_warm_up_steps * share / accumulation),
        lr_decay_steps=round(training.lr_decay_steps * share / accumulation),
        dead_feature_window=max(1, round(training.dead_feature_window * share)),
    )
    if scaled.steps < 1:
        raise InputError(
            f"SAE {entry.name!r}: {tokens} tokens are less than one step of "
            f"{training.batch_size_tokens} x {accumulation}: raise training.tokens"
        )
    check_schedule(scaled)
    return scaled


def plan_entry(
    entry: Entry,
    config: CompareConfig,
    d_in: int,
    *,
    coefficient: float | None,
    tokens: int | None = None,
) -> SAEPlan:
    """SAELens' training configuration of one SAE.

    Without a coefficient a searched setting is where the search begins; tokens are training.tokens
    unless given.
    """
    tokens = config.training.tokens if tokens is None else tokens
    training = entry_training(entry, config, tokens)
    method = entry.method
    section = with_l0(method.section, method.sparsity, entry.l0, int(method.section["d_sae"]))
    share = tokens / config.training.tokens
    for key, value in section.items():
        # A sparsity penalty that is still warming up at the end of a trial says little.
        if key.endswith("_warm_up_steps") and share < 1:
            whole: int = coerce(value, int, f"saes.{method.name}.{key}")
            section[key] = round(whole * share)
    if coefficient is not None:
        section[method.sparsity.name] = coefficient
    (plan,) = plan_saes(
        {method.name: section},
        [entry.hook],
        d_model=d_in,
        training_steps=training.steps,
        accumulation_steps=training.accumulation_steps,
    )
    # All methods of a seed begin with the same weights: of two that differ in a mechanism which
    # never acts, both would else end at different ones, and every difference would hold that noise.
    return dataclasses.replace(plan, name=entry.name, base_name="one start per seed")


class ResidualStreamSAE(StandardSAE):
    """The activations as latents: `encode` and `decode` are the identity.

    L0 is d_in and explained variance 1. SAEBench's probes on the largest of these "latents" are its
    `llm_top_k`, up to the random numbers they draw.
    """

    def __init__(self, d_in: int, metadata: SAEMetadata) -> None:
        super().__init__(
            StandardSAEConfig(
                d_in=d_in, d_sae=d_in, apply_b_dec_to_input=False, metadata=copy.copy(metadata)
            )
        )
        with torch.no_grad():
            self.W_enc.copy_(torch.eye(d_in))
            self.W_dec.copy_(torch.eye(d_in))

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) as it is, in the SAE's dtype."""
        return x.to(self.dtype)

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(..., d_in) as it is."""
        return feature_acts


@torch.no_grad()
def with_permuted_decoder(sae: SAE[Any], seed: int) -> SAE[Any]:
    """A copy of an SAE whose decoder directions belong to other latents; nothing else differs."""
    permuted = copy.deepcopy(sae)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sae.W_dec.shape[0], generator=generator)
    permuted.W_dec.copy_(sae.W_dec[order.to(sae.W_dec.device)])
    return permuted
