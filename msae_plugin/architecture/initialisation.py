"""Initial weights of the source's run 2."""

from __future__ import annotations

import math

import torch


@torch.no_grad()
def initialise_inverse_sqrt_d(
    W_enc: torch.Tensor, W_dec: torch.Tensor, decoder_init_norm: float | None
) -> None:
    """Normal decoder with standard deviation 1/sqrt(d_in), encoder its transpose, in place.

    Args:
        W_enc: (d_in, d_sae).
        W_dec: (d_sae, d_in).
        decoder_init_norm: Norm given to each row afterwards; None keeps norms near 1.
    """
    if W_dec.is_meta:
        return  # a checkpoint's weights will be assigned
    W_dec.normal_(std=1 / math.sqrt(W_dec.shape[1]))
    if decoder_init_norm is not None:
        W_dec.mul_(decoder_init_norm / W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    W_enc.copy_(W_dec.T)
