"""C2R: BatchTopK with cross-sample consistency regularisation (arXiv 2606.30609, ICML 2026).

    penalty = 1/d_sae sum_i (|f_i| + |f_n(i)|) relu(cos(d_i, d_n(i)))^2
    n(i)    = argmax_j cos(d_i, d_j)

|f_i| is the Euclidean norm of latent i over the tokens of the batch: only neighbours that are
active cost anything. Neighbours are searched within random chunks of the dictionary. The authors
train on activations of mean squared norm 1 and add 5 times the penalty at every fifth step, times
five; their loss in our units is |x - x_rec|^2 + coefficient * every * rms * penalty, with rms the
root mean squared norm of the activations. Their batch has 2048 tokens, and the penalty grows with
the root of the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from msae_plugin.architecture.mechanisms.orthogonality import random_chunks
from msae_plugin.architecture.selection import running_rate
from msae_plugin.common.errors import InputError

ARCHITECTURE = "batchtopk_c2r"
_UNIT_DECAY = 0.99


def c2r_penalty(
    feature_acts: torch.Tensor, W_dec: torch.Tensor, chunks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The penalty of one batch; differentiable in the latents and in the decoder.

    `feature_acts` (n_tokens, d_sae) are in the units of unit-norm decoder rows, `chunks` disjoint
    indices that cover the dictionary. Nothing of size chunk x chunk is kept for the backward pass.
    """
    first: list[torch.Tensor] = []
    second: list[torch.Tensor] = []
    with torch.no_grad():
        directions = torch.nn.functional.normalize(W_dec, dim=1)
        for chunk in chunks:
            if chunk.numel() < 2:
                continue
            rows = directions[chunk]
            nearest = (rows @ rows.T).fill_diagonal_(-torch.inf).argmax(dim=1)
            first.append(chunk)
            second.append(chunk[nearest])
    if not first:
        return W_dec.new_zeros(())
    i, j = torch.cat(first), torch.cat(second)
    norms = feature_acts.norm(dim=0)
    cosines = torch.nn.functional.cosine_similarity(W_dec[i], W_dec[j], dim=1)
    return ((norms[i] + norms[j]) * cosines.relu().pow(2)).sum() / W_dec.shape[0]


@dataclass
class C2RTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """Configuration of BatchTopK with the C2R penalty; exported as `jumprelu`.

    Args:
        c2r_coefficient (float): Weight of the penalty, for activations of mean squared norm 1.
        c2r_every (int): The penalty is taken every n-th step with n times its weight.
        c2r_chunk_size (int): Latents per chunk in which neighbours are searched.
        k (float): Mean number of active latents. Inherited from BatchTopKTrainingSAEConfig.
        topk_threshold_lr (float): Inherited from BatchTopKTrainingSAEConfig.
        aux_loss_coefficient (float): Inherited from TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Inherited from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Inherited from TrainingSAEConfig.
        d_in (int): Width of the activations. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Inherited from SAEConfig.
        device (str): Inherited from SAEConfig.
    """

    c2r_coefficient: float = 5.0
    c2r_every: int = 5
    c2r_chunk_size: int = 8192

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c2r_coefficient < 0:
            raise InputError(f"c2r_coefficient must be 0 or more; got {self.c2r_coefficient}")
        if self.c2r_every < 1 or self.c2r_chunk_size < 2:
            raise InputError("c2r_every must be at least 1 and c2r_chunk_size at least 2")


class C2RTrainingSAE(BatchTopKTrainingSAE):
    """SAELens' BatchTopK with the C2R penalty."""

    cfg: C2RTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    mean_squared_norm: torch.Tensor

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer(
            "mean_squared_norm", torch.zeros((), dtype=torch.float32, device=self.device)
        )

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' step, plus the penalty where it is due."""
        output = super().training_forward_pass(step_input)
        cfg, step = self.cfg, step_input.n_training_steps
        with torch.no_grad():
            squared = step_input.sae_in.float().pow(2).sum(dim=-1).mean()
            self.mean_squared_norm.lerp_(squared, running_rate(1 - _UNIT_DECAY, step))
        if cfg.c2r_coefficient == 0 or step % cfg.c2r_every:
            return output
        with torch.autocast(self.W_dec.device.type, enabled=False):
            chunks = random_chunks(cfg.d_sae, cfg.c2r_chunk_size, self.W_dec.device)
            scale = cfg.c2r_coefficient * cfg.c2r_every * self.mean_squared_norm.sqrt()
            latents = output.feature_acts.reshape(-1, cfg.d_sae).to(self.W_dec.dtype)
            if not cfg.rescale_acts_by_decoder_norm:
                latents = latents * self.W_dec.norm(dim=-1)
            penalty = scale * c2r_penalty(latents, self.W_dec, chunks)
        output.losses["c2r_loss"] = penalty
        output.loss = output.loss + penalty
        return output

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        state_dict.pop("mean_squared_norm")
        super().process_state_dict_for_saving_inference(state_dict)
