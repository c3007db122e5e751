"""A training SAE between its steps: weights and buffers, units, thresholds, folding, saving.

The equations are in `training_sae.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import nn
from typing_extensions import override

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.float32_buffers import REMAINDER_SUFFIX, KeepsFloat32
from msae_plugin.architecture.input_units import InputUnits
from msae_plugin.architecture.kernels.cuda_graphs import RecordedSteps
from msae_plugin.architecture.kernels.decoding import DecodeKernel, MachineSettings, triton_runs_on
from msae_plugin.architecture.losses import assign_groups
from msae_plugin.architecture.mechanisms import Mechanisms
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.step_schedule import StepInputs, StepResults, StepSchedule
from msae_plugin.common.errors import InputError

# Tensors of checkpoints of version 0.1, and what they are called now.
_RENAMED = {
    "latent_ring": "latent_group",
    "candidate_cut": "candidate_threshold",
    "mechanisms.input_variance": "mechanisms.orthogonality.input_variance",
}


def _rename_old_tensors(state_dict: dict[str, Any]) -> None:
    for old, new in _RENAMED.items():
        for suffix in ("", REMAINDER_SUFFIX):
            if old + suffix in state_dict:
                state_dict[new + suffix] = state_dict.pop(old + suffix)


@torch.no_grad()
def initialise_inverse_sqrt_d(
    W_enc: torch.Tensor, W_dec: torch.Tensor, decoder_init_norm: float | None
) -> None:
    """Normal decoder with standard deviation 1/sqrt(d_in), encoder its transpose, in place.

    `decoder_init_norm` is given to each row afterwards; None keeps norms near 1.
    """
    if W_dec.is_meta:
        return  # a checkpoint's weights will be assigned
    W_dec.normal_(std=1 / math.sqrt(W_dec.shape[1]))
    if decoder_init_norm is not None:
        W_dec.mul_(decoder_init_norm / W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    W_enc.copy_(W_dec.T)


class MultiScaleTrainingBase(KeepsFloat32, TrainingSAE[MultiScaleTrainingSAEConfig]):
    """Weights and buffers of the training SAE, and everything that is not the training step."""

    b_enc: nn.Parameter
    topk_threshold: torch.Tensor
    candidate_threshold: torch.Tensor
    firing_rate: torch.Tensor
    latent_group: torch.Tensor
    training_step: torch.Tensor
    mechanisms: Mechanisms
    input_units: InputUnits | None
    # None of these decides what the SAE is, and none is saved.
    ranks: Ranks
    machine: MachineSettings
    recorded_steps: RecordedSteps

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        if cfg.weight_init == "inverse_sqrt_d":
            initialise_inverse_sqrt_d(self.W_enc, self.W_dec, cfg.decoder_init_norm)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device))
        zero = torch.zeros((), dtype=torch.float32, device=self.device)
        firing_rate = torch.zeros(cfg.d_sae, dtype=torch.float32, device=self.device)
        self.register_exact(
            topk_threshold=zero,
            candidate_threshold=zero.clone(),
            firing_rate=firing_rate,
            latent_group=assign_groups(firing_rate, cfg.prefix_widths),
            # SAELens tells an SAE the step in training only, `encode` needs k always.
            training_step=torch.zeros((), dtype=torch.int64, device=self.device),
        )
        self.mechanisms = Mechanisms(cfg, self.device)
        self.ranks = ALONE
        self.machine = MachineSettings()
        self.recorded_steps = RecordedSteps()
        self.input_units = None
        if cfg.input_normalization == "first_batch":
            # [N] divides each token by its own norm, and its eps is in units of the activations.
            self.input_units = InputUnits(
                cfg.d_in, self.dtype, self.device, scales=not cfg.norm_scales
            )

    def take_step(self, given: StepInputs, schedule: StepSchedule) -> StepResults:
        """The equations of a training step on plain tensors."""
        raise NotImplementedError

    def in_units(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) activations -> (..., d_in) in the unit in which the SAE is trained."""
        return x if self.input_units is None else self.input_units(x).to(self.dtype)

    def from_units(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `in_units`."""
        return z if self.input_units is None else self.input_units.restore(z).to(self.dtype)

    def latent_unit(self) -> torch.Tensor | float:
        """What one latent in the training unit is worth in units of the activations."""
        return 1.0 if self.input_units is None else self.input_units.scale

    def decoder_norm(self) -> torch.Tensor | None:
        """(d_sae,) norms by which pre-activations are rescaled; None without the rescaling."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return None
        return self.W_dec.norm(dim=-1).clamp(min=1e-8)

    def scores(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """What BatchTopK ranks; the pre-activations themselves unless a mechanism changes them."""
        for mechanism in self.mechanisms:
            hidden_pre = mechanism.scores(hidden_pre, self.cfg)
        return hidden_pre

    def threshold(self) -> torch.Tensor:
        """() or (d_sae,) float32: what pre-activations are compared with in evaluation mode."""
        threshold = self.topk_threshold
        for mechanism in self.mechanisms:
            threshold = mechanism.threshold(threshold, self.cfg)
        return threshold

    def decoder_bias(self) -> torch.Tensor:
        """(d_in,) b_dec in units of the activations."""
        return self.from_units(self.b_dec)

    # ---- what a trainer sets and asks for -----------------------------------------------------

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let revival reset the optimiser state of the latents it re-aims."""
        if self.mechanisms.revivals is not None:
            self.mechanisms.revivals.optimizer = optimizer

    def attach_ranks(self, ranks: Ranks) -> None:
        """Train on a share of each batch: statistics, thresholds and counts are of all ranks."""
        self.ranks = ranks

    def attach_machine(self, machine: MachineSettings) -> None:
        """Compute steps as the training recipe says."""
        if machine.decode_kernel == "triton" and self.device.type != "cuda":
            raise InputError(
                f"decode_kernel must be 'auto' on device {str(self.device)!r}: the Triton kernels "
                f"run on CUDA devices; got {machine.decode_kernel!r}"
            )
        self.machine = machine

    def pop_events(self) -> list[dict[str, Any]]:
        """Revivals and their outcomes since the last call, oldest first."""
        revivals = self.mechanisms.revivals
        if revivals is None:
            return []
        events, revivals.events = revivals.events, []
        return events

    @property
    def can_be_recorded(self) -> bool:
        """Whether steps on a CUDA device are recorded and replayed."""
        return (
            self.machine.cuda_graphs
            and self.ranks.count == 1
            and all(mechanism.recordable(self.cfg) for mechanism in self.mechanisms)
        )

    def decode_kernel(self) -> DecodeKernel:
        """What sums decoder rows; in recorded steps starting a kernel of our own costs nothing."""
        chosen = self.machine.decode_kernel
        ours = chosen == "auto" and self.can_be_recorded and triton_runs_on(self.W_dec)
        return "triton" if ours else chosen

    @torch.no_grad()
    def export_order(self) -> torch.Tensor:
        """Order of the latents in the export, (d_sae,) long.

        Exported latent j is training latent `export_order()[j]`.

        Groups first, so that every trained prefix is a prefix of the export; the most frequent
        latents first within a group.
        """
        if len(self.cfg.prefix_widths) == 1 or self.cfg.prefix_sort_every == 0:
            return torch.arange(self.cfg.d_sae, device=self.device)
        by_rate = torch.argsort(self.firing_rate, descending=True, stable=True)
        return by_rate[torch.argsort(self.latent_group[by_rate], stable=True)]

    # ---- SAELens' folding and saving ----------------------------------------------------------

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise NotImplementedError(
                "fold_W_dec_norm on a training SAE with rescale_acts_by_decoder_norm=False would "
                "change which latents are selected: export it first and fold the export"
            )
        super().fold_W_dec_norm()

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        if self.input_units is not None:
            self.input_units.rescale_inputs(scaling_factor)
            if not self.cfg.norm_scales:
                self.cfg.normalize_activations = "none"
                return
        self._fold_scale(scaling_factor)

    def _fold_scale(self, scaling_factor: float) -> None:
        """Let the weights take inputs x instead of `scaling_factor` * x."""
        if self.mechanisms.normalisation is not None:
            # x_hat does not depend on the unit of the activations: only the bias and eps do.
            self.b_dec.div_(scaling_factor)
            self.mechanisms.normalisation.fold_scale(scaling_factor)
            self.cfg.normalize_activations = "none"
            return
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            # Pre-activations carry the decoder norm, which the fold has just divided.
            # Standardised scores carry the unit to the power that standardising leaves.
            self.topk_threshold /= scaling_factor ** (1 - self.cfg.standardise)
            self.candidate_threshold /= scaling_factor
            for mechanism in self.mechanisms:
                mechanism.fold_scale(scaling_factor)

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self, mean: torch.Tensor, whitening_matrix: torch.Tensor, unwhitening_matrix: torch.Tensor
    ) -> None:
        if self.input_units is not None:
            self._fold_units(self.input_units)
        if self.cfg.rescale_acts_by_decoder_norm:
            # Unwhitening changes the row norms; folding them first keeps the selection as it is.
            self.fold_W_dec_norm()
            self.cfg.rescale_acts_by_decoder_norm = False
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    def _fold_units(self, units: InputUnits) -> None:
        """Let the weights take activations instead of their values in the training unit."""
        self._fold_scale(1 / float(units.scale))
        self.b_dec.add_(units.shift)
        if not self.cfg.apply_b_dec_to_input:
            self.b_enc.sub_(units.shift.to(self.W_enc.dtype) @ self.W_enc)
        units.reset()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        _rename_old_tensors(state_dict)
        gone = ["mechanisms.neighbours.mean"]  # of the correlation, an option that was removed
        if self.mechanisms.orthogonality is None:  # which had its buffer even when it was off
            gone.append("mechanisms.orthogonality.input_variance")
        for name in gone:
            for suffix in ("", REMAINDER_SUFFIX):
                state_dict.pop(name + suffix, None)
        if self.input_units is not None and "input_units.shift" not in state_dict:
            # A checkpoint older than this module was trained in units of the activations.
            state_dict |= {f"input_units.{k}": v for k, v in self.input_units.identity().items()}
        super().process_state_dict_for_loading(state_dict)
