"""[G] Gradients and L1 weighted by how much each latent contributes.

The contribution of latent i is the running mean of |f_i| |d_i|, one reduction over the batch: no
loop over latents. Relative to its mean over the dictionary and raised to a power it multiplies the
gradients of that latent; the L1 penalty of the latent is divided by it, so that what contributes
most is suppressed least.
"""

from __future__ import annotations

import torch

from msae_plugin.architecture.float32_buffers import KeepsFloat32

# Beyond a hundredfold spread the rarest latents would stop learning altogether.
_MIN_FACTOR, _MAX_FACTOR = 0.1, 10.0


class FeatureImportance(KeepsFloat32):
    """Running contribution of every latent.

    Args:
        d_sae: Number of latents.
        device: Device of the buffer.
    """

    exact_tensor_names = ("contribution",)
    contribution: torch.Tensor

    def __init__(self, d_sae: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("contribution", torch.ones(d_sae, dtype=torch.float32, device=device))

    @torch.no_grad()
    def update(
        self, mean_activation: torch.Tensor, decoder_norm: torch.Tensor, rate: float
    ) -> None:
        """Fold one batch in.

        Args:
            mean_activation: (d_sae,) mean of |f_i| over the tokens of the batch.
            decoder_norm: (d_sae,) norm of the decoder row that f_i multiplies.
            rate: Weight of this batch.
        """
        self.contribution.lerp_(mean_activation.float() * decoder_norm.float(), rate)

    def factors(self, power: float) -> torch.Tensor:
        """(d_sae,) float32: relative contribution to the power, between 0.1 and 10."""
        relative = self.contribution / self.contribution.mean().clamp(min=1e-12)
        return relative.clamp(min=1e-12).pow(power).clamp(_MIN_FACTOR, _MAX_FACTOR)
