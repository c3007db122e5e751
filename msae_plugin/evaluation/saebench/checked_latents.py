"""An SAE whose latents are looked at while SAEBench probes them.

SAEBench's probes turn latents that are NaN, or all zero, into an accuracy like any other (.5 on
balanced classes, and the probe on all latents even hides a NaN).
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import SAE

from msae_plugin.common.errors import RunFailure


class CheckedLatents:
    """Replaces the `encode` of one SAE object by itself with a look at the result.

    Args:
        sae: A copy that belongs to one evaluation.
        name: The SAE's name in messages.
    """

    def __init__(self, sae: SAE[Any], name: str) -> None:
        self._encode = sae.encode
        self._name = name
        self._active = False
        # On the object, not its class: nothing else sees it.
        vars(sae)["encode"] = self.encode

    def encode(self, activations: torch.Tensor) -> torch.Tensor:
        """(..., d_in) to (..., d_sae), dense.

        Raises:
            RunFailure: A latent is NaN or infinite.
        """
        latents = self._encode(activations)
        if latents.is_sparse:
            latents = latents.to_dense()
        if latents.numel() == 0:
            return latents
        # One pass without a copy; NaN is passed on.
        low, high = torch.aminmax(latents)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise RunFailure(
                f"SAE {self._name!r}: encode gives NaN or infinite latents in {latents.dtype}"
            )
        if not self._active and bool((low != 0) | (high != 0)):
            # Zero activations are padding: what fires there is the bias alone.
            real = (activations != 0).any(-1)
            self._active = bool((latents[real] != 0).any())
        return latents

    def require_active(self) -> None:
        """Refuse an SAE that said nothing.

        Raises:
            RunFailure: No latent was active on any token.
        """
        if not self._active:
            raise RunFailure(
                f"SAE {self._name!r}: no latent is active on any token (L0 is 0): is it trained, "
                "and is the hook the one it was trained on?"
            )
