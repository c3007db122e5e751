"""Controls that a trained SAE is measured against.

- The residual stream itself, as an "SAE" whose latents are the activations.
- A trained SAE with its decoder rows permuted: the encoder, hence every probe on latents, stays as
  it was; reconstruction is destroyed. What a metric gives here, it does not owe to the decoder.

The third control, a frozen random decoder (arXiv 2602.14111), is trained: set
`sae.W_dec.requires_grad_(False)` before training.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import override


class ResidualStreamSAE(StandardSAE):
    """The activations as latents: `encode` and `decode` are the identity.

    L0 is d_in and explained variance 1. SAEBench's probes on the largest of these "latents" are its
    `llm_top_k`, up to the random numbers they draw.

    Args:
        d_in: Width of the activations.
        metadata: Of the SAEs it is compared with: model, hook, context.
    """

    def __init__(self, d_in: int, metadata: SAEMetadata) -> None:
        super().__init__(
            StandardSAEConfig(
                d_in=d_in, d_sae=d_in, apply_b_dec_to_input=False, metadata=copy.copy(metadata)
            )
        )
        with torch.no_grad():
            self.W_enc.copy_(torch.eye(d_in))
            self.W_dec.copy_(torch.eye(d_in))

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) as it is, in the SAE's dtype."""
        return x.to(self.dtype)

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(..., d_in) as it is."""
        return feature_acts


@torch.no_grad()
def with_permuted_decoder(sae: SAE[Any], seed: int) -> SAE[Any]:
    """A copy of an SAE whose decoder directions belong to other latents.

    Args:
        sae: A trained SAE; it is not changed.
        seed: Of the permutation.

    Returns:
        The copy. `W_dec` (d_sae, d_in) has the same rows in another order; nothing else differs.
    """
    permuted = copy.deepcopy(sae)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sae.W_dec.shape[0], generator=generator)
    permuted.W_dec.copy_(sae.W_dec[order.to(sae.W_dec.device)])
    return permuted
