"""The exported SAE: JumpReLU, after the input normalisation when there is one."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from torch import nn
from typing_extensions import override

from msae_plugin.architecture.config import MultiScaleSAEConfig
from msae_plugin.architecture.float32_buffers import (
    KeepsFloat32,
    add_remainders,
    exact_dtypes,
    restore_exact,
)
from msae_plugin.architecture.latent_decoding import decode_latents
from msae_plugin.architecture.mechanisms.normalisation import MultiScaleNormalisation
from msae_plugin.architecture.mechanisms.skip import with_skip


class MultiScaleSAE(KeepsFloat32, JumpReLUSAE):
    """Multi-scale SAE for inference.

    `encode` is a deterministic function of one token; `decode` is exactly f @ W_dec + b_dec, as
    often as one likes. Without normalisation and skip it is SAELens' JumpReLUSAE.

    Args:
        cfg: Configuration.
        use_error_term: As in SAELens.
    """

    cfg: MultiScaleSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    exact_tensor_names = ("threshold",)
    normalisation: MultiScaleNormalisation | None

    def __init__(self, cfg: MultiScaleSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.threshold = nn.Parameter(
            torch.zeros(self.cfg.d_sae, dtype=torch.float32, device=self.device)
        )
        self.normalisation = None
        if self.cfg.norm_scales:
            self.normalisation = MultiScaleNormalisation(self.cfg, self.dtype, self.device)

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents of tokens.

        Args:
            x: (..., d_in) activations.

        Returns:
            (..., d_sae), not negative.
        """
        if self.normalisation is None:
            return super().encode(x)
        x_hat, token_scale = self.normalisation(self.process_sae_in(x))
        hidden_pre = self.hook_sae_acts_pre(x_hat @ self.W_enc + self.b_enc)
        active = hidden_pre > self.threshold
        return self.hook_sae_acts_post(hidden_pre.relu() * active * token_scale)

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Exactly f @ W_dec + b_dec, for any latents.

        Args:
            feature_acts: (..., d_sae).

        Returns:
            (..., d_in).
        """
        sae_out = self.hook_sae_recons(decode_latents(feature_acts, self.W_dec) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction, plus the skip connection when on.

        With SAELens' error term the output is the input whatever the skip, which is then left out.
        """
        sae_out = super().forward(x)
        if self.cfg.skip_scale == 0 or self.use_error_term:
            return sae_out
        return with_skip(sae_out, x, self.b_dec, self.cfg.skip_scale)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        if self.normalisation is None:
            super().fold_activation_norm_scaling_factor(scaling_factor)
            return
        self.b_dec.div_(scaling_factor)
        self.normalisation.fold_input_scaling(scaling_factor)
        self.cfg.normalize_activations = "none"

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        add_remainders(state_dict, exact_dtypes(self))

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        restore_exact(state_dict, exact_dtypes(self))
