"""[Z] Running statistics of the pre-activations, and the thresholds made of them."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Self, override

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms.base import Latents, Mechanism, Step
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.step_schedule import Number

_MIN_DEVIATION = 1e-6


class PreActivationStatistics(Mechanism):
    """EMA mean and variance of each latent's pre-activation over all tokens, and z.

    Updated in training only; in evaluation they are constants, so that `encode` is a function of
    one token. The source updated them inside `encode` at evaluation time.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    z: torch.Tensor

    def __init__(self, d_sae: int, z: float, device: torch.device) -> None:
        super().__init__()
        float32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.register_exact(
            mean=torch.zeros(d_sae, **float32),
            variance=torch.ones(d_sae, **float32),
            z=torch.full((), z, **float32),
        )

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        wanted = cfg.selection == "zscore" or cfg.standardise > 0
        return cls(cfg.d_sae, cfg.zscore_z, device) if wanted else None

    @override
    def on_pre_activations(self, hidden_pre: torch.Tensor, step: Step) -> None:
        self.update(hidden_pre, step.schedule.statistics_rate, step.sae.ranks)

    @override
    def scores(self, hidden_pre: torch.Tensor, cfg: MultiScaleTrainingSAEConfig) -> torch.Tensor:
        strength = 1.0 if cfg.selection == "zscore" else cfg.standardise
        return self.standardised(hidden_pre, strength)

    @override
    def threshold(self, threshold: torch.Tensor, cfg: MultiScaleTrainingSAEConfig) -> torch.Tensor:
        if cfg.selection == "zscore":
            return self.own_threshold().clamp(min=0)
        return self.threshold_of_score(threshold, cfg.standardise).clamp(min=0)

    @override
    def on_latents(self, latents: Latents, step: Step) -> None:
        cfg = step.cfg
        if cfg.selection == "zscore" and cfg.zscore_z_lr > 0:
            l0 = latents.fired.sum() / step.n_tokens
            self.follow_target(l0, float(step.schedule.k), cfg.zscore_z_lr)

    @override
    def metrics(self, cfg: MultiScaleTrainingSAEConfig, step: int) -> dict[str, Any]:
        return {"z": self.z.clone()} if cfg.selection == "zscore" else {}

    @torch.no_grad()
    def update(self, hidden_pre: torch.Tensor, rate: Number, ranks: Ranks = ALONE) -> None:
        """Fold in one batch (n_tokens, d_sae), in float32; rate 1 replaces what was there."""
        with torch.autocast(hidden_pre.device.type, enabled=False):
            variance, mean = ranks.var_mean(hidden_pre.float())
            shift = mean - self.mean
            # Variance of the mixture of the old and the new population, exact for any rate.
            self.variance.mul_(1 - rate).add_(rate * variance + rate * (1 - rate) * shift.pow(2))
            self.mean.add_(rate * shift)

    @torch.no_grad()
    def follow_target(self, l0: torch.Tensor, target_l0: float, rate: float) -> None:
        """Self-correction: raise z when more latents fire than wanted, lower it when fewer do.

        By `rate` per relative excess of L0, which is clipped at 1.
        """
        excess = ((l0.float() - target_l0) / target_l0).clamp(-1, 1)
        self.z.add_(rate * excess)

    def deviation(self) -> torch.Tensor:
        """(d_sae,) standard deviation, bounded below so that a constant latent can be divided."""
        return self.variance.sqrt().clamp(min=_MIN_DEVIATION)

    def own_threshold(self) -> torch.Tensor:
        """(d_sae,) float32: mean + z * std."""
        return self.mean + self.z * self.deviation()

    def standardised(self, hidden_pre: torch.Tensor, strength: float) -> torch.Tensor:
        """Scores for ranking: (pre - a mean) / std^a with a the strength in [0, 1]."""
        return (hidden_pre - strength * self.mean) / self.deviation().pow(strength)

    def threshold_of_score(self, score: torch.Tensor, strength: float) -> torch.Tensor:
        """(d_sae,) pre-activation of a score: the inverse of `standardised`."""
        return strength * self.mean + score * self.deviation().pow(strength)

    @override
    @torch.no_grad()
    def fold_scale(self, factor: float) -> None:
        self.mean.mul_(1 / factor)
        self.variance.mul_((1 / factor) ** 2)

    @override
    def extra_repr(self) -> str:
        return f"d_sae={self.mean.numel()}"
