"""SAELens' own scalings of the activations, and what folding them into the weights gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer
from steps import (
    EVERYTHING,
    activations,
    make,
    plain,
    saelens_trainer_config,
    to_export_units,
    train,
)

from msae_plugin import (
    InputError,
    MultiScaleSAE,
    MultiScaleSAEConfig,
    MultiScaleTrainingSAE,
    MultiScaleTrainingSAEConfig,
)

FLAVOURS: dict[str, dict[str, Any]] = {
    "off": {},
    "default": {"prefix_fractions": [0.2, 0.5], "prefix_sort_every": 3, "sparsity_scales": [2.0]},
    "skip": {"skip_scale": 0.1},
    "standardised": {"standardise": 0.5},
    "firing floor": {"firing_floor": 0.8, "firing_floor_rate": 0.1},
    "z-score": {"selection": "zscore", "zscore_z": 1.0},
}
NORMALISED: dict[str, dict[str, Any]] = {
    "layer norm": {"norm_scales": [1.0]},
    "four scales": {"norm_scales": [0.1, 0.5, 1.0, 2.0]},
    "relative eps, gate, attention": {
        "norm_scales": [0.5, 2.0],
        "norm_eps": 0.2,
        "norm_eps_mode": "relative",
        "norm_gate": True,
        "norm_attention": True,
    },
    "z-score": {"norm_scales": [1.0], "selection": "zscore", "zscore_z": 1.0},
    "skip": {"norm_scales": [1.0], "norm_centre": False, "skip_scale": 0.1},
}


def data() -> Iterator[torch.Tensor]:
    step = 0
    while True:
        yield 40 * activations(64, 6, step)
        step += 1


def fitted(
    sae: MultiScaleTrainingSAE, monkeypatch: pytest.MonkeyPatch, n_steps: int = 25
) -> tuple[MultiScaleTrainingSAE, dict[str, Any]]:
    """Train with SAELens' trainer; returns a copy from before the fold, and its arguments."""
    seen: dict[str, Any] = {}
    for name in ("fold_activation_norm_scaling_factor", "fold_activation_whitening"):
        fold = getattr(sae, name)

        def watched(*args: Any, _fold: Any = fold, **kwargs: Any) -> None:
            seen.update(kwargs or {"scaling_factor": args[0]})
            seen["unfolded"] = copy.deepcopy(sae)
            _fold(*args, **kwargs)

        monkeypatch.setattr(type(sae), name, lambda self, *a, _w=watched, **k: _w(*a, **k))
    cfg = saelens_trainer_config(n_steps, lr=1e-3, n_batches_for_norm_estimate=5)
    SAETrainer(cfg=cfg, sae=sae, data_provider=data()).fit()
    unfolded = seen.pop("unfolded")
    assert sae.cfg.normalize_activations == "none"
    return unfolded.eval(), seen


def assert_export_agrees(sae: MultiScaleTrainingSAE, x: torch.Tensor, folder: Path) -> None:
    sae.eval()
    sae.save_inference_model(folder)
    exported = SAE.load_from_disk(folder)
    assert exported.cfg.normalize_activations == "none"
    with torch.no_grad():
        expected = to_export_units(sae, sae.encode(x))
        torch.testing.assert_close(exported.encode(x), expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(exported(x), sae(x), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae))


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
@pytest.mark.parametrize("flavour", [*FLAVOURS, *(f"norm: {n}" for n in NORMALISED)])
def test_scaling_factor_folds(
    flavour: str, rescale: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    normalised = flavour.startswith("norm: ")
    fields = NORMALISED[flavour[6:]] if normalised else FLAVOURS[flavour]
    sae = make(
        **plain(
            normalize_activations="expected_average_only_in",
            rescale_acts_by_decoder_norm=rescale,
            **fields,
        )
    )
    unfolded, arguments = fitted(sae, monkeypatch)
    sae.eval()
    factor = arguments["scaling_factor"]
    assert factor < 0.1  # the activations are far from the wanted norm
    x = 40 * activations(50, 6, 777)
    # Latents carry the unit of the activations unless raw decoder rows carry it.
    unit = factor if rescale or normalised else 1.0
    with torch.no_grad():
        expected = unfolded.encode(factor * x)
        assert 0 < (expected > 0).float().mean() < 1
        torch.testing.assert_close(sae.encode(x), expected / unit, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(sae(x), unfolded(factor * x) / factor, rtol=1e-4, atol=1e-2)
    assert_export_agrees(sae, x, tmp_path)


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_whitening_folds(
    flavour: str, rescale: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sae = make(
        **plain(
            normalize_activations="covariance_whitening",
            rescale_acts_by_decoder_norm=rescale,
            **FLAVOURS[flavour],
        )
    )
    unfolded, arguments = fitted(sae, monkeypatch)
    sae.eval()
    x = 40 * activations(50, 6, 777)
    mean, matrix = arguments["mean"].float(), arguments["whitening_matrix"].float()
    with torch.no_grad():
        white = (x - mean) @ matrix
        expected = unfolded.encode(white)
        assert 0 < (expected > 0).float().mean() < 1
        latents = sae.encode(x)
        # Folding the norms first may round a pre-activation across the threshold.
        agree = ((latents > 0) == (expected > 0)).float().mean()
        assert agree > 0.995
        both = (latents > 0) & (expected > 0)
        torch.testing.assert_close(latents[both], expected[both], rtol=1e-3, atol=1e-3)
        back = unfolded(white) @ arguments["unwhitening_matrix"].float() + mean
        close = ((sae(x) - back).abs() < 1e-2 * back.abs().mean()).all(dim=1)
        assert close.float().mean() > 0.95
    assert_export_agrees(sae, x, tmp_path)


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not rescaled"])
def test_folding_keeps_training_going(rescale: bool) -> None:
    """A folded SAE selects the same latents in training mode, on the raw activations."""
    fields = {**EVERYTHING, "rescale_acts_by_decoder_norm": rescale, "revival_every": 0}
    sae = make(d_in=6, d_sae=13, k=3, normalize_activations="expected_average_only_in", **fields)
    train(sae, 10, l1=0.1)
    folded = copy.deepcopy(sae)
    folded.fold_activation_norm_scaling_factor(0.25)
    x = activations(40, 6, 55)
    with torch.no_grad():
        expected = sae.train().encode(x)
        torch.testing.assert_close(folded.train().encode(4 * x), 4 * expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fields", [{}, {"norm_scales": [0.5, 1.0], "norm_gate": True}])
def test_an_exported_sae_folds_too(fields: dict[str, Any]) -> None:
    """What `SAE.from_pretrained` does with a scaling factor that a release lists."""
    torch.manual_seed(0)
    sae = MultiScaleSAE(
        MultiScaleSAEConfig(
            d_in=6, d_sae=13, normalize_activations="expected_average_only_in", **fields
        )
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        sae.threshold.abs_()
    folded = copy.deepcopy(sae)
    folded.fold_activation_norm_scaling_factor(0.25)
    assert folded.cfg.normalize_activations == "none"
    x = activations(40, 6, 55)
    with torch.no_grad():
        active = sae.encode(x) > 0
        assert active.any()
        assert torch.equal(folded.encode(4 * x) > 0, active)
        torch.testing.assert_close(folded(4 * x), 4 * sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ["training", "inference"])
def test_stateful_normalisations_are_refused_with_the_alternative(mode: str, kind: str) -> None:
    config: type[Any] = MultiScaleSAEConfig
    if kind == "training":
        config = MultiScaleTrainingSAEConfig
    with pytest.raises(InputError, match=r"^normalize_activations=.*norm_scales=\[1.0\]") as info:
        config(d_in=6, d_sae=33, normalize_activations=mode)
    assert "\n" not in str(info.value)


def test_folding_norms_that_decide_the_selection_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm=False"):
        make(**plain(rescale_acts_by_decoder_norm=False)).fold_W_dec_norm()
