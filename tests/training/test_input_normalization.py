"""Our trainer gives SAELens' own architectures the help that multiscale brings by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE

from msae_plugin.architecture.input_units import estimate_units
from msae_plugin.common.errors import InputError
from msae_plugin.training.plans import plan_saes
from msae_plugin.training.step_trainer import StepOptions
from msae_plugin.training.trainer import LockstepTrainer

D_IN, D_SAE, BATCH, STEPS = 12, 24, 64, 12
FIELDS: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": 4},
    "topk": {"k": 4},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [8, 24]},
    "standard": {"l1_coefficient": 0.3},
    "gated": {"l1_coefficient": 0.1},
    "jumprelu": {"l0_coefficient": 0.01},
}


def batches(scale: float, shift: float) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64)
    tokens = torch.randn(STEPS * BATCH, D_IN, generator=generator, dtype=torch.float64) @ mixing
    return [{"h": scale * part + shift} for part in tokens.split(BATCH)]


def train(
    architecture: str, scale: float, shift: float, checkpoint: Path | None = None
) -> TrainingSAE[Any]:
    sae_class, config_class = get_sae_training_class(architecture)
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, dtype="float64", **FIELDS[architecture]))
    config = SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=3e-3,
        lr_end=3e-3, dead_feature_window=100, feature_sampling_window=100,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = LockstepTrainer(
        config,
        {"a": sae},
        {"a": "h"},
        iter(batches(scale, shift)),
        options=StepOptions(centres_inputs=True),
    )
    trainer.fit()
    if checkpoint is not None:
        trainer.write_checkpoint(checkpoint)
        scaler = trainer.step_trainers["a"].activation_scaler
        before = vars(scaler).copy()
        scaler.scaling_factor, scaler.centre = None, None  # type: ignore[attr-defined]
        trainer.load_checkpoint(checkpoint)
        assert scaler.scaling_factor == before["scaling_factor"]
        assert torch.equal(scaler.centre, before["centre"])  # type: ignore[attr-defined]
    trainer.fold_scaling()
    return sae


@pytest.mark.parametrize("architecture", sorted(FIELDS))
def test_training_does_not_see_scale_and_shift(architecture: str) -> None:
    """Folded weights differ by the unit alone: latents scale with it, reconstructions follow."""
    base, other = train(architecture, 1.0, 0.0).eval(), train(architecture, 1e3, -5e4).eval()
    x = batches(1.0, 0.0)[0]["h"]
    with torch.no_grad():
        expected, found = base.encode(x), other.encode(1e3 * x - 5e4)
        assert torch.equal(found > 0, expected > 0)
        assert (expected > 0).any()
        torch.testing.assert_close(other(1e3 * x - 5e4), 1e3 * base(x) - 5e4, rtol=1e-6, atol=1e-2)


def test_the_folded_sae_is_the_trained_one(tmp_path: Path) -> None:
    """What training computes on centred and scaled activations, the export does on raw ones."""
    sae = train("topk", 50.0, 300.0, tmp_path / "checkpoint").eval()
    sae.save_inference_model(tmp_path / "sae")
    x = batches(50.0, 300.0)[1]["h"]
    exported = SAE.load_from_disk(tmp_path / "sae")
    torch.testing.assert_close(exported(x), sae(x), rtol=1e-9, atol=1e-9)
    shift, scale = estimate_units(batches(50.0, 300.0)[0]["h"])
    assert (sae.b_dec - shift).norm() < scale * D_IN**0.5


def plan(**fields: Any) -> Any:
    section = {"architecture": "batchtopk", "d_sae": 8, "k": 2, **fields}
    hook = "blocks.0.hook_resid_post"
    return plan_saes({"b": section}, [hook], d_model=4, training_steps=10)[0]


def test_the_recipe_key_is_the_trainers() -> None:
    assert plan(input_normalization="first_batch").centres_inputs
    assert not plan(input_normalization="none").centres_inputs
    assert not plan().centres_inputs
    with pytest.raises(InputError, match=r"input_normalization.*first_batch"):
        plan(input_normalization="mean")
    with pytest.raises(InputError, match="leave one out"):
        plan(input_normalization="first_batch", normalize_activations="expected_average_only_in")
    with pytest.raises(InputError, match="apply_b_dec_to_input"):
        plan(input_normalization="first_batch", apply_b_dec_to_input=False)
