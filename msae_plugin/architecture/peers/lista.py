"""LISTA-Matryoshka with decreasing k, which holds the record on SynthSAEBench.

After the description and the settings of github.com/chanind/claude-auto-research-synthsaebench:

    pre_0 = (x - b_dec) W_enc + b_enc                 ranked as if decoder rows had unit norm
    f_0   = select(pre_0)
    pre   = pre_0 + eta ((x - b_dec) - f_0 W_dec) W_enc
    f     = select(pre)

One refinement step towards sparse coding (LISTA, Gregor and LeCun 2010). `select` is BatchTopK in
training, whose k falls linearly over the whole run, and one threshold per selection in the export.
Nested prefixes of the dictionary, ordered by running firing frequency, must reconstruct alone; an
inner prefix learns only from its own loss. Losses are tilted towards badly reconstructed tokens
(TERM, arXiv 2411.00743). The authors' code compares the reconstruction with x - b_dec; here it is
compared with x, as `decode` adds b_dec.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from torch import nn
from typing_extensions import override

from msae_plugin.architecture.calibration import calibrate_batchtopk, calibrated_threshold
from msae_plugin.architecture.selection import running_rate
from msae_plugin.common.errors import InputError, RunFailure

ARCHITECTURE = "lista_matryoshka_batchtopk"
INFERENCE_ARCHITECTURE = "lista_jumprelu"


@dataclass
class ListaSAEConfig(JumpReLUSAEConfig):
    """Configuration of an exported LISTA SAE.

    Args:
        refinement_step (float): eta, the length of the refinement step.
        d_in (int): Width of the activations. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Inherited from SAEConfig.
        device (str): Inherited from SAEConfig.
    """

    refinement_step: float = 0.3

    @override
    @classmethod
    def architecture(cls) -> str:
        return INFERENCE_ARCHITECTURE


class ListaSAE(JumpReLUSAE):
    """JumpReLU with one refinement step: a deterministic function of one token."""

    cfg: ListaSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    first_threshold: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.first_threshold = nn.Parameter(torch.zeros_like(self.threshold))

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) activations to (..., d_sae) latents."""
        sae_in = self.process_sae_in(x)
        first_pre = sae_in @ self.W_enc + self.b_enc
        first = first_pre.relu() * (first_pre > self.first_threshold)
        residual = sae_in - first @ self.W_dec
        refined = first_pre + self.cfg.refinement_step * (residual @ self.W_enc)
        hidden_pre = self.hook_sae_acts_pre(refined)
        return self.hook_sae_acts_post(hidden_pre.relu() * (hidden_pre > self.threshold))

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Unit decoder rows; both thresholds and both encodings scale with them."""
        first = self.first_threshold.clone()
        norms = self.get_W_dec_norm()
        super().fold_W_dec_norm()
        self.first_threshold.data = first * norms


@dataclass
class ListaTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """Configuration for training a LISTA-Matryoshka SAE with decreasing k.

    Args:
        refinement_step (float): eta.
        prefix_fractions (list[float]): Inner prefixes, as shares of d_sae.
        detach_inner_prefixes (bool): A wider prefix does not teach the latents of a narrower one.
        order_by_frequency (bool): Prefixes take the latents that fire most; else the first ones.
        firing_rate_decay (float): Memory of the firing frequencies that order the latents.
        tilt (float): Weight of badly reconstructed tokens; 0 is the plain mean.
        k_initial_multiplier (float): Training starts at this multiple of k.
        k_anneal_steps (int): Steps over which the multiple falls linearly to 1; 0 disables.
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

    refinement_step: float = 0.3
    prefix_fractions: list[float] = field(default_factory=lambda: [1 / 32, 1 / 8, 1 / 2])
    detach_inner_prefixes: bool = True
    order_by_frequency: bool = True
    firing_rate_decay: float = 0.99
    tilt: float = 0.002
    # The authors begin at 60 for k = 25.
    k_initial_multiplier: float = 2.4
    k_anneal_steps: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < share < 1 for share in self.prefix_fractions):
            raise InputError(
                f"prefix_fractions must be between 0 and 1; got {self.prefix_fractions}"
            )
        if self.k_initial_multiplier < 1:
            raise InputError(
                f"k_initial_multiplier must be at least 1; got {self.k_initial_multiplier}"
            )

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return ListaSAEConfig

    @property
    def prefix_widths(self) -> list[int]:
        """Widths of the inner prefixes, ascending, without the whole dictionary."""
        widths = {max(1, round(share * self.d_sae)) for share in self.prefix_fractions}
        return sorted(width for width in widths if width < self.d_sae)

    def k_at(self, training_step: int) -> float:
        """The k of a training step."""
        if self.k_anneal_steps <= 0 or training_step >= self.k_anneal_steps:
            return self.k
        left = 1 - training_step / self.k_anneal_steps
        return min(self.k * (1 + (self.k_initial_multiplier - 1) * left), float(self.d_sae))


def tilted_mean(losses: torch.Tensor, tilt: float) -> torch.Tensor:
    """Mean of (n_tokens,) losses with weights softmax(tilt * loss / mean loss), held constant."""
    if tilt == 0:
        return losses.mean()
    fixed = losses.detach()
    return (torch.softmax(tilt * fixed / fixed.mean(), dim=0) * losses).sum()


class ListaTrainingSAE(BatchTopKTrainingSAE):
    """SAELens' BatchTopK with a refinement step and nested prefixes."""

    cfg: ListaTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    first_threshold: torch.Tensor
    firing_rate: torch.Tensor

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        device = self.device
        self.register_buffer("first_threshold", torch.zeros((), dtype=torch.double, device=device))
        self.register_buffer(
            "firing_rate", torch.zeros(self.cfg.d_sae, dtype=torch.float32, device=device)
        )

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and refined pre-activations, each (..., d_sae).

        Over the batch in training mode, by the two thresholds in evaluation mode.
        """
        sae_in = self.process_sae_in(x)
        W_enc, b_enc, W_dec = self._folded()
        first_pre = sae_in @ W_enc + b_enc
        first = self._select(first_pre, self.first_threshold)
        if self.training:
            self._follow_first_threshold(first)
        residual = sae_in - first @ W_dec
        refined = first_pre + self.cfg.refinement_step * (residual @ W_enc)
        hidden_pre = self.hook_sae_acts_pre(refined)
        acts = self._select(hidden_pre, self.topk_threshold)
        return self.hook_sae_acts_post(acts), hidden_pre

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """W_enc, b_enc and W_dec as the export has them: decoder rows of unit norm.

        In the operations of the export, to the last bit: a latent that rounding puts on the other
        side of the first threshold changes all others.
        """
        if not self.cfg.rescale_acts_by_decoder_norm:
            return self.W_enc, self.b_enc, self.W_dec
        norm = self.W_dec.norm(dim=-1)
        return self.W_enc * norm, self.b_enc * norm, self.W_dec / norm[:, None]

    def _select(self, hidden_pre: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.activation_fn(hidden_pre)
        return hidden_pre.relu() * (hidden_pre > threshold.to(hidden_pre.dtype))

    @torch.no_grad()
    def _follow_first_threshold(self, acts: torch.Tensor) -> None:
        positive = acts[acts > 0]
        if positive.numel():
            lowest = positive.min().to(self.first_threshold.dtype)
            self.first_threshold.lerp_(lowest, self.cfg.topk_threshold_lr)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' step at the k of the step, its loss tilted, plus the inner prefixes' losses."""
        k = self.cfg.k_at(step_input.n_training_steps)
        assert isinstance(self.activation_fn, BatchTopK)
        self.activation_fn.k = k
        output = super().training_forward_pass(step_input)
        target = step_input.sae_in
        tilt = self.cfg.tilt
        output.losses["mse_loss"] = tilted_mean(_errors(output.sae_out, target), tilt)
        order = torch.arange(self.cfg.d_sae, device=target.device)
        if self.cfg.order_by_frequency:
            order = self.firing_rate.argsort(descending=True, stable=True)
        W_dec = self._folded()[2]
        inner = self.b_dec.expand_as(target)
        start = 0
        for width in self.cfg.prefix_widths:
            group = order[start:width]
            # b_dec is taught by the innermost prefix and the whole dictionary.
            if start and self.cfg.detach_inner_prefixes:
                inner = inner.detach()
            inner = inner + output.feature_acts[..., group] @ W_dec[group]
            output.losses[f"prefix_{width}_loss"] = tilted_mean(_errors(inner, target), tilt)
            start = width
        output.loss = torch.stack(list(output.losses.values())).sum()
        output.metrics["k"] = k
        self._follow_firing_rate(output.feature_acts, step_input.n_training_steps)
        return output

    @torch.no_grad()
    def _follow_firing_rate(self, feature_acts: torch.Tensor, step: int) -> None:
        share = (feature_acts.reshape(-1, self.cfg.d_sae) != 0).float().mean(dim=0)
        self.firing_rate.lerp_(share, running_rate(1 - self.cfg.firing_rate_decay, step))

    @torch.no_grad()
    def calibrate_threshold(self, batches: Iterable[torch.Tensor]) -> dict[str, float]:
        """Set both thresholds so that each selection keeps k latents per token on average."""
        kept = [batch.to(self.device) for batch in batches]
        W_enc, b_enc, _ = self._folded()
        threshold = calibrated_threshold(
            kept,
            lambda batch: self.process_sae_in(batch) @ W_enc + b_enc,
            lambda scores: scores,
            self.cfg.k,
        )
        if threshold is None:
            raise RunFailure("calibrate_threshold needs at least one batch of activations")
        self.first_threshold.fill_(threshold)
        return calibrate_batchtopk(self, kept)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            self.first_threshold /= scaling_factor

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        state_dict.pop("firing_rate")
        first = float(state_dict.pop("first_threshold"))
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["first_threshold"] = torch.full_like(state_dict["threshold"], first)


def _errors(reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(n_tokens,) squared errors."""
    return (reconstruction - target).pow(2).sum(dim=-1).reshape(-1)
