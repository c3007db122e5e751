"""The optimiser of one SAE: SAELens' Adam, or AdamW when a weight decay is asked for."""

from __future__ import annotations

import torch
from torch import nn

DECAYED_PARAMETERS = frozenset({"W_enc", "W_dec"})
"""Weight decay shrinks the two dictionaries only: biases, thresholds and gains have no reason to
be near zero."""


def build_optimiser(
    sae: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Adam over all parameters, or AdamW (decoupled decay, arXiv 1711.05101) on the dictionaries.

    Args:
        sae: The SAE whose parameters are trained.
        lr: Learning rate, before any schedule.
        betas: Adam's two decay rates.
        weight_decay: 0 gives exactly the optimiser of SAELens' trainer.
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
