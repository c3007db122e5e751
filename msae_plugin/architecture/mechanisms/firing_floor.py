"""[Z] Bounds of the firing rates: thresholds of rare latents fall, those of dense ones rise.

Latents that hardly fire get a lower threshold until they do; latents that fire on more than a tenth
of the tokens get a higher one while they take too much of the L0 together.

BatchTopK ranks `pre + allowance`, and the exported threshold of a latent is the common one less its
allowance: a threshold per latent, which JumpReLU has anyway. The rule is the one that balances the
experts of a mixture without a loss term (arXiv 2408.15664): a step up while the rate is below the
floor, a step down while it is above.

Steps of a tenth of the threshold swing around the floor, because the rate is known by a running
mean. That helps while training: a rare latent is wide open for a few steps and gets gradients
(steps in proportion to the distance do not swing, and explained less variance). But an export in
the middle of a swing has latents that fire on nothing, so that calibration puts every allowance
where the latent fires at the floor (docs/results-choices.md, "How the first presets were chosen").

The limit is on the share of the L0 that all dense latents take together, not on the rate of each: a
ceiling of a tenth on every latent cost .014 of the explained variance on Gemma, whose few massive
directions want dense latents; the limit cost .002 and leaves the choice of latents to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from typing_extensions import Self, override

from msae_plugin.architecture.config import DENSE_RATE, MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms.base import Latents, Mechanism, Step
from msae_plugin.architecture.step_schedule import Number

# Equal tokens have equal pre-activations but for rounding, and rounding would decide on which side
# of a threshold between two of them they are: a layer norm makes tokens of one and the same feature
# equal, and 100 of them failed the check of an export. So the threshold lies clearly below.
_BELOW = 1 - 2**-10


class FiringFloor(Mechanism):
    """The allowance of each latent, in units of its pre-activation; negative for dense ones."""

    allowance: torch.Tensor

    def __init__(self, d_sae: int, device: torch.device) -> None:
        super().__init__()
        self.register_exact(allowance=torch.zeros(d_sae, dtype=torch.float32, device=device))

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        wanted = cfg.firing_floor > 0 or cfg.dense_share_limit < 1
        return cls(cfg.d_sae, device) if wanted else None

    @override
    def scores(self, hidden_pre: torch.Tensor, cfg: MultiScaleTrainingSAEConfig) -> torch.Tensor:
        return hidden_pre + self.allowance

    @override
    def threshold(self, threshold: torch.Tensor, cfg: MultiScaleTrainingSAEConfig) -> torch.Tensor:
        return (threshold - self.allowance).clamp(min=0)

    @override
    def on_latents(self, latents: Latents, step: Step) -> None:
        floor, rate = step.schedule.floor_rate, step.cfg.firing_floor_rate
        limit, dense_rate = step.cfg.dense_share_limit, step.cfg.dense_rate
        self.follow(step.sae.firing_rate, floor, latents.threshold, rate, limit, dense_rate)

    @override
    def recordable(self, cfg: MultiScaleTrainingSAEConfig) -> bool:
        return True

    @torch.no_grad()
    def follow(
        self,
        firing_rate: torch.Tensor,
        floor: Number,
        threshold: torch.Tensor,
        rate: float,
        dense_share_limit: float = 1.0,
        dense_rate: float = DENSE_RATE,
    ) -> None:
        """Move every allowance one step, by `rate` in units of the common threshold.

        Up below the floor, at most to the threshold itself, where that of the latent is zero; down
        for dense latents while their share of the L0 is above the limit; else towards zero.
        """
        dense = firing_rate > dense_rate
        too_dense = (firing_rate * dense).sum() > dense_share_limit * firing_rate.sum()
        step = rate * threshold.clamp(min=0)
        towards_zero = self.allowance.sign() * torch.minimum(self.allowance.abs(), step)
        change = torch.where(firing_rate < floor, step, -towards_zero)
        self.allowance.add_(torch.where(dense & too_dense, -step, change))
        torch.minimum(self.allowance, threshold.clamp(min=0), out=self.allowance)

    @torch.no_grad()
    def allow_down_to(self, threshold: torch.Tensor, common: float) -> None:
        """Give each latent its threshold (d_sae,), where it is below the common one.

        What raises the threshold of a dense latent stays.
        """
        lowered = (common - threshold).clamp(min=0, max=max(common, 0.0))
        self.allowance.copy_(torch.where(self.allowance < 0, self.allowance, lowered))

    @override
    @torch.no_grad()
    def fold_scale(self, factor: float) -> None:
        self.allowance.mul_(1 / factor)

    @override
    def extra_repr(self) -> str:
        return f"d_sae={self.allowance.numel()}"


@torch.no_grad()
def thresholds_at_rate(
    batches: Sequence[torch.Tensor],
    hidden_pre_of: Callable[[torch.Tensor], torch.Tensor],
    rate: float,
) -> torch.Tensor | None:
    """(d_sae,) what each latent's pre-activation exceeds on a share of the tokens, at least 0.

    None when the share is less than one token, which tells nothing.
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
