"""The unit in which an SAE is trained: activations centred and scaled by the first batch.

    z = (x - shift) / scale

`shift` is the geometric median of the first training batch and `scale` the median distance from it,
per root of d_in, so that a coordinate of z is of order one. Training then never sees the unit or
the mean of the activations: a * x + c gives the same z. Without it the first steps go into b_dec,
at Adam's pace whatever the mean's size, and latents die meanwhile (docs/results-choices.md).
Medians, because a few massive tokens move neither.

Both are constants of the run and fold into `W_enc`, `b_enc`, `b_dec` and the threshold at export.
"""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from msae_plugin.architecture.float32_buffers import KeepsFloat32
from msae_plugin.architecture.ranks import ALONE, Ranks

# Weiszfeld's iteration gains about a digit in five steps on residual streams; from 32 on the
# result no longer changes in float32.
_MEDIAN_ITERATIONS = 32
# A token closer to the median than this share of the mean distance counts as this far away.
_NEAREST = 1e-3


@torch.no_grad()
def geometric_median(points: torch.Tensor) -> torch.Tensor:
    """The point with the least sum of distances to all points (n, d), by Weiszfeld's iteration.

    Equivariant under a * x + c: it starts at the mean and counts in its own unit.
    """
    mean = points.mean(dim=0)
    centred = points - mean
    unit = centred.abs().max()
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    centred = centred / unit
    median = torch.zeros_like(mean)
    for _ in range(_MEDIAN_ITERATIONS):
        distances = (centred - median).norm(dim=1)
        smallest = (_NEAREST * distances.mean()).clamp(min=1e-30)
        weights = 1 / torch.maximum(distances, smallest)
        median = (weights / weights.sum()) @ centred
    return mean + unit * median


@torch.no_grad()
def estimate_units(activations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift (d_in,), the geometric median, and scale of a batch.

    The scale is the median distance from it over sqrt(d_in), 1 where all tokens are equal.
    """
    points = activations.to(torch.promote_types(activations.dtype, torch.float32))
    shift = geometric_median(points)
    scale = (points - shift).norm(dim=1).median() / math.sqrt(points.shape[1])
    return shift, torch.where(scale > 0, scale, torch.ones_like(scale))


class InputUnits(KeepsFloat32):
    """The map from activations to the unit in which the SAE is trained, and back.

    The identity until `estimate` has seen a batch. Without `scales` the scale stays 1, for an SAE
    that divides each token by its own norm.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    estimated: torch.Tensor

    def __init__(
        self, d_in: int, dtype: torch.dtype, device: torch.device, *, scales: bool = True
    ) -> None:
        super().__init__()
        self._scales = scales
        dtype = torch.promote_types(dtype, torch.float32)
        self.register_exact(
            shift=torch.zeros(d_in, dtype=dtype, device=device),
            scale=torch.ones((), dtype=dtype, device=device),
            estimated=torch.zeros((), dtype=torch.int64, device=device),
        )

    @torch.no_grad()
    def estimate(self, activations: torch.Tensor, ranks: Ranks = ALONE) -> None:
        """Take shift and scale from a batch, once; a batch that is not finite leaves them."""
        if bool(self.estimated):
            return
        shift, scale = estimate_units(ranks.concatenated(activations)[0])
        if not bool(torch.isfinite(shift).all() & torch.isfinite(scale)):
            return
        self.shift.copy_(shift)
        if self._scales:
            self.scale.copy_(scale)
        self.estimated.fill_(1)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) activations -> (..., d_in) in the training unit, at least float32."""
        return (x - self.shift) / self.scale

    def restore(self, z: torch.Tensor) -> torch.Tensor:
        """(..., d_in) in the training unit -> (..., d_in) activations."""
        return z * self.scale + self.shift

    @torch.no_grad()
    def rescale_inputs(self, factor: float) -> None:
        """Take inputs x instead of `factor` * x, to the same z."""
        self.shift.div_(factor)
        if self._scales:
            self.scale.div_(factor)

    def identity(self) -> dict[str, torch.Tensor]:
        """State dict of a module that will leave activations as they are."""
        device = self.shift.device
        return {
            "shift": torch.zeros_like(self.shift, device=device),
            "scale": torch.ones_like(self.scale, device=device),
            "estimated": torch.ones((), dtype=torch.int64, device=device),
        }

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the identity, once the units are folded into weights."""
        self.shift.zero_()
        self.scale.fill_(1.0)
