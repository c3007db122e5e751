"""BatchTopK beside a dense linear bottleneck (arXiv 2606.14040), as latents that any SAE has.

    x_rec = b_dec + (x - b_dec) W_down W_up + sum_i f_i d_i

A linear map of rank r is 2 r latents in opposite pairs: v relu(u x) - v relu(-u x) = v u x. The
first 2 r latents are these pairs. They are left out of the ranking; one of a pair is always active,
and so they take r of the k active latents of every token. The whole is exported as `jumprelu`, with
a threshold of zero for the pairs. Of the paper its abstract was at hand: a bottleneck of rank 24 in
parallel with BatchTopK and Matryoshka; it does not count the bottleneck as active latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import (
    BatchTopK,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
)
from torch import nn
from typing_extensions import override

from msae_plugin.architecture.calibration import calibrate_batchtopk
from msae_plugin.common.errors import InputError, RunFailure

ARCHITECTURE = "batchtopk_bottleneck"


@dataclass
class BottleneckTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """Configuration of BatchTopK beside a linear bottleneck; exported as `jumprelu`.

    Args:
        bottleneck_rank (int): Rank of the bottleneck: it takes as many active latents of every
            token, and twice as many of the dictionary.
        k (float): Mean number of active latents, the bottleneck's included. Inherited from
            BatchTopKTrainingSAEConfig.
        topk_threshold_lr (float): Inherited from BatchTopKTrainingSAEConfig.
        aux_loss_coefficient (float): Inherited from TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Inherited from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Inherited from TrainingSAEConfig.
        d_in (int): Width of the activations. Inherited from SAEConfig.
        d_sae (int): Number of latents, the bottleneck's included. Inherited from SAEConfig.
        dtype (str): Inherited from SAEConfig.
        device (str): Inherited from SAEConfig.
    """

    bottleneck_rank: int = 24

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        rank = self.bottleneck_rank
        if not 0 <= rank < self.k or 2 * rank >= self.d_sae:
            raise InputError(
                f"bottleneck_rank must be below k = {self.k:g} and below half of d_sae = "
                f"{self.d_sae}; got {rank}"
            )


class BeyondPairs(nn.Module):
    """ReLU for the pairs of the bottleneck, BatchTopK for all other latents."""

    def __init__(self, pairs: int, k: float) -> None:
        super().__init__()
        self.pairs = pairs
        self.batch_topk = BatchTopK(k)

    @override
    def forward(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """(..., d_sae) pre-activations to as many latents."""
        pairs, others = hidden_pre[..., : self.pairs], hidden_pre[..., self.pairs :]
        return torch.cat([pairs.relu(), self.batch_topk(others)], dim=-1)


class BottleneckTrainingSAE(BatchTopKTrainingSAE):
    """SAELens' BatchTopK beside a linear bottleneck."""

    cfg: BottleneckTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def initialize_weights(self) -> None:
        """As BatchTopK; the second latent of a pair is the first one's opposite, and stays so.

        Adam moves weights whose gradients are opposite by opposite steps, to the bit.
        """
        super().initialize_weights()
        rank = self.cfg.bottleneck_rank
        with torch.no_grad():
            self.W_enc[:, rank : 2 * rank] = -self.W_enc[:, :rank]
            self.W_dec[rank : 2 * rank] = -self.W_dec[:rank]
        self.W_enc.register_hook(self._of_encoder_pairs)
        self.W_dec.register_hook(self._of_decoder_pairs)
        self.b_enc.register_hook(self._of_biases)

    def _of_encoder_pairs(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._of_decoder_pairs(gradient.T).T

    def _of_decoder_pairs(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient of the tied weights: (d_sae, d_in) of the single latents."""
        rank = self.cfg.bottleneck_rank
        first, second, others = gradient.split([rank, rank, self.cfg.d_sae - 2 * rank])
        tied = first - second
        return torch.cat([tied, -tied, others])

    def _of_biases(self, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[: self._pairs] = 0
        return gradient

    @property
    def _pairs(self) -> int:
        return 2 * self.cfg.bottleneck_rank

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return BeyondPairs(self._pairs, self.cfg.k - self.cfg.bottleneck_rank)

    @override
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        super().update_topk_threshold(acts_topk[..., self._pairs :])

    def latent_thresholds(self) -> torch.Tensor:
        """(d_sae,) pre-activations above which the exported latents are active."""
        thresholds = torch.full_like(self.b_enc, float(self.topk_threshold))
        thresholds[: self._pairs] = 0
        return thresholds.detach()

    @torch.no_grad()
    def calibrate_threshold(self, batches: Iterable[torch.Tensor]) -> dict[str, float]:
        """Set the threshold so that k latents are active on average, the pairs' included."""
        kept = [batch.to(self.device) for batch in batches]
        if not kept:
            raise RunFailure("calibrate_threshold needs at least one batch of activations")
        return calibrate_batchtopk(self, kept, self._pairs_first)

    def _pairs_first(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        scores = hidden_pre.clone()
        pairs = scores[..., : self._pairs]
        pairs[pairs > 0] = torch.inf
        return scores

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["threshold"] = self.latent_thresholds()
