"""Training steps as SAELens' trainer takes them, and data to take them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from msae_plugin import MultiScaleTrainingSAE, MultiScaleTrainingSAEConfig
from msae_plugin.architecture.config import mechanisms_off

# Every mechanism that depends on running statistics of the latents or of the decoder, at once.
EVERYTHING: dict[str, Any] = {
    "sparsity_scales": [0.5, 2.0],
    "prefix_fractions": [0.25, 0.5],
    "prefix_sort_every": 2,
    "standardise": 0.5,
    "firing_floor": 0.0,
    "dense_share_limit": 1.0,
    "orthogonality_coefficient": 0.5,
    "sketch_rank": 4,
    "neighbour_count": 3,
    "neighbour_refresh_every": 2,
    "importance_power": 0.5,
    "l1_coefficient": 0.1,
    "norm_scales": [0.1, 1.0, 2.0],
    "norm_eps": 0.1,
    "norm_eps_mode": "relative",
    "norm_gate": True,
    "norm_attention": True,
    "revival_every": 4,
    "revival_dead_steps": 3,
}


def plain(**fields: Any) -> dict[str, Any]:
    """Fields of a configuration with every mechanism off but those given.

    A penalty is the weighted one over neighbours unless the fields say otherwise.
    """
    weighted = {"orthogonality_pairs": "neighbours", "orthogonality_weighting": "coactivation"}
    return {**mechanisms_off(), **weighted, "d_in": 6, "d_sae": 13, "k": 3, **fields}


def make(seed: int = 0, **fields: Any) -> MultiScaleTrainingSAE:
    """A training SAE with the given fields on top of the package's defaults."""
    torch.manual_seed(seed)
    return MultiScaleTrainingSAE(MultiScaleTrainingSAEConfig(**fields))


@torch.no_grad()
def to_export_units(sae: MultiScaleTrainingSAE, feature_acts: torch.Tensor) -> torch.Tensor:
    """Latents (..., d_sae) of an SAE in the order and units of its export (unit decoder)."""
    if not sae.cfg.rescale_acts_by_decoder_norm:
        feature_acts = feature_acts * sae.get_W_dec_norm()
    return feature_acts[..., sae.export_order()]


def activations(n_tokens: int, d_in: int, seed: int, dtype: torch.dtype = torch.float32):
    """Activations with structure: sparse sums of fixed directions, off-centre, norms that vary."""
    directions = torch.randn(3 * d_in, d_in, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n_tokens, 3 * d_in, generator=generator)
    codes = codes * (torch.rand(n_tokens, 3 * d_in, generator=generator) < 0.2)
    noise = 0.1 * torch.randn(n_tokens, d_in, generator=generator)
    norms = torch.exp(0.3 * torch.randn(n_tokens, 1, generator=generator))
    return ((codes @ directions + noise) * norms + 0.5).to(dtype)


def step_input(
    x: torch.Tensor, step: int, dead: torch.Tensor | None = None, l1: float = 0.0
) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={"l1": l1} if l1 else {},
        dead_neuron_mask=dead,
        n_training_steps=step,
        is_logging_step=step % 5 == 0,
    )


def train(
    sae: TrainingSAE[Any],
    n_steps: int,
    *,
    n_tokens: int = 64,
    lr: float = 3e-3,
    dead: Callable[[int], torch.Tensor | None] = lambda step: None,
    batch: Callable[[int], torch.Tensor] | None = None,
    first_step: int = 0,
    l1: float = 0.0,
    autocast: bool = False,
) -> list[TrainStepOutput]:
    """Adam with SAELens' gradient clipping; returns the output of every step."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    if isinstance(sae, MultiScaleTrainingSAE):
        sae.attach_optimizer(optimizer)
    outputs: list[TrainStepOutput] = []
    for step in range(first_step, first_step + n_steps):
        sae.train()
        x = batch(step) if batch else activations(n_tokens, sae.cfg.d_in, step, sae.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = sae.training_forward_pass(step_input(x, step, dead(step), l1))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(output)
    return outputs


def saelens_trainer_config(n_steps: int, n_tokens: int = 64, **fields: Any) -> SAETrainerConfig:
    """A constant rate for so many steps, without checkpoints."""
    values: dict[str, Any] = {
        "n_checkpoints": 0, "checkpoint_path": None, "save_final_checkpoint": False,
        "device": "cpu", "autocast": False, "lr_scheduler_name": "constant", "lr_warm_up_steps": 0,
        "lr_decay_steps": 0, "n_restart_cycles": 1, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "dead_feature_window": 10, "feature_sampling_window": 100,
        "logger": LoggingConfig(log_to_wandb=False), **fields,
    }  # fmt: skip
    return SAETrainerConfig(
        total_training_samples=n_tokens * n_steps,
        train_batch_size_samples=n_tokens,
        lr_end=values["lr"],
        **values,
    )
