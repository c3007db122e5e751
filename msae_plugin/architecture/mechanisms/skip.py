"""The skip connection of the source's run 4: in `forward` only, `decode` stays linear."""

from __future__ import annotations

import torch


def with_skip(
    sae_out: torch.Tensor, x: torch.Tensor, b_dec: torch.Tensor, skip_scale: float
) -> torch.Tensor:
    """sae_out + skip_scale (x - b_dec), all (..., d_in)."""
    return sae_out + skip_scale * (x.to(sae_out.dtype) - b_dec)
