"""[E] Encoder and decoder of a latent agree: <e_i, d_i> = 1 before every step (arXiv 2605.18629).

A latent then reads its own contribution once: a token that is d_i times a has the pre-activation a.
The encoder takes the smallest change that gives the product, along its decoder direction.
"""

from __future__ import annotations

import torch
from typing_extensions import Self, override

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms.base import Mechanism, Step


class AlignedEncoder(Mechanism):
    """Projects the encoder; nothing is followed."""

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        del device
        return cls() if cfg.aligned_encoder else None

    @override
    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        W_enc, W_dec = step.sae.W_enc, step.sae.W_dec
        product = (W_enc.T * W_dec).sum(dim=-1)
        missing = (1 - product) / W_dec.pow(2).sum(dim=-1).clamp(min=1e-12)
        W_enc.addcmul_(W_dec.T, missing)

    @override
    def recordable(self, cfg: MultiScaleTrainingSAEConfig) -> bool:
        return True
