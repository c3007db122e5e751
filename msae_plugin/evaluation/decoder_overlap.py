"""How much the directions of a decoder overlap, without ever forming d_sae x d_sae."""

from __future__ import annotations

import torch

# 2^22 similarities of float32 are 16 MiB: a block never becomes the peak of an evaluation.
BLOCK_ELEMENTS = 2**22


@torch.no_grad()
def max_decoder_cosines(W_dec: torch.Tensor) -> torch.Tensor:
    """For each latent the cosine to its nearest other latent's decoder direction.

    Args:
        W_dec: (d_sae, d_in), rows of any norm. A row of zeros has no direction: it is neither
            counted nor anyone's neighbour.

    Returns:
        (number of non-zero rows,) float32 on W_dec's device; empty for fewer than two of them.
    """
    directions = W_dec.detach().float()
    norms = directions.norm(dim=1)
    directions = directions[norms > 0] / norms[norms > 0, None]
    count = directions.shape[0]
    if count < 2:
        return directions.new_zeros(0)
    rows = max(1, BLOCK_ELEMENTS // count)
    nearest: list[torch.Tensor] = []
    for start in range(0, count, rows):
        block = directions[start : start + rows]
        cosines = block @ directions.T
        own = torch.arange(block.shape[0], device=cosines.device)
        cosines[own, start + own] = -torch.inf
        nearest.append(cosines.amax(dim=1))
    return torch.cat(nearest)


def mean_max_decoder_cosine(W_dec: torch.Tensor) -> float:
    """Mean over latents of the cosine to the nearest other decoder direction.

    0 is an orthogonal decoder, 1 one whose latents come in pairs. With a single direction there
    is no overlap: 0.
    """
    nearest = max_decoder_cosines(W_dec)
    return nearest.double().mean().item() if nearest.numel() else 0.0
