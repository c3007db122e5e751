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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from msae_plugin.architecture.peers import batchtopk_section
from msae_plugin.architecture.presets import preset, preset_names, preset_summary
from msae_plugin.common.errors import InputError

Group = Literal["cumulative", "alone", "default"]

BASELINE, OFF, DEFAULT = "baseline", "off", "default"
_NO_AUXK = "only-no-auxk"


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
    text: str
    claim: str | None = None
    section: Mapping[str, Any] = field(default_factory=dict[str, Any])
    removal: Mapping[str, Any] = field(default_factory=dict[str, Any])


_STORED = yaml.safe_load(Path(__file__).with_name("ladder.yaml").read_text(encoding="utf-8"))
_RUN_CLAIMS: Sequence[str] = _STORED["run_claims"]
_FOLLOWS_L0: Mapping[str, Any] = _STORED["follows_l0"]
_OF_THE_DEFAULT, _OF_THE_SOURCE = (
    {key: _Mechanism(**entry) for key, entry in _STORED[of].items()}
    for of in ("of_the_default", "of_the_source")
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
    for name, claim, before in zip(runs, _RUN_CLAIMS, [BASELINE, *runs], strict=False):
        section = {"preset": name, **_FOLLOWS_L0}
        found.append(Variant(name, "cumulative", preset_summary(name), claim, before, section))
    return found


def _alone() -> list[Variant]:
    off = batchtopk_section()
    no_auxk = {**off, "aux_loss_coefficient": 0.0}
    found = [Variant(OFF, "alone", "every mechanism off: BatchTopK", None, None, off)]
    for key, item in {**_OF_THE_DEFAULT, **_OF_THE_SOURCE}.items():
        if key == "auxk":
            continue  # part of BatchTopK: below it is removed
        section = {**off, **item.section}
        if key == "annealing":
            # What `off` switches off is what its preset brings.
            kept = {name: value for name, value in off.items() if name not in item.removal}
            section = {**kept, **item.section}
        found.append(Variant(f"only-{key}", "alone", item.text, item.claim, OFF, section))
    revival = _OF_THE_SOURCE["revival"]
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
    for key, item in _OF_THE_DEFAULT.items():
        has_it = any(settings[name] != value for name, value in item.removal.items())
        if not has_it and not item.section:
            continue
        word, text = ("no", "without") if has_it else ("plus", "with")
        section = {"preset": DEFAULT, **(item.removal if has_it else item.section)}
        name, text = f"default-{word}-{key}", f"default {text}: {item.text}"
        found.append(Variant(name, "default", text, item.claim, DEFAULT, section))
    for key, item in _OF_THE_SOURCE.items():
        section = {"preset": DEFAULT, **item.section}
        against = DEFAULT
        if key == "zscore":
            # A threshold has no budget to scale, and no common cut that a floor could lower.
            section["sparsity_scales"] = []
            if settings["firing_floor"]:
                section["firing_floor"] = 0.0
            if settings["dense_share_limit"] < 1:
                section["dense_share_limit"] = 1.0
            without = "default-no-budgets"
            against = without if any(v.name == without for v in found) else DEFAULT
        text = f"default with: {item.text}"
        found.append(Variant(f"default-plus-{key}", "default", text, item.claim, against, section))
    return found
