"""The source's ladder and its mechanisms one by one, as variants of a comparison.

- `cumulative`: the baseline and runs 1 to 10, each one mechanism more than the one before it.
- `alone`: BatchTopK with one mechanism switched on, against BatchTopK.
- `default`: the preset `default` with one of its mechanisms removed, or with one more, against it;
  which of the two follows the preset.

Every variant is trained to the same L0, without which no other number could be compared. The
source's thresholds have a fixed z, which fires a fixed share of the dictionary: here z starts at
the source's value and follows the target. A claim is what the mechanism is for in the source, not a
number of it: all its reported runs read `training_steps: 0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msae_plugin.architecture.peers import batchtopk_section
from msae_plugin.architecture.presets import preset, preset_names, preset_summary
from msae_plugin.common.errors import InputError

Group = Literal["cumulative", "alone", "default"]

BASELINE, OFF, DEFAULT = "baseline", "off", "default"
_NO_AUXK = "only-no-auxk"
# Largest move of z per step: from run 2's 1.5 to the 2.05 of L0 = 48 at d_sae 2304 in 28 steps.
_Z_RATE = 0.02
_FOLLOWS_L0 = {"zscore_z_lr": _Z_RATE}


@dataclass(frozen=True)
class Variant:
    """One method of the ladder."""

    name: str
    group: Group
    mechanism: str  # What is different, in a few words
    claim: str | None  # What it is for in the source; None for what the source does not have
    against: str | None  # Name of the variant it is compared with; None for a reference
    section: Mapping[str, Any]  # As in `saes` of a comparison, less d_sae and lr


@dataclass(frozen=True)
class _Mechanism:
    key: str
    mechanism: str
    claim: str | None
    section: Mapping[str, Any]


_RUN_CLAIMS = {
    1: "thresholds adapt to each latent, features become orthogonal, activity decorrelates",
    2: "stable training, decoder rows comparable",
    3: "no divergence when gradients are large",
    4: "better reconstruction",
    5: "capacity goes to features that matter",
    6: "robust to the scale of the input",
    7: "normalisation where the input needs it",
    8: "features interact",
    9: "features at several scales",
    10: "smoother gradients, larger effective batch",
}

_ORTHOGONAL = {
    "orthogonality_coefficient": 0.1,
    "orthogonality_pairs": "chunks",
    "orthogonality_weighting": "none",
}
_NEIGHBOURS = {
    "orthogonality_coefficient": 3.0,
    "orthogonality_pairs": "neighbours",
    "orthogonality_weighting": "coactivation",
}
_SKETCHED = {
    "orthogonality_coefficient": 3.0,
    "orthogonality_pairs": "chunks",
    "orthogonality_weighting": "coactivation",
    "sketch_rank": 32,
}
_FOUR_SCALES = {
    "norm_scales": [0.1, 0.5, 1.0, 2.0],
    "norm_eps": 0.1,
    "norm_eps_mode": "relative",
}
_BUDGETS = {"sparsity_scales": [2.0], "sparsity_scale_weight": 0.25}
_PREFIXES = {
    "prefix_fractions": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2],
    "prefix_weight": 0.25,
    "prefix_sort_every": 100,
}

# Mechanisms of the source; each is put on BatchTopK and on the default.
_SOURCE_MECHANISMS = (
    _Mechanism(
        "zscore",
        "z-score thresholds in place of BatchTopK",
        "adapt to each latent",
        {"selection": "zscore", "zscore_z": 2.0, **_FOLLOWS_L0},
    ),
    _Mechanism(
        "coactivation",
        "penalty weighted by co-activation, over decoder neighbours",
        "push apart only what interferes",
        _NEIGHBOURS,
    ),
    _Mechanism(
        "sketch",
        "penalty weighted by a rank-32 sketch of the co-activation",
        "decorrelate at low rank",
        _SKETCHED,
    ),
    _Mechanism(
        "init",
        "init 1/sqrt(d) and unit-norm decoder",
        "stable training",
        {"weight_init": "inverse_sqrt_d", "decoder_init_norm": 1.0, "unit_norm_decoder": True},
    ),
    _Mechanism(
        "gradient-lr",
        "learning rate that falls with large gradients",
        "no divergence",
        {"gradient_lr": {"enabled": True}, "lr_floor": 1e-5},
    ),
    _Mechanism("skip", "skip connection 0.1", "better reconstruction", {"skip_scale": 0.1}),
    _Mechanism(
        "importance",
        "gradients weighted by importance",
        "capacity to what matters",
        {"importance_power": 0.5},
    ),
    _Mechanism("layer-norm", "layer normalisation", "robust to scale", {"norm_scales": [1.0]}),
    _Mechanism(
        "gated-norm",
        "gated layer normalisation",
        "normalise where needed",
        {"norm_scales": [1.0], "norm_gate": True},
    ),
    _Mechanism("four-scales", "normalisation at four scales", "several scales", _FOUR_SCALES),
    _Mechanism(
        "attention",
        "attention over four scales",
        "features interact",
        {**_FOUR_SCALES, "norm_attention": True},
    ),
    _Mechanism(
        "accumulation",
        "gradients of 4 mini-batches per step",
        "smoother gradients",
        {"accumulation_steps": 4},
    ),
    _Mechanism(
        "revival",
        "revival of dead latents that interfere",
        "dead features come back",
        {"revival_every": 50, "revival_dead_steps": 50, "revival_min_cosine": 0.2},
    ),
)
# Mechanisms that the default preset has or could have: each is put on BatchTopK, and removed from
# the default where that has it, else added to it.
_DEFAULT_MECHANISMS = (
    (_Mechanism("budgets", "loss at 2 k", None, _BUDGETS), {"sparsity_scales": []}),
    (_Mechanism("prefixes", "nested prefixes", None, _PREFIXES), {"prefix_fractions": []}),
    (
        _Mechanism("annealing", "k annealed from 2 k", None, {}),
        {"k_anneal_steps": 0, "k_initial_multiplier": 1.0},
    ),
    (
        _Mechanism("orthogonality", "OrtSAE's penalty", "orthogonal features", _ORTHOGONAL),
        {"orthogonality_coefficient": 0.0},
    ),
    (
        _Mechanism("auxk", "AuxK for dead latents", None, {}),
        {"aux_loss_coefficient": 0.0},
    ),
    (
        _Mechanism(
            "firing-floor",
            "a lower cut for latents that hardly fire",
            None,
            {"firing_floor": 0.1},
        ),
        {"firing_floor": 0.0},
    ),
    (
        _Mechanism(
            "dense-limit",
            "higher thresholds for dense latents",
            None,
            {"dense_share_limit": 0.3},
        ),
        {"dense_share_limit": 1.0},
    ),
)


def ladder_variants() -> list[Variant]:
    """All variants, each group in its order."""
    return [*_cumulative(), *_alone(), *_default()]


def chosen_variants(groups: list[Group], leave_out: list[str]) -> list[Variant]:
    """The variants of some groups, less some names."""
    known = {variant.name for variant in ladder_variants()}
    for name in leave_out:
        if name not in known:
            raise InputError(f"ladder.leave_out: {name!r} is no variant of the ladder")
    kept = [v for v in ladder_variants() if v.group in groups and v.name not in leave_out]
    names = {variant.name for variant in kept}
    for variant in kept:
        if variant.against is not None and variant.against not in names:
            raise InputError(
                f"ladder.leave_out: {variant.against!r} is what {variant.name!r} is compared with"
            )
    return kept


def _cumulative() -> list[Variant]:
    found = [
        Variant(
            BASELINE,
            "cumulative",
            "SAELens' standard",
            "the reference",
            None,
            # The source's L1 0.04 gives whatever L0 it gives: the coefficient is tuned to the
            # target. Activations are scaled because the loss depends on their unit.
            {
                "architecture": "standard",
                "l1_coefficient": 1.0,
                "input_normalization": "first_batch",
            },
        )
    ]
    runs = [name for name in preset_names() if name.startswith("source-run-")]
    for number, name in enumerate(runs, start=1):
        found.append(
            Variant(
                name,
                "cumulative",
                preset_summary(name),
                _RUN_CLAIMS[number],
                BASELINE if number == 1 else runs[number - 2],
                {"preset": name, **_FOLLOWS_L0},
            )
        )
    return found


def _alone() -> list[Variant]:
    off = batchtopk_section()
    no_auxk = {**off, "aux_loss_coefficient": 0.0}
    found = [Variant(OFF, "alone", "every mechanism off: BatchTopK", None, None, off)]
    for item in (*(m for m, _ in _DEFAULT_MECHANISMS), *_SOURCE_MECHANISMS):
        if item.key == "auxk":
            continue  # part of BatchTopK: below it is removed
        section = {**off, **item.section}
        if item.key == "annealing":
            # The preset fits the schedule to the run: it is what `off` leaves out.
            for key in ("k_anneal_steps", "k_initial_multiplier"):
                section.pop(key)
        found.append(Variant(f"only-{item.key}", "alone", item.mechanism, item.claim, OFF, section))
    revival = next(m for m in _SOURCE_MECHANISMS if m.key == "revival")
    found += [
        Variant(_NO_AUXK, "alone", "BatchTopK without AuxK", None, OFF, no_auxk),
        Variant(
            "only-revival-no-auxk",
            "alone",
            "revival in place of AuxK",
            revival.claim,
            _NO_AUXK,
            {**no_auxk, **revival.section},
        ),
    ]
    return found


def _default() -> list[Variant]:
    found = [Variant(DEFAULT, "default", "the default preset", None, None, {"preset": DEFAULT})]
    # The ladder follows the preset: what it is made of is not said twice.
    settings = vars(preset(DEFAULT, d_in=16, d_sae=64, k=4, training_steps=100))
    for item, removal in _DEFAULT_MECHANISMS:
        has_it = any(settings[key] != value for key, value in removal.items())
        if not has_it and not item.section:
            continue
        word, text = ("no", "without") if has_it else ("plus", "with")
        section = {"preset": DEFAULT, **(removal if has_it else item.section)}
        name, text = f"default-{word}-{item.key}", f"default {text}: {item.mechanism}"
        found.append(Variant(name, "default", text, item.claim, DEFAULT, section))
    for item in _SOURCE_MECHANISMS:
        section = {"preset": DEFAULT, **item.section}
        against = DEFAULT
        if item.key == "zscore":
            # A threshold has no budget to scale, and no common cut that a floor could lower.
            section["sparsity_scales"] = []
            if settings["firing_floor"]:
                section["firing_floor"] = 0.0
            if settings["dense_share_limit"] < 1:
                section["dense_share_limit"] = 1.0
            without = "default-no-budgets"
            against = without if any(v.name == without for v in found) else DEFAULT
        text = f"default with: {item.mechanism}"
        found.append(
            Variant(f"default-plus-{item.key}", "default", text, item.claim, against, section)
        )
    return found
