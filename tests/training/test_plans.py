"""An SAE goes on with the settings that it was begun with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from msae_plugin.architecture.presets import preset_names
from msae_plugin.saes.find import read_checkpoint
from msae_plugin.training.plans import (
    SAEPlan,
    as_begun,
    build_sae,
    changed_settings,
    plan_saes,
    plans_as_begun,
    preset_training,
)

HOOK = "blocks.1.hook_resid_post"
SECTIONS: dict[str, dict[str, Any]] = {
    **{name: {"architecture": name} for name in SAE_TRAINING_CLASS_REGISTRY},
    **{f"preset-{name}": {"preset": name, "k": 4} for name in preset_names()},
}
SECTIONS["multiscale"] |= {"k": 4}
SECTIONS["batchtopk_bottleneck"] |= {"bottleneck_rank": 2}
SECTIONS["matryoshka_batchtopk"] |= {"matryoshka_widths": [8, 24]}


def planned(section: dict[str, Any]) -> SAEPlan:
    steps = preset_training(section).get("accumulation_steps", 1)
    (plan,) = plan_saes(
        {"sae": {"d_sae": 24, **section}},
        [HOOK],
        d_model=16,
        training_steps=50,
        accumulation_steps=steps,
    )
    return plan


@pytest.mark.parametrize("name", SECTIONS)
def test_files_of_this_version_change_nothing(name: str, tmp_path: Path) -> None:
    plan = planned(SECTIONS[name])
    sae = build_sae(plan, 0, "cpu")
    sae.save_model(tmp_path / "sae")
    (begun,) = plans_as_begun([plan], tmp_path)
    assert begun.config.to_dict() == plan.config.to_dict()
    assert changed_settings(begun, plan) == {}
    # An export has what concerns training in its metadata.
    sae.save_inference_model(tmp_path / "export")
    export = read_checkpoint(tmp_path / "export")
    assert changed_settings(as_begun(plan, export), plan) == {}


def test_what_a_preset_stood_for_is_kept(tmp_path: Path) -> None:
    before = planned({"preset": "default", "k": 4, "dense_share_limit": 0.6, "k_anneal_steps": 20})
    sae = build_sae(before, 0, "cpu")
    sae.save_model(tmp_path / "sae")
    now = planned({"preset": "default", "k": 4})
    (begun,) = plans_as_begun([now], tmp_path)
    assert begun.config == replace(now.config, dense_share_limit=0.6, k_anneal_steps=20)
    assert changed_settings(begun, now) == {
        "dense_share_limit": "dense_share_limit 0.6 (now 0.3)",
        "k_anneal_steps": "k_anneal_steps 20 (now 0)",
    }
