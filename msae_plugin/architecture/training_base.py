"""A training SAE between its steps: weights, thresholds, encoding, folding, saving.

The step itself, with its losses, is in `training_sae.py`.

Law: the export gives the latents and reconstructions of the trained SAE in evaluation mode, to
float32 rounding, with latents in `export_order()` and a decoder of unit norm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import save_file
from torch import nn
from typing_extensions import override

from msae_plugin.architecture.calibration import calibrated_cut
from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.float32_buffers import (
    KeepsFloat32,
    add_remainders,
    exact_dtypes,
    restore_exact,
)
from msae_plugin.architecture.input_units import InputUnits
from msae_plugin.architecture.kernels.static_selection import (
    needs_static_shapes,
    static_batch_top_k,
)
from msae_plugin.architecture.mechanisms.collection import Mechanisms
from msae_plugin.architecture.mechanisms.firing_floor import thresholds_at_rate
from msae_plugin.architecture.mechanisms.skip import with_skip
from msae_plugin.architecture.nested import assign_rings
from msae_plugin.architecture.ranks import Ranks
from msae_plugin.architecture.selection import (
    CANDIDATE_SHARE,
    Selection,
    above_threshold,
    batch_top_k,
)
from msae_plugin.architecture.step_schedule import (
    Budgets,
    Number,
    StepInputs,
    StepResults,
    StepSchedule,
)
from msae_plugin.common.errors import InputError, RunFailure

if TYPE_CHECKING:
    from msae_plugin.architecture.config import MultiScaleSAEConfig


@torch.no_grad()
def initialise_inverse_sqrt_d(
    W_enc: torch.Tensor, W_dec: torch.Tensor, decoder_init_norm: float | None
) -> None:
    """Normal decoder with standard deviation 1/sqrt(d_in), encoder its transpose, in place.

    Args:
        W_enc: (d_in, d_sae).
        W_dec: (d_sae, d_in).
        decoder_init_norm: Norm given to each row afterwards; None keeps norms near 1.
    """
    if W_dec.is_meta:
        return  # a checkpoint's weights will be assigned
    W_dec.normal_(std=1 / math.sqrt(W_dec.shape[1]))
    if decoder_init_norm is not None:
        W_dec.mul_(decoder_init_norm / W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    W_enc.copy_(W_dec.T)


class MultiScaleTrainingBase(KeepsFloat32, TrainingSAE[MultiScaleTrainingSAEConfig]):
    """Weights and buffers of the training SAE, and everything that is not the training step.

    Args:
        cfg: Configuration.
        use_error_term: As in SAELens.
    """

    b_enc: nn.Parameter
    topk_threshold: torch.Tensor
    candidate_cut: torch.Tensor
    firing_rate: torch.Tensor
    latent_ring: torch.Tensor
    training_step: torch.Tensor
    mechanisms: Mechanisms
    input_units: InputUnits | None

    exact_tensor_names = (
        "topk_threshold",
        "candidate_cut",
        "firing_rate",
        "latent_ring",
        "training_step",
    )

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        if cfg.weight_init == "inverse_sqrt_d":
            initialise_inverse_sqrt_d(self.W_enc, self.W_dec, cfg.decoder_init_norm)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device))
        self.register_buffer(
            "topk_threshold", torch.zeros((), dtype=torch.float32, device=self.device)
        )
        self.register_buffer(
            "candidate_cut", torch.zeros((), dtype=torch.float32, device=self.device)
        )
        self.register_buffer(
            "firing_rate", torch.zeros(cfg.d_sae, dtype=torch.float32, device=self.device)
        )
        self.register_buffer("latent_ring", assign_rings(self.firing_rate, cfg.prefix_widths))
        # Steps completed; SAELens tells an SAE the step in training only, `encode` needs k always.
        self.register_buffer(
            "training_step", torch.zeros((), dtype=torch.int64, device=self.device)
        )
        self.mechanisms = Mechanisms(cfg, self.dtype, self.device)
        self.input_units = None
        if cfg.input_normalization == "first_batch":
            # [N] divides each token by its own norm, and its eps is in units of the activations.
            self.input_units = InputUnits(
                cfg.d_in, self.dtype, self.device, scales=not cfg.norm_scales
            )

    def in_units(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) activations -> (..., d_in) in the unit in which the SAE is trained."""
        return x if self.input_units is None else self.input_units(x).to(self.dtype)

    def from_units(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `in_units`."""
        return z if self.input_units is None else self.input_units.restore(z).to(self.dtype)

    def latent_unit(self) -> torch.Tensor | float:
        """What one latent in the training unit is worth in units of the activations."""
        return 1.0 if self.input_units is None else self.input_units.scale

    def normalise(self, x_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N], [A]: (..., d_in) -> x_hat (..., d_in) and scale(x) (..., 1), None when off."""
        if self.mechanisms.normalisation is None:
            return x_c, None
        return self.mechanisms.normalisation(x_c)

    def pre_activations(
        self, x_hat: torch.Tensor, decoder_norm: torch.Tensor | None
    ) -> torch.Tensor:
        """(..., d_in) -> (..., d_sae): x_hat @ W_enc + b_enc, as if the decoder had unit norm."""
        hidden_pre = x_hat @ self.W_enc + self.b_enc
        return hidden_pre if decoder_norm is None else hidden_pre * decoder_norm

    def decoder_norm(self) -> torch.Tensor | None:
        """(d_sae,) norms by which pre-activations are rescaled; None without the rescaling."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return None
        return self.W_dec.norm(dim=-1).clamp(min=1e-8)

    def select(
        self, hidden_pre: torch.Tensor, k: Number, budgets: Budgets | None = None
    ) -> Selection:
        """[Z], [S]: active pairs of (n_tokens, d_sae) pre-activations in training mode.

        Args:
            hidden_pre: (n_tokens, d_sae).
            k: Target L0.
            budgets: What k allows in this batch; counted anew if None.
        """
        statistics = self.mechanisms.statistics
        if self.cfg.selection == "zscore" and statistics is not None:
            return above_threshold(hidden_pre, statistics.threshold(), self.ranks)
        scores, cut = self.scores(hidden_pre), 0.0
        if self.ranks.count == 1 and needs_static_shapes(hidden_pre):
            if budgets is None:
                n_tokens, d_sae = hidden_pre.shape
                budgets = Budgets.of(float(k), self.cfg.sparsity_scales, n_tokens, d_sae)
            return static_batch_top_k(hidden_pre, scores, budgets)
        if self.cfg.standardise == 0:
            cut = CANDIDATE_SHARE * float(self.candidate_cut)
        return batch_top_k(hidden_pre, scores, float(k), self.cfg.sparsity_scales, cut, self.ranks)

    def scores(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """[Z]: what BatchTopK ranks; the pre-activations unless standardised or helped."""
        statistics, floor = self.mechanisms.statistics, self.mechanisms.firing_floor
        if statistics is not None:
            strength = 1.0 if self.cfg.selection == "zscore" else self.cfg.standardise
            return statistics.standardised(hidden_pre, strength)
        return hidden_pre if floor is None else hidden_pre + floor.allowance

    def threshold(self) -> torch.Tensor:
        """() or (d_sae,) float32: what pre-activations are compared with in evaluation mode."""
        statistics, floor = self.mechanisms.statistics, self.mechanisms.firing_floor
        if statistics is None:
            cut = self.topk_threshold
            return cut if floor is None else (cut - floor.allowance).clamp(min=0)
        if self.cfg.selection == "zscore":
            return statistics.threshold().clamp(min=0)
        return statistics.threshold_of_score(self.topk_threshold, self.cfg.standardise).clamp(min=0)

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and pre-activations, dense and differentiable.

        Args:
            x: (..., d_in) activations.

        Returns:
            feature_acts (..., d_sae) and hidden_pre (..., d_sae), in units of the activations.
        """
        x_hat, token_scale = self.normalise(self.process_sae_in(self.in_units(x)))
        hidden_pre = self.hook_sae_acts_pre(self.pre_activations(x_hat, self.decoder_norm()))
        if self.training:
            flat = hidden_pre.detach().reshape(-1, self.cfg.d_sae)
            chosen = self.select(flat, self.cfg.k_at(int(self.training_step)))
            active = torch.zeros_like(flat, dtype=torch.bool)
            within = chosen.active()
            active[chosen.tokens[within], chosen.latents[within]] = True
            active = active.reshape(hidden_pre.shape)
        else:
            active = hidden_pre > self.threshold()
        feature_acts = hidden_pre.relu() * active
        if token_scale is not None:
            feature_acts = feature_acts * token_scale
        unit = self.latent_unit()
        return self.hook_sae_acts_post(feature_acts * unit), hidden_pre * unit

    def decoder_bias(self) -> torch.Tensor:
        """(d_in,) b_dec in units of the activations."""
        return self.from_units(self.b_dec)

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(..., d_sae) -> (..., d_in): f @ W_dec + b_dec, over unit rows when rescaled."""
        norm = self.decoder_norm()
        coefficients = feature_acts if norm is None else feature_acts / norm
        sae_out = self.hook_sae_recons(coefficients @ self.W_dec + self.decoder_bias())
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction, plus the skip connection when on (docs/method.md, "Skip")."""
        sae_out = super().forward(x)
        if self.cfg.skip_scale == 0 or self.use_error_term:
            return sae_out
        return with_skip(sae_out, x, self.decoder_bias(), self.cfg.skip_scale)

    # ---- what our trainer asks for ------------------------------------------------------------

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let revival reset the optimiser state of the latents it re-aims."""
        self.mechanisms.optimizer = optimizer

    @property
    def ranks(self) -> Ranks:
        """The processes that share each training batch; `ALONE` unless attached."""
        return self.mechanisms.ranks

    def attach_ranks(self, ranks: Ranks) -> None:
        """Train on a share of each batch: statistics, cuts and counts are those of all ranks."""
        self.mechanisms.ranks = ranks

    def pop_events(self) -> list[dict[str, Any]]:
        """Revivals and their outcomes since the last call, oldest first."""
        events, self.mechanisms.events = self.mechanisms.events, []
        return events

    @torch.no_grad()
    def calibrate_threshold(self, batches: Iterable[torch.Tensor]) -> dict[str, float]:
        """Set the cut so that the mean L0 over these activations is exactly k.

        With a firing floor, every latent gets the threshold at which it fires at the floor, where
        that is below the cut; training leaves it somewhere around.

        Args:
            batches: Activations, each (n_tokens, d_in), scaled as training batches are.

        Returns:
            `l0_before`, `l0_after` and `threshold` (mean over the latents).

        Raises:
            RunFailure: No batch was given.
        """
        # Training is over: what a recorded step holds is wanted for other things.
        self.mechanisms.recorded_steps.give_up()
        kept = list(batches)
        decoder_norm = self.decoder_norm()

        def hidden_pre_of(batch: torch.Tensor) -> torch.Tensor:
            x_hat, _ = self.normalise(self.process_sae_in(self.in_units(batch.to(self.device))))
            return self.pre_activations(x_hat, decoder_norm)

        def mean_l0() -> float:
            active = sum(int((hidden_pre_of(b) > self.threshold()).sum()) for b in kept)
            return active / sum(batch.shape[0] for batch in kept)

        if not kept:
            raise RunFailure(
                "calibrate_threshold needs at least one batch of activations; got none"
            )
        before = mean_l0()
        floor, lowest, scores = self.mechanisms.firing_floor, None, self.scores
        if floor is not None:
            lowest = thresholds_at_rate(kept, hidden_pre_of, self.cfg.floor_rate(self.cfg.k))
        if lowest is not None:
            # What the floor admits is active whatever the cut is.
            scores = partial(_above_all, lowest)
        cut = calibrated_cut(kept, hidden_pre_of, scores, self.cfg.k)
        if cut is not None and not isfinite(cut):
            # Tokens are so alike that the floor alone would take the whole budget.
            lowest = None
            cut = calibrated_cut(kept, hidden_pre_of, self.scores, self.cfg.k)
        assert cut is not None, "there are batches"
        if floor is not None and lowest is not None:
            floor.allow_down_to(lowest, cut)
        statistics = self.mechanisms.statistics
        if self.cfg.selection == "batchtopk":
            self.topk_threshold.fill_(cut)
        elif self.cfg.zscore_z_lr > 0 and statistics is not None:
            statistics.z.fill_(cut)
        return {
            "l0_before": before,
            "l0_after": mean_l0(),
            "threshold": float(self.threshold().mean() * self.latent_unit()),
        }

    @torch.no_grad()
    def export_order(self) -> torch.Tensor:
        """Order of the latents in the export, (d_sae,) long.

        Exported latent j is training latent `export_order()[j]`.

        Rings first, so that every trained prefix is a prefix of the export; the most frequent
        latents first within a ring.
        """
        if len(self.cfg.prefix_widths) == 1 or self.cfg.prefix_sort_every == 0:
            return torch.arange(self.cfg.d_sae, device=self.device)
        by_rate = torch.argsort(self.firing_rate, descending=True, stable=True)
        return by_rate[torch.argsort(self.latent_ring[by_rate], stable=True)]

    @torch.no_grad()
    def to_export_units(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Latents (..., d_sae) of this SAE in the order and units of its export (unit decoder)."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts * self.get_W_dec_norm()
        return feature_acts[..., self.export_order()]

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
            self.mechanisms.normalisation.fold_input_scaling(scaling_factor)
            self.cfg.normalize_activations = "none"
            return
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            # Pre-activations carry the decoder norm, which the fold has just divided.
            # Standardised scores carry the unit to the power that standardising leaves.
            self.topk_threshold /= scaling_factor ** (1 - self.cfg.standardise)
            self.candidate_cut /= scaling_factor
            if self.mechanisms.statistics is not None:
                self.mechanisms.statistics.rescale(1 / scaling_factor)
            if self.mechanisms.firing_floor is not None:
                self.mechanisms.firing_floor.rescale(1 / scaling_factor)

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
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        add_remainders(state_dict, exact_dtypes(self))

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        if self.input_units is not None and "input_units.shift" not in state_dict:
            # A checkpoint older than this module was trained in units of the activations.
            state_dict |= {f"input_units.{k}": v for k, v in self.input_units.identity().items()}
        restore_exact(state_dict, exact_dtypes(self))

    def take_step(self, given: StepInputs, schedule: StepSchedule) -> StepResults:
        """One training step on plain tensors, which can be recorded (`kernels/replay.py`).

        Args:
            given: The batch.
            schedule: The numbers of the step.

        Raises:
            NotImplementedError: The subclass defines no step.
        """
        raise NotImplementedError

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        state_dict.clear()
        state_dict.update(exported_tensors(self))


def _above_all(threshold: torch.Tensor, hidden_pre: torch.Tensor) -> torch.Tensor:
    """Scores that keep what exceeds its latent's threshold before anything else."""
    return torch.where(hidden_pre > threshold, torch.inf, hidden_pre)


_EXACT_EXPORT_TENSORS = {
    "threshold": torch.float32,
    "normalisation.running_variance": torch.float32,
}


@torch.no_grad()
def exported_tensors(sae: MultiScaleTrainingBase) -> dict[str, torch.Tensor]:
    """State dict of the inference SAE.

    Args:
        sae: The trained SAE; it is not changed.

    Returns:
        `W_enc` (d_in, d_sae), `b_enc` (d_sae,), `W_dec` (d_sae, d_in) with unit rows, `b_dec`
        (d_in,), `threshold` (d_sae,) float32, and the tensors of the normalisation when on.
    """
    folded = _folded_weights(sae)
    normalisation = sae.mechanisms.normalisation
    if normalisation is not None:
        for name, tensor in normalisation.state_dict().items():
            if name == "running_variance" or not sae.cfg.norm_folds_to_affine:
                folded[f"normalisation.{name}"] = tensor.clone()
    add_remainders(folded, _EXACT_EXPORT_TENSORS)
    return folded


def _folded_weights(sae: MultiScaleTrainingBase) -> dict[str, torch.Tensor]:
    dtype = torch.promote_types(sae.dtype, torch.float32)
    W_enc, b_enc = sae.W_enc.to(dtype), sae.b_enc.to(dtype)
    W_dec, norm = sae.W_dec.to(dtype), sae.get_W_dec_norm().to(dtype)
    threshold = sae.threshold().to(dtype).expand(sae.cfg.d_sae)
    if not sae.cfg.rescale_acts_by_decoder_norm:
        threshold = threshold * norm  # its pre-activations have not yet been multiplied by norms
    W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    normalisation = sae.mechanisms.normalisation
    if normalisation is not None and sae.cfg.norm_folds_to_affine:
        gain, bias, constant = (part.to(W_enc) for part in normalisation.affine())
        b_enc = (b_enc + bias @ W_enc) / constant
        W_enc = gain[:, None] * W_enc / constant
        threshold = threshold / constant
    b_dec = sae.b_dec.detach()
    if sae.input_units is not None:
        unit, shift = sae.input_units.scale.to(dtype), sae.input_units.shift.to(dtype)
        b_enc, threshold = b_enc * unit, threshold * unit
        if not sae.cfg.apply_b_dec_to_input:
            b_enc = b_enc - shift @ W_enc
        b_dec = sae.decoder_bias().detach()
    order = sae.export_order()
    return {
        "W_enc": W_enc[:, order].to(sae.dtype).contiguous(),
        "b_enc": b_enc[order].to(sae.dtype).contiguous(),
        "W_dec": W_dec[order].to(sae.dtype).contiguous(),
        "b_dec": b_dec.clone(),
        "threshold": threshold[order].to(torch.float32).contiguous(),
    }


def twin_obstacle(cfg: MultiScaleSAEConfig | MultiScaleTrainingSAEConfig) -> str | None:
    """Why no JumpReLU twin of a configuration exists; None when it does.

    Args:
        cfg: Configuration of a training or an exported SAE.

    Returns:
        One line, or None.
    """
    if cfg.norm_scales:
        return (
            f"norm_scales={cfg.norm_scales} divides each token by its own norm, which JumpReLU "
            "cannot express"
        )
    if cfg.skip_scale:
        return f"skip_scale={cfg.skip_scale} adds the input in forward, which JumpReLU does not"
    return None


def save_jumprelu_twin(sae: MultiScaleTrainingBase, path: Path) -> None:
    """Write a checkpoint that SAELens loads without this package, with equal latents.

    Args:
        sae: The trained SAE.
        path: Folder for `cfg.json` and `sae_weights.safetensors`; made when missing.

    Raises:
        InputError: The configuration has no twin.
    """
    obstacle = twin_obstacle(sae.cfg)
    if obstacle is not None:
        raise InputError(f"no jumprelu twin: {obstacle}")
    path.mkdir(parents=True, exist_ok=True)
    save_file(_folded_weights(sae), path / SAE_WEIGHTS_FILENAME)
    exported: dict[str, Any] = sae.cfg.get_inference_sae_cfg_dict()
    twin = JumpReLUSAEConfig(
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        dtype=sae.cfg.dtype,
        device=sae.cfg.device,
        apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        normalize_activations=sae.cfg.normalize_activations,
        reshape_activations=sae.cfg.reshape_activations,
    ).to_dict()
    twin["metadata"] = exported["metadata"]
    (path / SAE_CFG_FILENAME).write_text(json.dumps(twin), encoding="utf-8")
