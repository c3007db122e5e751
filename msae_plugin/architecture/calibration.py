"""The cut of a finished BatchTopK SAE, set so that it activates k latents per token.

SAELens exports BatchTopK with a running mean of the smallest active latent of each batch. At its
default rate of .01 that mean lags: 160 latents instead of 32 after 150 steps were measured. Both
SAEs of a comparison get their cut from the same kind of batches, so they stand at the same L0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE

from msae_plugin.architecture.capabilities import SupportsCalibration


def needs_calibration(sae: TrainingSAE[Any]) -> bool:
    """Whether the architecture has a cut of its own: topk, standard, gated, jumprelu have none."""
    return isinstance(sae, (SupportsCalibration, BatchTopKTrainingSAE))


def calibrate(sae: TrainingSAE[Any], batches: Sequence[torch.Tensor]) -> dict[str, float]:
    """Set the inference cut of an SAE that has one.

    Args:
        sae: A trained SAE for which `needs_calibration` holds, its activation scaling not yet
            folded in.
        batches: Activations, each (tokens, d_in), scaled as training batches are.

    Returns:
        `l0_before`, `l0_after` (active latents per token on these batches) and `threshold`.

    Raises:
        TypeError: If the architecture has no cut.
    """
    was_training = sae.training
    sae.eval()
    try:
        if isinstance(sae, SupportsCalibration):
            return {key: float(value) for key, value in sae.calibrate_threshold(batches).items()}
        if isinstance(sae, BatchTopKTrainingSAE):
            return calibrate_batchtopk(sae, batches)
        raise TypeError(f"{type(sae).__name__} has no cut to calibrate")
    finally:
        sae.train(was_training)


@torch.no_grad()
def calibrate_batchtopk(
    sae: BatchTopKTrainingSAE, batches: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Set `topk_threshold` of SAELens' batchtopk or matryoshka_batchtopk so that mean L0 is k.

    The threshold is put between the (k * tokens)-th and the next largest positive pre-activation
    of all batches together, exactly: the largest values of a union are among the largest of each
    part, so only that many are ever kept.

    Args:
        sae: The SAE; its `topk_threshold` is changed.
        batches: Activations, each (tokens, d_in), scaled as training batches are.

    Returns:
        `l0_before`, `l0_after` and `threshold`.
    """
    n_tokens = sum(len(batch) for batch in batches)
    wanted = round(sae.cfg.k * n_tokens)
    l0_before = _mean_l0(sae, batches, float(sae.topk_threshold))
    largest = torch.empty(0, device=sae.device)
    for batch in batches:
        values = sae.encode_with_hidden_pre(batch)[1].float().flatten()
        # Once the pool is full, only values above its smallest can matter.
        floor = largest.min() if len(largest) > wanted else values.new_zeros(())
        largest = torch.cat([largest, values[values > floor]])
        if len(largest) > wanted + 1:
            largest = torch.topk(largest, wanted + 1, sorted=False).values
    threshold = 0.0
    if len(largest) > wanted:
        lowest_two = torch.topk(largest, min(2, len(largest)), largest=False).values.tolist()
        threshold = sum(lowest_two) / len(lowest_two)
    sae.topk_threshold.fill_(threshold)
    return {
        "l0_before": l0_before,
        "l0_after": _mean_l0(sae, batches, threshold),
        "threshold": threshold,
    }


def _mean_l0(sae: BatchTopKTrainingSAE, batches: Sequence[torch.Tensor], threshold: float) -> float:
    """Active latents per token as the exported JumpReLU counts them."""
    active = 0
    for batch in batches:
        hidden_pre = sae.encode_with_hidden_pre(batch)[1]
        active += int(((hidden_pre > threshold) & (hidden_pre > 0)).sum())
    return active / sum(len(batch) for batch in batches)
