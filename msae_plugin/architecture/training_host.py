"""What SAELens calls of a training SAE: a step in its terms, metrics, calibration, export."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from msae_plugin.architecture.calibration import calibrate_multiscale
from msae_plugin.architecture.export import exported_tensors
from msae_plugin.architecture.kernels.replay import replayed_step
from msae_plugin.architecture.losses import assign_groups
from msae_plugin.architecture.mechanisms.base import Step
from msae_plugin.architecture.mechanisms.orthogonality import mean_nearest_cosine
from msae_plugin.architecture.step_schedule import (
    DeadLatents,
    EncoderInput,
    StepInputs,
    StepSchedule,
)
from msae_plugin.architecture.training_base import MultiScaleTrainingBase

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _never_compiled(method: _Method) -> _Method:
    # SAELens' runner compiles what calls it, with compile_sae=True, and Inductor lets running means
    # be overwritten without a word (pytorch issue 183575).
    return cast("_Method", torch.compiler.disable(method))


class HostedTrainingSAE(MultiScaleTrainingBase):
    """SAELens' side of a training SAE; the equations are in `training_sae.py`."""

    def normalise(self, x_c: torch.Tensor, *, constant_input: bool = False) -> EncoderInput:
        """What the encoder takes."""
        raise NotImplementedError

    def pre_activations(self, given: EncoderInput) -> torch.Tensor:
        """(..., d_sae) pre-activations."""
        raise NotImplementedError

    def auxk(
        self, dead: DeadLatents | None, given: EncoderInput, residual: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The weighted AuxK loss."""
        raise NotImplementedError

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        if self.cfg.l1_coefficient == 0:
            return {}
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One training step: selection, nested and multi-budget reconstruction, losses.

        Args:
            step_input: `sae_in` (n_tokens, d_in) or (batch, seq, d_in), the step, dead latents.

        Returns:
            SAELens' output. The losses are in the training unit (`input_normalization`), the rest
            is in units of the activations. `feature_acts` and `hidden_pre` carry no gradient of
            their own: the loss reaches the weights over the active latents only.
        """
        return self._forward_pass(step_input)

    @_never_compiled
    def _forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        shape, step = step_input.sae_in.shape, step_input.n_training_steps
        activations = step_input.sae_in.to(self.dtype).reshape(-1, shape[-1])
        if step == 0 and self.input_units is not None:
            self.input_units.estimate(activations, self.ranks)
        sae_in = self.in_units(activations)
        schedule = StepSchedule.at(self.cfg, step, sae_in.shape[0] * self.ranks.count)
        self._before_step(sae_in, schedule)
        dead = self._dead_latents(step_input.dead_neuron_mask)
        given = StepInputs(sae_in, dead, step_input.coefficients.get("l1", 0.0))
        results = replayed_step(self, given, schedule)
        if results is None:
            results = self.take_step(given, schedule)
        # The copies cost a pass over (n_tokens, d_sae) each: none without a training unit.
        latents, hidden_pre = results.feature_acts, results.hidden_pre
        if self.input_units is not None:
            latents, hidden_pre = latents * self.latent_unit(), hidden_pre * self.latent_unit()
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=self.from_units(results.sae_out).reshape(shape),
            feature_acts=latents.reshape(*shape[:-1], self.cfg.d_sae),
            hidden_pre=hidden_pre.reshape(*shape[:-1], self.cfg.d_sae),
            loss=results.loss,
            losses=results.terms,
            metrics=self._metrics(step_input),
        )

    @torch.no_grad()
    def _before_step(self, sae_in: torch.Tensor, schedule: StepSchedule) -> None:
        """What changes weights or order before the step: unit norms, prefixes, mechanisms."""
        cfg, now = self.cfg, schedule.step
        if cfg.unit_norm_decoder:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
        if cfg.prefix_sort_every and now and now % cfg.prefix_sort_every == 0:
            self.latent_group.copy_(assign_groups(self.firing_rate, cfg.prefix_widths))
        step = Step(self, sae_in, schedule, list(self.mechanisms))
        for mechanism in step.switched_on:
            mechanism.before_step(step)
        self.training_step.fill_(now)

    def _dead_latents(self, mask: torch.Tensor | None) -> DeadLatents | None:
        """Which latents AuxK trains; None when there are none, for which the host has to wait."""
        if mask is None or self.cfg.aux_loss_coefficient == 0:
            return None
        return DeadLatents.listed(mask)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """AuxK alone, for hosts that call it; `training_forward_pass` adds the other terms."""
        sae_in = self.in_units(step_input.sae_in)
        dead = self._dead_latents(step_input.dead_neuron_mask)
        given = self.normalise(self.process_sae_in(sae_in))
        return self.auxk(dead, given, sae_in - self.in_units(sae_out))

    @torch.no_grad()
    def _metrics(self, step_input: TrainStepInput) -> dict[str, Any]:
        cfg, step = self.cfg, step_input.n_training_steps
        metrics: dict[str, Any] = {
            "k": cfg.k_at(step),
            "topk_threshold": self.topk_threshold * self.latent_unit(),
        }
        if not step_input.is_logging_step:
            return metrics
        if cfg.d_sae > 1:
            rows = cfg.orthogonality_chunk_size
            metrics["nearest_cosine"] = mean_nearest_cosine(self.W_dec, rows)
        for mechanism in self.mechanisms:
            metrics |= mechanism.metrics(cfg, step)
        return metrics

    def errors(self, sae_in: torch.Tensor) -> torch.Tensor:
        """(n_tokens, d_in) input minus reconstruction, in the training unit."""
        activations = self.from_units(sae_in)
        return sae_in - self.in_units(self.decode(self.encode(activations)))

    @torch.no_grad()
    def calibrate_threshold(self, batches: Iterable[torch.Tensor]) -> dict[str, float]:
        """Set the threshold so that the mean L0 over these activations is exactly k.

        Args:
            batches: Activations, each (n_tokens, d_in), scaled as training batches are.

        Returns:
            `l0_before`, `l0_after` and `threshold` (mean over the latents).

        Raises:
            RunFailure: No batch was given.
        """
        # Training is over: what a recorded step holds is wanted for other things.
        self.recorded_steps.give_up()

        def hidden_pre_of(batch: torch.Tensor) -> torch.Tensor:
            sae_in = self.in_units(batch.to(self.device))
            return self.pre_activations(self.normalise(self.process_sae_in(sae_in)))

        return calibrate_multiscale(self, list(batches), hidden_pre_of)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        state_dict.clear()
        state_dict.update(exported_tensors(self))
