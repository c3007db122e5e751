"""Importing registers with SAELens, once, and never over somebody else's class."""

from __future__ import annotations

import pytest
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from msae_plugin import (
    InputError,
    MultiScaleSAE,
    MultiScaleSAEConfig,
    MultiScaleTrainingSAE,
    MultiScaleTrainingSAEConfig,
    register,
)


def test_registering_twice_is_harmless() -> None:
    before = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)
    register()
    register()
    assert (dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)) == before
    assert SAE_CLASS_REGISTRY["multiscale"] == (MultiScaleSAE, MultiScaleSAEConfig)
    assert SAE_TRAINING_CLASS_REGISTRY["multiscale"] == (
        MultiScaleTrainingSAE,
        MultiScaleTrainingSAEConfig,
    )


def test_a_missing_registration_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SAE_CLASS_REGISTRY, "multiscale")
    monkeypatch.delitem(SAE_TRAINING_CLASS_REGISTRY, "multiscale")
    register()
    assert SAE_CLASS_REGISTRY["multiscale"][0] is MultiScaleSAE
    assert SAE_TRAINING_CLASS_REGISTRY["multiscale"][0] is MultiScaleTrainingSAE


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_a_foreign_class_under_our_name_is_an_error(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "inference":
        monkeypatch.setitem(SAE_CLASS_REGISTRY, "multiscale", (JumpReLUSAE, JumpReLUSAEConfig))
        owner = "sae_lens.saes.jumprelu_sae.JumpReLUSAE"
    else:
        foreign = (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig)
        monkeypatch.setitem(SAE_TRAINING_CLASS_REGISTRY, "multiscale", foreign)
        owner = "sae_lens.saes.batchtopk_sae.BatchTopKTrainingSAE"
    with pytest.raises(InputError) as info:
        register()
    message = str(info.value)
    assert owner in message
    assert kind in message
    assert "\n" not in message
