"""The check after an upload fails when it should; the way there is in test_publish.py."""

from __future__ import annotations

import pytest
import torch
from sae_lens import SAE

from msae_plugin.common.errors import RunFailure
from msae_plugin.hub.plan import build_folder
from msae_plugin.hub.verification import check_activations, check_latents
from msae_plugin.saes.find import find_saes


@pytest.fixture
def folder(run):
    (sae,) = find_saes(run / "batchtopk")
    return build_folder("a/b", sae, None)


def loads_as(monkeypatch, sae) -> None:
    monkeypatch.setattr(SAE, "from_pretrained", classmethod(lambda cls, *_args, **_kwargs: sae))


@pytest.mark.parametrize(
    ("name", "factor", "words"),
    [("W_dec", 1.01, "reconstructions differ"), ("threshold", 1.5, "are on in only one")],
)
def test_an_sae_that_computes_something_else_is_refused(folder, monkeypatch, name, factor, words):
    other = SAE.load_from_disk(folder.sae.folder)
    with torch.no_grad():
        getattr(other, name).mul_(factor)
    loads_as(monkeypatch, other)
    with pytest.raises(RunFailure, match=words):
        check_latents("ada/x", "0" * 40, True, folder)


def test_made_up_activations_switch_latents_on_and_are_always_the_same(run):
    for export in ("batchtopk/sae", "multiscale/sae"):
        (sae,) = find_saes(run / export)
        (sae.root / "check_activations.safetensors").unlink()
        loaded = SAE.load_from_disk(sae.folder)
        first, source = check_activations(sae, loaded)
        assert "made-up" in source
        assert torch.equal(first, check_activations(sae, loaded)[0])
        with torch.no_grad():
            assert ((loaded.encode(first) > 0).sum(1) > 0).float().mean() > 0.5


def test_activations_kept_by_the_run_are_those_of_the_model(run):
    (sae,) = find_saes(run / "multiscale")
    activations, source = check_activations(sae, SAE.load_from_disk(sae.folder))
    assert activations.shape == (256, 64)
    assert source == "256 real activations of the run"
    # The L0 of the export check, on 4096 of them.
    with torch.no_grad():
        l0 = (SAE.load_from_disk(sae.folder).encode(activations) > 0).sum(1).float().mean()
    assert l0.item() == pytest.approx(sae.l0, rel=0.15)
