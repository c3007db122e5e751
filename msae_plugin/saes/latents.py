"""How an SAE spends its L0, and how its encoder and decoder agree."""

from __future__ import annotations

from typing import Any

import torch

from msae_plugin.architecture.config import DENSE_RATE

# Evenly sampled: their mean cosine has a standard error below .01. All of 16,384 latents of a
# model of width 2304 would take as long as a training step: one of two matrices is read against
# its memory order.
ALIGNED_LATENTS = 2048


def dense_share(firings: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Share of the L0 that dense latents take, zero-dimensional.

    `firings` (d_sae,) says how many of the tokens each latent fired on.
    """
    dense = firings > DENSE_RATE * n_tokens
    return (firings * dense).sum() / firings.sum().clamp(min=1)


@torch.no_grad()
def encoder_decoder_alignment(sae: torch.nn.Module, live: torch.Tensor) -> float | None:
    """Mean cosine of a latent's encoder and decoder direction over the live latents.

    `live` is (d_sae,) bool. None for an SAE without W_enc (d_in, d_sae) and W_dec (d_sae, d_in).
    """
    W_enc: Any = getattr(sae, "W_enc", None)
    W_dec: Any = getattr(sae, "W_dec", None)
    if not (isinstance(W_enc, torch.Tensor) and isinstance(W_dec, torch.Tensor)) or not live.any():
        return None
    latents = live.to(W_enc.device).nonzero().squeeze(1)
    latents = latents[:: -(-len(latents) // ALIGNED_LATENTS)]
    return float(torch.cosine_similarity(W_enc[:, latents], W_dec[latents].T, dim=0).mean())
