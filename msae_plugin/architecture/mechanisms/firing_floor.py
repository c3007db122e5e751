"""[Z] A floor under the firing rates: latents that hardly fire get a lower cut until they do.

BatchTopK ranks `pre + allowance`, and the exported threshold of a latent is the cut less its
allowance: a threshold per latent, which JumpReLU has anyway. The rule is the one that balances the
experts of a mixture without a loss term (arXiv 2408.15664): a step up while the rate is below the
floor, a step down while it is above.

Steps of a tenth of the cut swing around the floor, because the rate is known by a running mean.
That helps while training: a rare latent is wide open for a few steps and gets gradients (steps in
proportion to the distance do not swing, and explained less variance). But an export in the middle
of a swing has latents that fire on nothing, so that calibration puts every allowance where the
latent fires at the floor (docs/results.md, "How the presets were chosen").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from typing_extensions import override

from msae_plugin.architecture.float32_buffers import KeepsFloat32
from msae_plugin.architecture.step_schedule import Number

# Equal tokens have equal pre-activations but for rounding, and rounding would decide on which side
# of a threshold between two of them they are: a layer norm makes tokens of one and the same feature
# equal, and 100 of them failed the check of an export. So the threshold lies clearly below.
_BELOW = 1 - 2**-10


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
        self, firing_rate: torch.Tensor, floor: Number, cut: torch.Tensor, rate: float
    ) -> None:
        """Move every allowance one step.

        Args:
            firing_rate: (d_sae,) running share of tokens on which each latent fires.
            floor: Firing rate below which a latent is helped.
            cut: Zero-dimensional, the cut of this step; the unit of a step, and the most that a
                latent is allowed: its threshold is then zero.
            rate: Size of a step in units of the cut.
        """
        step = (firing_rate < floor) * (2 * rate) - rate
        self.allowance.addcmul_(step, cut).clamp_(min=0)
        torch.minimum(self.allowance, cut.clamp(min=0), out=self.allowance)

    @torch.no_grad()
    def allow_down_to(self, threshold: torch.Tensor, cut: float) -> None:
        """Give each latent the threshold `threshold` where that is below the cut.

        Args:
            threshold: (d_sae,) not negative.
            cut: The common cut.
        """
        self.allowance.copy_((cut - threshold).clamp(min=0, max=max(cut, 0.0)))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the unit of the pre-activations by a factor."""
        self.allowance.mul_(factor)

    @override
    def extra_repr(self) -> str:
        return f"d_sae={self.allowance.numel()}"


@torch.no_grad()
def thresholds_at_rate(
    batches: Sequence[torch.Tensor],
    hidden_pre_of: Callable[[torch.Tensor], torch.Tensor],
    rate: float,
) -> torch.Tensor | None:
    """What each latent's pre-activation exceeds on at least a share of the tokens; not negative.

    Args:
        batches: Activation batches, each (n_tokens, d_in).
        hidden_pre_of: Maps a batch to its pre-activations (n_tokens, d_sae).
        rate: The share.

    Returns:
        (d_sae,) float32; None when the share is less than one token, which tells nothing.
    """
    n_above = int(rate * sum(batch.shape[0] for batch in batches))
    if n_above == 0:
        return None
    highest: torch.Tensor | None = None
    for batch in batches:
        hidden_pre = hidden_pre_of(batch).float()
        known = hidden_pre if highest is None else torch.cat([highest, hidden_pre])
        highest = known.topk(min(n_above, known.shape[0]), dim=0).values
    assert highest is not None, "there are tokens"
    return (highest[-1] * _BELOW).clamp(min=0)
