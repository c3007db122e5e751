"""[Z] A floor under the firing rates: latents that hardly fire get a lower cut until they do.

BatchTopK ranks `pre + allowance`, and the exported threshold of a latent is the cut less its
allowance: a threshold per latent, which JumpReLU has anyway. The rule is the one that balances the
experts of a mixture without a loss term (arXiv 2408.15664): a step up while the rate is below the
floor, a step down while it is above.
"""

from __future__ import annotations

import torch
from typing_extensions import override

from msae_plugin.architecture.exact import KeepsFloat32


class FiringFloor(KeepsFloat32):
    """The allowance of each latent, in units of its pre-activation.

    Args:
        d_sae: Number of latents.
        device: Device of the buffer.
    """

    exact_tensor_names = ("allowance",)
    allowance: torch.Tensor

    def __init__(self, d_sae: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("allowance", torch.zeros(d_sae, dtype=torch.float32, device=device))

    @torch.no_grad()
    def follow(
        self, firing_rate: torch.Tensor, floor: float, cut: torch.Tensor, rate: float
    ) -> None:
        """Move every allowance one step.

        Args:
            firing_rate: (d_sae,) running share of tokens on which each latent fires.
            floor: Firing rate below which a latent is helped.
            cut: Zero-dimensional, the cut of this step; the unit of a step, and the most that a
                latent is allowed: its threshold is then zero.
            rate: Size of a step in units of the cut.
        """
        step = torch.where(firing_rate < floor, rate, -rate)
        self.allowance.add_(step * cut)
        self.allowance.copy_(torch.minimum(self.allowance.clamp(min=0), cut.clamp(min=0)))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the unit of the pre-activations by a factor."""
        self.allowance.mul_(factor)

    @override
    def extra_repr(self) -> str:
        return f"d_sae={self.allowance.numel()}"
