"""The plain JumpReLU copy: equal to the export, loadable without this package, or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from steps import activations, make, to_export_units, train

from msae_plugin import InputError, MultiScaleTrainingSAE, preset, preset_names
from msae_plugin.architecture.export import jumprelu_export_obstacle, save_jumprelu_export

COPY_CHECK = """
import sys, torch
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
assert type(sae).__name__ == "JumpReLUSAE", type(sae)
x, latents, out = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(sae.encode(x) > 0, latents > 0)
    torch.testing.assert_close(sae.encode(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), out, rtol=1e-5, atol=1e-5)
assert not [name for name in sys.modules if name.startswith("msae_plugin")]
print("same")
"""


def test_the_jumprelu_copy_loads_without_this_package(tmp_path: Path) -> None:
    sae = make(d_in=8, d_sae=24, k=3, prefix_sort_every=3)
    train(sae, 10)
    sae.eval()
    save_jumprelu_export(sae, tmp_path / "jumprelu")
    x = activations(20, 8, 7)
    with torch.no_grad():
        torch.save((x, to_export_units(sae, sae.encode(x)), sae(x)), tmp_path / "expected.pt")
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            COPY_CHECK,
            str(tmp_path / "jumprelu"),
            str(tmp_path / "expected.pt"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == "same", found.stderr


@pytest.mark.parametrize("name", preset_names())
def test_the_jumprelu_copy_of_every_preset_is_equal_or_refused(name: str, tmp_path: Path) -> None:
    sae = MultiScaleTrainingSAE(preset(name, d_in=8, d_sae=24, k=3, training_steps=10))
    train(sae, 10, l1=sae.cfg.l1_coefficient)
    sae.eval()
    obstacle = jumprelu_export_obstacle(sae.cfg)
    needs_the_norm_or_the_input = bool(sae.cfg.norm_scales) or sae.cfg.skip_scale > 0
    assert (obstacle is not None) == needs_the_norm_or_the_input
    if obstacle is not None:
        assert ("norm_scales" in obstacle) or ("skip_scale" in obstacle)
        with pytest.raises(InputError, match=r"no jumprelu copy: (norm|skip)_scale") as info:
            save_jumprelu_export(sae, tmp_path / "jumprelu")
        assert "\n" not in str(info.value)
        assert not (tmp_path / "jumprelu").exists()
        return
    save_jumprelu_export(sae, tmp_path / "jumprelu")
    sae.save_inference_model(tmp_path / "own")
    jumprelu, own = SAE.load_from_disk(tmp_path / "jumprelu"), SAE.load_from_disk(tmp_path / "own")
    x = activations(20, 8, 7)
    with torch.no_grad():
        assert torch.equal(jumprelu.encode(x), own.encode(x))
        assert torch.equal(jumprelu(x), own(x))
        torch.testing.assert_close(jumprelu.encode(x), to_export_units(sae, sae.encode(x)))
    assert jumprelu.cfg.metadata.training_architecture == "multiscale"
