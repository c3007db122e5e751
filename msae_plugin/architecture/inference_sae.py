"""The exported SAE: JumpReLU, after the input normalisation when there is one.

Linear and stateless either way, on edited and on negative latents too; the two differ by float32
rounding. `benchmarks/decode_crossover.py`, one core, dense / sparse in ms: (d_in 576, d_sae 4608,
1024 tokens) L0 16: 78 / 13, 64: 75 / 20, 256: 75 / 44, 512: 80 / 73; (2304, 16384, 256 tokens) L0
16: 259 / 12, 64: 250 / 21, 256: 254 / 59, 512: 243 / 99.
"""

from __future__ import annotations

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import embedding_bag
from typing_extensions import override

from msae_plugin.architecture.config import MultiScaleSAEConfig
from msae_plugin.architecture.float32_buffers import KeepsFloat32
from msae_plugin.architecture.mechanisms.normalisation import MultiScaleNormalisation

# The two are level at about 11 % in the smaller of these sizes; here sparse still takes half.
MAX_DENSITY = 1 / 32
# Below this many latents the search for the active ones is not worth its overhead.
_MIN_LATENTS = 2**18


def decode_latents(
    feature_acts: torch.Tensor, W_dec: torch.Tensor, max_density: float = MAX_DENSITY
) -> torch.Tensor:
    """The product of latents (..., d_sae), of any sign, with W_dec (d_sae, d_in).

    Sparse only on a CPU, in float32 or float64, where no gradient is asked for (under
    `torch.no_grad`, as in every evaluation), and when at most a share `max_density` of the latents
    is not zero. On a GPU the number of active latents would have to be waited for.
    """
    if not _sparse_is_possible(feature_acts, W_dec):
        return feature_acts @ W_dec
    flat = feature_acts.reshape(-1, feature_acts.shape[-1])
    try:
        n_active = int(torch.count_nonzero(flat))
    except RuntimeError:  # inside torch.func.vmap no value is known
        return feature_acts @ W_dec
    if n_active == 0 or n_active > max_density * flat.numel():
        return feature_acts @ W_dec
    tokens, latents = flat.nonzero(as_tuple=True)  # in the order of the tokens
    starts = torch.searchsorted(tokens, torch.arange(flat.shape[0]))
    decoded = embedding_bag(
        latents, W_dec, starts, mode="sum", per_sample_weights=flat[tokens, latents]
    )
    return decoded.reshape(*feature_acts.shape[:-1], W_dec.shape[1])


def _sparse_is_possible(feature_acts: torch.Tensor, W_dec: torch.Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and feature_acts.device.type == "cpu"
        and feature_acts.layout == torch.strided
        and feature_acts.dtype == W_dec.dtype
        and W_dec.dtype in (torch.float32, torch.float64)
        and feature_acts.numel() >= _MIN_LATENTS
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (feature_acts.requires_grad or W_dec.requires_grad))
        and forward_ad.unpack_dual(feature_acts).tangent is None
    )


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
        """Latents (..., d_sae), not negative, of activations (..., d_in)."""
        if self.normalisation is None:
            return super().encode(x)
        x_hat, token_scale = self.normalisation(self.process_sae_in(x))
        hidden_pre = self.hook_sae_acts_pre(x_hat @ self.W_enc + self.b_enc)
        active = hidden_pre > self.threshold
        return self.hook_sae_acts_post(hidden_pre.relu() * active * token_scale)

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(..., d_sae) -> (..., d_in): exactly f @ W_dec + b_dec, for any latents."""
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
        return sae_out + self.cfg.skip_scale * (x.to(sae_out.dtype) - self.b_dec)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        if self.normalisation is None:
            super().fold_activation_norm_scaling_factor(scaling_factor)
            return
        self.b_dec.div_(scaling_factor)
        self.normalisation.fold_scale(scaling_factor)
        self.cfg.normalize_activations = "none"
