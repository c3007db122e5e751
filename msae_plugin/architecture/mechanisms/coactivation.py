"""[O] Co-activation of each latent with its nearest decoder neighbours.

The full matrix EMA(f_i f_j) takes 17 GB at 65k latents. Only pairs that overlap in direction can be
penalised, so the moments are followed exactly for the nearest neighbours of each latent, in
(d_sae, neighbour_count) numbers, and at a cost proportional to the active latents.
"""

from __future__ import annotations

from typing import Literal

import torch

from msae_plugin.architecture.float32_buffers import KeepsFloat32
from msae_plugin.architecture.mechanisms.orthogonality import nearest_neighbours
from msae_plugin.architecture.ranks import ALONE, Ranks


class NeighbourCoactivation(KeepsFloat32):
    """Running second moments of neighbouring latents.

    Args:
        d_sae: Number of latents.
        count: Neighbours per latent; capped at d_sae - 1.
        device: Device of the buffers.
    """

    exact_tensor_names = ("neighbours", "pair_moment", "pair_weight", "second_moment", "mean")
    neighbours: torch.Tensor
    pair_moment: torch.Tensor
    pair_weight: torch.Tensor
    second_moment: torch.Tensor
    mean: torch.Tensor

    def __init__(self, d_sae: int, count: int, device: torch.device) -> None:
        super().__init__()
        count = min(count, d_sae - 1)
        index = torch.arange(d_sae, device=device)[:, None] + torch.arange(
            1, count + 1, device=device
        )
        self.register_buffer("neighbours", index % d_sae)
        # pair_moment / pair_weight is the running mean of f_i f_j; the weight tells a pair that was
        # just listed from one that was followed for long.
        self.register_buffer(
            "pair_moment", torch.zeros(d_sae, count, dtype=torch.float32, device=device)
        )
        self.register_buffer(
            "pair_weight", torch.zeros(d_sae, count, dtype=torch.float32, device=device)
        )
        self.register_buffer(
            "second_moment", torch.zeros(d_sae, dtype=torch.float32, device=device)
        )
        self.register_buffer("mean", torch.zeros(d_sae, dtype=torch.float32, device=device))

    @torch.no_grad()
    def refresh(self, W_dec: torch.Tensor, rows_at_a_time: int) -> None:
        """Search the neighbours anew; the moments of pairs that stay neighbours are kept."""
        if self.neighbours.shape[1] == 0:
            return
        _, fresh = nearest_neighbours(W_dec, self.neighbours.shape[1], rows_at_a_time)
        for start in range(0, fresh.shape[0], rows_at_a_time):
            block = slice(start, start + rows_at_a_time)
            same = fresh[block, :, None] == self.neighbours[block, None, :]
            for moments in (self.pair_moment, self.pair_weight):
                moments[block] = (same * moments[block, None, :]).sum(dim=-1)
        self.neighbours = fresh

    @torch.no_grad()
    def update(
        self,
        feature_acts: torch.Tensor,
        values: torch.Tensor,
        tokens: torch.Tensor,
        latents: torch.Tensor,
        rate: float,
        ranks: Ranks = ALONE,
    ) -> None:
        """Fold one batch into the moments.

        Args:
            feature_acts: (n_tokens, d_sae) latents of the batch, dense.
            values: (n_pairs,) the same latents where active.
            tokens: (n_pairs,) their tokens.
            latents: (n_pairs,) their indices.
            rate: Weight of this batch.
            ranks: The processes that share the batch.
        """
        n_tokens = feature_acts.shape[0]
        values = values.float()
        moment = torch.zeros_like(self.second_moment)
        squares = ranks.mean(moment.index_add(0, latents, values.square()) / n_tokens)
        self.second_moment.lerp_(squares, rate)
        self.mean.lerp_(ranks.mean(moment.index_add(0, latents, values) / n_tokens), rate)
        partner = feature_acts[tokens[:, None], self.neighbours[latents]].float()
        products = torch.zeros_like(self.pair_moment)
        products.index_add_(0, latents, values[:, None] * partner)
        self.pair_moment.lerp_(ranks.mean(products / n_tokens), rate)
        self.pair_weight.lerp_(torch.ones_like(self.pair_weight), rate)

    def normalised(self, kind: Literal["coactivation", "correlation"]) -> torch.Tensor:
        """Co-activation of each latent with its neighbours.

        Args:
            kind: The cosine of the latents over tokens, or their correlation, which is zero for
                latents that fire independently.

        Returns:
            (d_sae, count) float32; zero where a latent has not fired.
        """
        moment = self.pair_moment / self.pair_weight.clamp(min=1e-8)
        spread = self.second_moment
        if kind == "correlation":
            moment = moment - self.mean[:, None] * self.mean[self.neighbours]
            spread = (self.second_moment - self.mean.square()).clamp(min=0)
        scale = (spread[:, None] * spread[self.neighbours]).sqrt()
        return torch.where(scale > 1e-12, moment / scale.clamp(min=1e-12), 0.0)
