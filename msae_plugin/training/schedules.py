"""Optimisers and learning-rate rules on top of SAELens' schedule.

SAELens' schedules multiply the optimiser's current rate step by step, so the rules here never
write into it: they give the rate of one step from the scheduled one.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from msae_plugin.common.recipes import RECIPE, Flag, Number, Positive


@dataclass(config=RECIPE)
class GradientRateConfig:
    """The rate falls when gradients are large (run 3 of the source).

    Let g be the gradient norm before clipping, e its running mean, and m a multiplier that starts
    at 1. At each step: m <- m * factor if g > threshold * e, otherwise
    m <- min(m * recovery, 1); m is kept from falling below floor / scheduled rate; the step is
    taken with m * scheduled rate; then e <- ema_decay * e + (1 - ema_decay) * g. A large gradient
    is thus judged against the gradients before it.
    """

    enabled: Flag = False
    """Off by default."""
    threshold: Positive = 2.0
    """A gradient norm above this multiple of its running mean is large."""
    factor: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """What a large gradient multiplies the rate by."""
    recovery: Annotated[Number, Field(ge=1)] = 1.01
    """What every other step multiplies it by, up to the scheduled rate. At the default a halved
    rate is back after 70 steps."""
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = 0.99
    """Memory of the running mean."""
    floor: Positive = 1e-5
    """The rule alone never brings the rate below this; the source's 1e-5."""


class LearningRateRule:
    """Gives the learning rate of each step; one per SAE.

    `lr_floor` holds once the warm-up, which starts near zero, is over.
    """

    def __init__(
        self, gradient: GradientRateConfig, *, lr_floor: float = 0.0, warm_up_steps: int = 0
    ) -> None:
        self._gradient = gradient
        self._lr_floor = lr_floor
        self._warm_up_steps = warm_up_steps
        self.multiplier = 1.0
        self.mean_gradient_norm: float | None = None

    def rate(self, scheduled: float, gradient_norm: float, step: int) -> float:
        """The rate after so many steps, from the norm of all gradients before clipping.

        Call it once per step.
        """
        rate = self._gradient_driven(scheduled, gradient_norm)
        return max(rate, self._lr_floor) if step >= self._warm_up_steps else rate

    def _gradient_driven(self, scheduled: float, gradient_norm: float) -> float:
        rule = self._gradient
        if not rule.enabled:
            return scheduled
        if self.mean_gradient_norm is None:
            self.mean_gradient_norm = gradient_norm
        elif gradient_norm > rule.threshold * self.mean_gradient_norm:
            self.multiplier *= rule.factor
        else:
            self.multiplier = min(self.multiplier * rule.recovery, 1.0)
        self.mean_gradient_norm = (
            rule.ema_decay * self.mean_gradient_norm + (1 - rule.ema_decay) * gradient_norm
        )
        # Below the floor a fall of the multiplier changes nothing but the time to recover.
        if scheduled > 0:
            self.multiplier = min(max(self.multiplier, rule.floor / scheduled), 1.0)
        return self.multiplier * scheduled

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return {"multiplier": self.multiplier, "mean_gradient_norm": self.mean_gradient_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.multiplier = float(state["multiplier"])
        mean = state["mean_gradient_norm"]
        self.mean_gradient_norm = None if mean is None else float(mean)


DECAYED_PARAMETERS = frozenset({"W_enc", "W_dec"})
"""Weight decay shrinks the two dictionaries only: biases, thresholds and gains have no reason to
be near zero."""


def build_optimiser(
    sae: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Adam over all parameters, or AdamW (decoupled decay, arXiv 1711.05101) on the dictionaries.

    A decay of 0 gives exactly the optimiser of SAELens' trainer.
    """
    if weight_decay == 0:
        return torch.optim.Adam(sae.parameters(), lr=lr, betas=betas)
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in sae.named_parameters():
        (decayed if name.split(".")[-1] in DECAYED_PARAMETERS else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)
