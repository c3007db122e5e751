"""[A] Token-dependent mixture weights over the normalisation scales.

The source let tokens of a batch attend to each other, which mixes unrelated tokens. Here each token
attends to the scale branches only, so that `encode` remains a function of one token.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from typing_extensions import override


class ScaleAttention(nn.Module):
    """Attention of one token over the scales: softmax(mixture + temperature * q(x) . key_s).

    Args:
        d_in: Width of the activations.
        n_scales: Number of branches.
        d_key: Width of queries and keys.
        dtype: Data type of the parameters.
        device: Device of the parameters.
    """

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
        """Logits of the scales.

        Args:
            unit: (..., d_in) tokens of unit variance.

        Returns:
            (..., n_scales) logits, to be added to those of the plain mixture.
        """
        return self.log_temperature.exp() * ((unit @ self.W_query) @ self.keys.T)
