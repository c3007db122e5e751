"""[Z] Running statistics of the pre-activations, and the thresholds made of them."""

from __future__ import annotations

import torch
from typing_extensions import override

from msae_plugin.architecture.float32_buffers import KeepsFloat32
from msae_plugin.architecture.ranks import ALONE, Ranks

_MIN_DEVIATION = 1e-6


class PreActivationStatistics(KeepsFloat32):
    """EMA mean and variance of each latent's pre-activation over all tokens, and z.

    Updated in training only; in evaluation they are constants, so that `encode` is a function of
    one token. The source updated them inside `encode` at evaluation time.

    Args:
        d_sae: Number of latents.
        z: Initial z.
        device: Device of the buffers.
    """

    exact_tensor_names = ("mean", "variance", "z")
    mean: torch.Tensor
    variance: torch.Tensor
    z: torch.Tensor

    def __init__(self, d_sae: int, z: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d_sae, dtype=torch.float32, device=device))
        self.register_buffer("variance", torch.ones(d_sae, dtype=torch.float32, device=device))
        self.register_buffer("z", torch.full((), z, dtype=torch.float32, device=device))

    @torch.no_grad()
    def update(self, hidden_pre: torch.Tensor, rate: float, ranks: Ranks = ALONE) -> None:
        """Fold one batch into the running mean and variance.

        Args:
            hidden_pre: (n_tokens, d_sae) pre-activations, any dtype; reduced in float32.
            rate: Weight of this batch; 1 replaces what was there.
            ranks: The processes that share the batch.
        """
        with torch.autocast(hidden_pre.device.type, enabled=False):
            variance, mean = ranks.var_mean(hidden_pre.float())
            shift = mean - self.mean
            # Variance of the mixture of the old and the new population, exact for any rate.
            self.variance.mul_(1 - rate).add_(rate * variance + rate * (1 - rate) * shift.pow(2))
            self.mean.add_(rate * shift)

    @torch.no_grad()
    def follow_target(self, l0: torch.Tensor, target_l0: float, rate: float) -> None:
        """Self-correction: raise z when more latents fire than wanted, lower it when fewer do.

        Args:
            l0: Zero-dimensional, mean number of active latents per token of the batch.
            target_l0: The L0 to reach.
            rate: Step of z per relative excess of L0; excess is clipped at 1.
        """
        excess = ((l0.float() - target_l0) / target_l0).clamp(-1, 1)
        self.z.add_(rate * excess)

    def deviation(self) -> torch.Tensor:
        """(d_sae,) standard deviation, bounded below so that a constant latent can be divided."""
        return self.variance.sqrt().clamp(min=_MIN_DEVIATION)

    def threshold(self) -> torch.Tensor:
        """(d_sae,) float32: mean + z * std."""
        return self.mean + self.z * self.deviation()

    def standardised(self, hidden_pre: torch.Tensor, strength: float) -> torch.Tensor:
        """Scores for ranking: (pre - a mean) / std^a with a the strength in [0, 1].

        Args:
            hidden_pre: (n_tokens, d_sae) pre-activations.
            strength: 0 returns them unchanged, 1 standardises fully.

        Returns:
            (n_tokens, d_sae) scores.
        """
        return (hidden_pre - strength * self.mean) / self.deviation().pow(strength)

    def threshold_of_score(self, cut: torch.Tensor, strength: float) -> torch.Tensor:
        """(d_sae,) pre-activation whose score is a cut: the inverse of `standardised`."""
        return strength * self.mean + cut * self.deviation().pow(strength)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the unit of the pre-activations by a factor."""
        self.mean.mul_(factor)
        self.variance.mul_(factor**2)

    @override
    def extra_repr(self) -> str:
        return f"d_sae={self.mean.numel()}"
