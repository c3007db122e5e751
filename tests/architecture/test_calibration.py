"""The calibrated cut against a full sort, and against the exported SAE."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE

from msae_plugin import preset
from msae_plugin.architecture.calibration import calibrate, calibrate_batchtopk, needs_calibration

D_IN, D_SAE = 16, 40


def build(architecture: str, **fields: Any) -> TrainingSAE[Any]:
    sae_class, config_class = get_sae_training_class(architecture)
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **fields))
    torch.nn.init.normal_(sae.b_enc, std=0.2)
    return sae


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, D_IN, generator=generator) * scale for n, scale in [(64, 1), (40, 3)]]


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("k", [3, 7.5])
def test_mean_l0_of_the_export_is_k(k: float, rescale: bool, tmp_path: Path) -> None:
    sae: Any = build("batchtopk", k=k, rescale_acts_by_decoder_norm=rescale)
    sae.topk_threshold.fill_(0.01)
    report = calibrate_batchtopk(sae, batches())

    everything = torch.cat(batches())
    hidden = sae.encode_with_hidden_pre(everything)[1].flatten().sort(descending=True).values
    wanted = round(k * len(everything))
    assert hidden[wanted] < report["threshold"] < hidden[wanted - 1]
    assert report["l0_after"] == pytest.approx(wanted / len(everything))
    assert report["l0_before"] > k

    sae.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    # Folding the decoder's norms at export rounds: one latent in a thousand may tip over.
    l0 = float((exported.encode(everything) > 0).float().sum(-1).mean())
    assert l0 == pytest.approx(k, rel=2e-3)


def test_fewer_positive_values_than_wanted_gives_a_threshold_of_zero() -> None:
    sae: Any = build("batchtopk", k=39)
    sae.b_enc.data.fill_(-5.0)
    report = calibrate_batchtopk(sae, batches())
    assert report["threshold"] == 0.0
    assert report["l0_after"] < 39


def test_matryoshka_is_calibrated_too() -> None:
    sae = build("matryoshka_batchtopk", k=5, matryoshka_widths=[10, 40])
    assert calibrate(sae, batches())["l0_after"] == pytest.approx(5, rel=1e-2)
    assert sae.training


def test_multiscale_is_calibrated_by_itself() -> None:
    torch.manual_seed(0)
    config = preset("nested", d_in=D_IN, d_sae=D_SAE, k=5, training_steps=10)
    sae: Any = get_sae_training_class("multiscale")[0](config)
    assert needs_calibration(sae)
    alike = list(torch.randn(256, D_IN, generator=torch.Generator().manual_seed(1)).split(64))
    report = calibrate(sae, alike)
    assert set(report) == {"l0_before", "l0_after", "threshold"}
    sae.eval()
    measured = float((sae.encode(torch.cat(alike)) != 0).float().sum(-1).mean())
    assert measured == pytest.approx(5, rel=1e-2)
    assert report["l0_after"] == pytest.approx(measured, rel=1e-3)


def test_architectures_without_a_cut_are_left_alone() -> None:
    for architecture, fields in {"topk": {"k": 4}, "standard": {}, "jumprelu": {}}.items():
        sae = build(architecture, **fields)
        assert not needs_calibration(sae)
        with pytest.raises(TypeError):
            calibrate(sae, batches())
