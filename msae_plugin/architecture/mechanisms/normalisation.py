"""[N], [A] Multi-scale normalisation of the input, and attention over its scales.

    x_hat_s = gain_s (x_c - mu) / sqrt(s var + eps) + bias_s,   x_hat = sum_s pi_s x_hat_s

Per token this is one vector of n_scales weights times a matrix (n_scales, d_in), never n_scales
branches of compute. With an absolute eps, which is added before the scale multiplies the variance,
the branches differ by the constants 1/sqrt(s): the module then folds into one affine map. With eps
relative to the running mean variance they differ token by token.

The source let tokens of a batch attend to each other, which mixes unrelated tokens. Here each token
attends to the scale branches only, so that `encode` remains a function of one token.
"""

from __future__ import annotations

import math

import torch
from sae_lens.util import str_to_dtype
from torch import nn
from typing_extensions import Self, override

from msae_plugin.architecture.config import MultiScaleConfig, MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms.base import Mechanism, Step
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.step_schedule import Number


class ScaleAttention(nn.Module):
    """Attention of one token over the scales: softmax(mixture + temperature * q(x) . key_s)."""

    def __init__(
        self, d_in: int, n_scales: int, d_key: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.W_query = nn.Parameter(
            torch.randn(d_in, d_key, dtype=dtype, device=device) / math.sqrt(d_in)
        )
        # Zero keys: attention starts as the plain mixture and learns to depart from it.
        self.keys = nn.Parameter(torch.zeros(n_scales, d_key, dtype=dtype, device=device))
        self.log_temperature = nn.Parameter(
            torch.full((), -0.5 * math.log(d_key), dtype=dtype, device=device)
        )

    @override
    def forward(self, unit: torch.Tensor) -> torch.Tensor:
        """Tokens of unit variance (..., d_in) -> logits (..., n_scales), added to the mixture's."""
        return self.log_temperature.exp() * ((unit @ self.W_query) @ self.keys.T)


# Keeps an all-zero first batch finite, and the gradient, which takes it to the power -3/2.
_SMALLEST_VARIANCE = 1e-24


class MultiScaleNormalisation(Mechanism):
    """The input normalisation and the factor per token that undoes it."""

    running_variance: torch.Tensor

    def __init__(self, cfg: MultiScaleConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.cfg = cfg
        n_scales = len(cfg.norm_scales)
        self.mixture_logits: nn.Parameter | None = None
        if n_scales > 1:
            self.mixture_logits = nn.Parameter(torch.zeros(n_scales, dtype=dtype, device=device))
        self.gain: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if cfg.norm_affine:
            self.gain = nn.Parameter(torch.ones(n_scales, cfg.d_in, dtype=dtype, device=device))
            self.bias = nn.Parameter(torch.zeros(n_scales, cfg.d_in, dtype=dtype, device=device))
        self.gate_weight: nn.Parameter | None = None
        self.gate_bias: nn.Parameter | None = None
        if cfg.norm_gate:
            self.gate_weight = nn.Parameter(
                torch.zeros(n_scales, cfg.d_in, dtype=dtype, device=device)
            )
            self.gate_bias = nn.Parameter(torch.zeros(n_scales, dtype=dtype, device=device))
        self.attention: ScaleAttention | None = None
        if cfg.norm_attention:
            d_key = cfg.attention_d_key or max(1, cfg.d_in // 4)
            self.attention = ScaleAttention(cfg.d_in, n_scales, d_key, dtype, device)
        self.register_exact(running_variance=torch.zeros((), dtype=torch.float32, device=device))

    @override
    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        return cls(cfg, str_to_dtype(cfg.dtype), device) if cfg.norm_scales else None

    @override
    def before_step(self, step: Step) -> None:
        x_c = step.sae.process_sae_in(step.sae_in)
        self.update_running_variance(x_c, step.schedule.firing_rate_rate, step.sae.ranks)

    @override
    def forward(self, x_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations minus b_dec (..., d_in) -> x_hat (..., d_in) and scale(x) (..., 1).

        With unit gain and no bias, scale(x) * x_hat is x_c minus its mean.
        """
        centred, variance = self._centre(x_c)
        reciprocal = self._reciprocal_deviations(variance)
        mixture = self._mixture(centred, variance)
        branch = mixture * self._gate(centred, variance) * reciprocal
        if self.gain is None or self.bias is None:
            x_hat = centred * branch.sum(dim=-1, keepdim=True)
        else:
            x_hat = centred * (branch @ self.gain) + mixture @ self.bias
        return x_hat, 1 / branch.sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def update_running_variance(
        self, x_c: torch.Tensor, rate: Number, ranks: Ranks = ALONE
    ) -> None:
        """Follow the mean variance of the tokens; training only, read when eps is relative."""
        _, variance = self._centre(x_c)
        self.running_variance.lerp_(ranks.mean(variance.float().mean()), rate)

    @override
    @torch.no_grad()
    def fold_scale(self, factor: float) -> None:
        # x_hat stays. What is in units of the activations changes: the running variance, and an
        # absolute eps, which lives in the configuration.
        self.running_variance.div_(factor**2)
        if self.cfg.norm_eps_mode == "absolute":
            self.cfg.norm_eps /= factor**2

    def _centre(self, x_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        centred = x_c - x_c.mean(dim=-1, keepdim=True) if self.cfg.norm_centre else x_c
        return centred, centred.pow(2).mean(dim=-1, keepdim=True)

    def _reciprocal_deviations(self, variance: torch.Tensor) -> torch.Tensor:
        """(..., n_scales): 1 / sqrt(s var + eps)."""
        scales = torch.tensor(self.cfg.norm_scales, dtype=variance.dtype, device=variance.device)
        if self.cfg.norm_eps_mode == "absolute":
            return torch.rsqrt(scales * (variance + self.cfg.norm_eps))
        eps = self.cfg.norm_eps * self.running_variance.to(variance.dtype)
        return torch.rsqrt(scales * variance + eps + _SMALLEST_VARIANCE)

    def _unit(self, centred: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """(..., d_in) tokens of unit variance, which the gate and the attention look at."""
        eps = self.cfg.norm_eps
        if self.cfg.norm_eps_mode == "relative":
            eps = eps * self.running_variance.to(variance.dtype)
        return centred * torch.rsqrt(variance + eps + _SMALLEST_VARIANCE)

    def _mixture(self, centred: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """(..., n_scales): softmax of the mixture logits, plus attention when on."""
        if self.mixture_logits is None:
            return torch.ones_like(variance)
        logits = self.mixture_logits.expand(*variance.shape[:-1], -1)
        if self.attention is not None:
            logits = logits + self.attention(self._unit(centred, variance))
        return torch.softmax(logits, dim=-1)

    def _gate(self, centred: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """(..., n_scales) or (..., 1): twice a sigmoid, 1 at initialisation."""
        if self.gate_weight is None or self.gate_bias is None:
            return torch.ones_like(variance)
        unit = self._unit(centred, variance)
        return 2 * torch.sigmoid(unit @ self.gate_weight.T / self.cfg.d_in + self.gate_bias)

    @torch.no_grad()
    def affine(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(d_in,) gain and bias, and the constant, into which scales with an absolute eps collapse.

        With u = (x_c - mu) / sqrt(var + eps): x_hat = gain * u + bias and
        scale(x) = sqrt(var + eps) / constant.
        """
        scales = torch.tensor(self.cfg.norm_scales, dtype=torch.float32)
        logits = torch.zeros_like(scales)
        if self.mixture_logits is not None:
            logits = self.mixture_logits.float().to(scales.device)
        mixture = torch.softmax(logits, dim=-1)
        branch = mixture * scales.rsqrt()
        gain = branch.sum().expand(self.cfg.d_in)
        bias = torch.zeros(self.cfg.d_in)
        if self.gain is not None and self.bias is not None:
            gain = branch @ self.gain.float().to(scales.device)
            bias = mixture @ self.bias.float().to(scales.device)
        return gain, bias, branch.sum()
