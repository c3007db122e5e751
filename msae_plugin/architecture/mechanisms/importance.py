"""[G] Gradients and L1 weighted by how much each latent contributes.

The contribution of latent i is the running mean of |f_i| |d_i|, one reduction over the batch: no
loop over latents. Relative to its mean over the dictionary and raised to a power it multiplies the
gradients of that latent; the L1 penalty of the latent is divided by it, so that what contributes
most is suppressed least.
"""

from __future__ import annotations

import torch
from typing_extensions import Self, override

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms.base import Latents, Mechanism, Step
from msae_plugin.architecture.step_schedule import Number

# Beyond a hundredfold spread the rarest latents would stop learning altogether.
_MIN_FACTOR, _MAX_FACTOR = 0.1, 10.0


class FeatureImportance(Mechanism):
    """Running contribution of every latent."""

    contribution: torch.Tensor

    def __init__(self, d_sae: int, device: torch.device) -> None:
        super().__init__()
        self.register_exact(contribution=torch.ones(d_sae, dtype=torch.float32, device=device))

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        return cls(cfg.d_sae, device) if cfg.importance_power > 0 else None

    @override
    def on_latents(self, latents: Latents, step: Step) -> None:
        W_dec, feature_acts = step.sae.W_dec, latents.feature_acts
        norm = torch.ones_like(W_dec[:, 0])
        if not step.cfg.rescale_acts_by_decoder_norm:
            norm = W_dec.norm(dim=-1)
        total = torch.linalg.vector_norm(feature_acts, ord=1, dim=0)
        mean_activation = step.sae.ranks.mean(total / feature_acts.shape[0])
        self.update(mean_activation, norm, step.schedule.statistics_rate)

    @torch.no_grad()
    def update(
        self, mean_activation: torch.Tensor, decoder_norm: torch.Tensor, rate: Number
    ) -> None:
        """Fold in one batch: (d_sae,) means of |f_i| and the decoder norms that they multiply."""
        self.contribution.lerp_(mean_activation.float() * decoder_norm.float(), rate)

    def factors(self, power: float) -> torch.Tensor:
        """(d_sae,) float32: relative contribution to the power, between 0.1 and 10."""
        relative = self.contribution / self.contribution.mean().clamp(min=1e-12)
        return relative.clamp(min=1e-12).pow(power).clamp(_MIN_FACTOR, _MAX_FACTOR)
