"""Law: the scale and the mean of the activations do not matter (docs/method.md, "Input")."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer
from steps import activations, saelens_trainer_config, step_input, to_export_units

from msae_plugin import MultiScaleTrainingSAE, preset
from msae_plugin.architecture.export import save_jumprelu_export
from msae_plugin.architecture.input_units import InputUnits, estimate_units, geometric_median
from msae_plugin.architecture.presets import preset_names

D_IN, D_SAE, K, N_STEPS, N_TOKENS = 12, 48, 4, 30, 64
PRESETS = ("default", "nested", "features")
_DOUBLE = torch.float64


def structured(seed: int, n_tokens: int = N_TOKENS) -> torch.Tensor:
    """Activations with one massive dimension (of the mean) and a few massive tokens."""
    x = activations(n_tokens, D_IN, seed, _DOUBLE)
    x[:, 3] += 1000 * x.std()
    massive = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(seed))[:2]
    x[massive] += 180 * (x[massive] - x.mean(dim=0))
    return x


def trained(
    name: str, scale: float, shift: torch.Tensor, steps: int = N_STEPS, **fields: Any
) -> tuple[MultiScaleTrainingSAE, list[float]]:
    """Adam and clipping as SAELens' trainer has them, on scale * x + shift in float64."""
    torch.manual_seed(0)
    cfg = preset(name, d_in=D_IN, d_sae=D_SAE, k=K, training_steps=steps, dtype="float64", **fields)
    sae = MultiScaleTrainingSAE(cfg).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    losses: list[float] = []
    for step in range(steps):
        torch.manual_seed(step)
        x = scale * structured(step) + shift
        output = sae.training_forward_pass(step_input(x, step, torch.arange(D_SAE) % 7 == 0))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        losses.append(float(output.loss))
    return sae, losses


@pytest.mark.promise("Scale and mean of the activations do not matter to training.")
@pytest.mark.parametrize("name", PRESETS)
@given(
    log_scale=st.floats(-3, 4),
    log_shift=st.floats(-2, 2),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=5)
def test_training_is_equivariant(name: str, log_scale: float, log_shift: float, seed: int) -> None:
    """a * x + c gives the same weights and losses up to the unit, c up to 100 deviations."""
    scale = 10.0**log_scale
    deviation = float(activations(N_TOKENS, D_IN, 0, _DOUBLE).std())
    direction = torch.randn(D_IN, generator=torch.Generator().manual_seed(seed), dtype=_DOUBLE)
    shift = scale * deviation * 10.0**log_shift * direction
    base, losses = trained(name, 1.0, torch.zeros(D_IN, dtype=_DOUBLE))
    other, other_losses = trained(name, scale, shift)
    # x loses |c| / (eps of the deviation) in a * x + c; training then carries it on.
    rounding = 1e-7
    torch.testing.assert_close(
        torch.tensor(other_losses), torch.tensor(losses), rtol=rounding, atol=0
    )
    for (parameter, a), b in zip(base.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=lambda m, p=parameter: p + m)
    x = structured(99)
    with torch.no_grad():
        base.eval(), other.eval()
        expected = base.encode(x)
        found = other.encode(scale * x + shift)
        same = (expected > 0) == (found > 0)
        assert same.double().mean() > 0.999  # a pre-activation may lie on a threshold
        torch.testing.assert_close(found[same] / scale, expected[same], rtol=1e-4, atol=1e-5)


@pytest.mark.promise("Scale and mean of the activations do not matter to training.")
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_units_fold_at_export(name: str, apply_b_dec: bool, tmp_path: Path) -> None:
    """The export and the plain JumpReLU copy give the latents of the trained SAE."""
    shift = 100 * torch.ones(D_IN, dtype=_DOUBLE)
    sae, _ = trained(name, 30.0, shift, apply_b_dec_to_input=apply_b_dec)
    sae.calibrate_threshold([30.0 * structured(200) + shift])
    sae.eval()
    sae.save_inference_model(tmp_path / "sae")
    save_jumprelu_export(sae, tmp_path / "jumprelu")
    x = 30.0 * structured(201) + shift
    expected = to_export_units(sae, sae.encode(x))
    for folder in ("sae", "jumprelu"):
        exported = SAE.load_from_disk(tmp_path / folder)
        assert exported.cfg.normalize_activations == "none"
        latents = exported.encode(x)
        threshold = exported.threshold  # type: ignore[union-attr]
        # Thresholds are float32: a pre-activation within their rounding may fall on either side.
        clear = (expected - threshold).abs() > 1e-6 * expected.abs().max()
        torch.testing.assert_close(latents[clear], expected[clear], rtol=1e-9, atol=1e-6)
        torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=_DOUBLE))
        agrees = ((latents > 0) == (expected > 0)).all(dim=1)
        assert agrees.double().mean() > 0.9
        torch.testing.assert_close(
            exported.decode(latents)[agrees], sae(x)[agrees], rtol=1e-6, atol=1e-3
        )


@pytest.mark.parametrize("name", PRESETS)
def test_saelens_own_trainer_sees_no_scale(name: str) -> None:
    """The law holds in SAELens' plain trainer, which hands the SAE raw activations."""

    def run(scale: float, shift: float) -> MultiScaleTrainingSAE:
        torch.manual_seed(0)
        cfg = preset(name, d_in=D_IN, d_sae=D_SAE, k=K, training_steps=20, dtype="float64")
        sae = MultiScaleTrainingSAE(cfg)
        data = (scale * structured(step) + shift for step in range(1000))
        trainer_cfg = saelens_trainer_config(20, N_TOKENS, lr=3e-3, feature_sampling_window=10)
        trainer = SAETrainer(cfg=trainer_cfg, sae=sae, data_provider=data)
        torch.manual_seed(1)
        return trainer.fit()  # type: ignore[return-value]

    base, other = run(1.0, 0.0), run(1e4, 1e6)
    for (parameter, a), b in zip(base.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(b[1], a, rtol=1e-5, atol=1e-6, msg=lambda m, p=parameter: p + m)


def test_geometric_median_of_known_points() -> None:
    """The corners of a square and its middle; a far point among many moves it little."""
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=_DOUBLE)
    torch.testing.assert_close(geometric_median(square), torch.zeros(2, dtype=_DOUBLE))
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1e6]], dtype=_DOUBLE)
    # On a line it is the median; a token nearer than a thousandth of the mean distance counts as
    # that far away, which leaves the iteration short of it by as much.
    crowd = torch.cat([torch.zeros(50, 1, dtype=_DOUBLE), line])
    assert abs(float(geometric_median(crowd))) < 1.0
    assert float(crowd.mean()) > 1e4


@pytest.mark.parametrize("seed", range(3))
def test_massive_tokens_move_neither_shift_nor_scale(seed: int) -> None:
    x = activations(512, D_IN, seed, _DOUBLE)
    shift, scale = estimate_units(x)
    with_massive = x.clone()
    with_massive[:5] = shift + 180 * (x[:5] - shift)
    moved, rescaled = estimate_units(with_massive)
    assert (moved - shift).norm() < 0.05 * scale * D_IN**0.5
    assert abs(rescaled / scale - 1) < 0.05
    # What the mean does on the same tokens.
    assert (with_massive.mean(0) - x.mean(0)).norm() > 0.1 * scale * D_IN**0.5


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(8, 3), torch.full((8, 3), 3.7), torch.randn(1, 3), 1e-12 * torch.randn(8, 3)],
    ids=["zeros", "constant", "one token", "tiny"],
)
def test_degenerate_batches_give_finite_units(batch: torch.Tensor) -> None:
    units = InputUnits(3, torch.float32, torch.device("cpu"))
    units.estimate(batch)
    assert torch.isfinite(units.shift).all()
    assert float(units.scale) > 0
    torch.testing.assert_close(units.restore(units(batch)), batch, rtol=1e-5, atol=1e-12)


def test_a_batch_that_is_not_finite_leaves_the_units() -> None:
    units = InputUnits(2, torch.float32, torch.device("cpu"))
    units.estimate(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    assert float(units.scale) == 1.0
    assert not bool(units.estimated)
    units.estimate(torch.tensor([[1.0, 2.0], [5.0, 5.0]]))
    before = copy.deepcopy(units.state_dict())
    units.estimate(torch.tensor([[7.0, 8.0], [9.0, 1.0]]))  # units are taken once
    for name, tensor in units.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_presets_bring_the_normalisation() -> None:
    for name in preset_names():
        cfg = preset(name, d_in=4, d_sae=8, k=2, training_steps=5)
        source = name.startswith("source-")
        assert cfg.input_normalization == ("none" if source else "first_batch"), name


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_units_fold_before_a_whitening(apply_b_dec: bool) -> None:
    """Whitened activations: the SAE that takes raw ones gives the same reconstructions."""
    sae, _ = trained(
        "default", 3.0, torch.ones(D_IN, dtype=_DOUBLE), apply_b_dec_to_input=apply_b_dec
    )
    sae.eval()
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(D_IN, D_IN, generator=generator, dtype=_DOUBLE)
    mean = torch.randn(D_IN, generator=generator, dtype=_DOUBLE)
    inverse = torch.linalg.inv(matrix)
    white = 3.0 * structured(300) + 1.0
    raw = white @ inverse + mean
    expected = sae(white) @ inverse + mean
    sae.fold_activation_whitening(mean, matrix, inverse)
    torch.testing.assert_close(sae(raw), expected, rtol=1e-6, atol=1e-6)
