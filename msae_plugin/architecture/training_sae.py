"""The training SAE: docs/method.md, equation by equation, each a call.

x       = (activations - shift) / scale               first batch; folded at export
x_c     = x - b_dec
x_hat   = normalise(x_c)                              [N], [A]
pre     = x_hat @ W_enc + b_enc
f       = scale(x) * select(pre)                      [Z], [S]
x_rec   = f @ W_dec + b_dec, for every nested prefix and sparsity budget
loss    = reconstruction + AuxK + L1 + orthogonality  [S], [G], [O]
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from msae_plugin.architecture import nested
from msae_plugin.architecture.auxk import DeadLatents, auxk_loss
from msae_plugin.architecture.kernels.decoding import active_preactivations, scale_gradient
from msae_plugin.architecture.kernels.replay import replayed_step
from msae_plugin.architecture.nested import Reconstructions, assign_rings, decode_nested
from msae_plugin.architecture.selection import Selection, running_rate
from msae_plugin.architecture.step_schedule import StepInputs, StepResults, StepSchedule
from msae_plugin.architecture.training_base import MultiScaleTrainingBase


class MultiScaleTrainingSAE(MultiScaleTrainingBase):
    """Multi-scale orthogonal SAE, trained with SAELens.

    In training mode `encode` selects over the batch (BatchTopK); in evaluation mode it compares
    each pre-activation with a threshold and is a deterministic function of one token.

    Args:
        cfg: Configuration; every mechanism is switched there.
        use_error_term: As in SAELens.
    """

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

    # SAELens' runner compiles what calls it, with compile_sae=True: Inductor lets running means be
    # overwritten, without a word (pytorch issue 183575).
    @torch.compiler.disable
    def _forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        shape = step_input.sae_in.shape
        step = step_input.n_training_steps
        activations = step_input.sae_in.to(self.dtype).reshape(-1, shape[-1])
        if step == 0 and self.input_units is not None:
            self.input_units.estimate(activations, self.ranks)
        sae_in = self.in_units(activations)
        self._prepare_step(sae_in, step)
        given = StepInputs(
            sae_in=sae_in,
            dead=self._dead_latents(step_input.dead_neuron_mask),
            l1_coefficient=step_input.coefficients.get("l1", 0.0),
        )
        schedule = StepSchedule.at(self.cfg, step, sae_in.shape[0] * self.ranks.count)
        results = replayed_step(self, given, schedule)
        if results is None:
            results = self.take_step(given, schedule)
        unit = self.latent_unit()
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=self.from_units(results.sae_out).reshape(shape),
            feature_acts=(results.feature_acts * unit).reshape(*shape[:-1], self.cfg.d_sae),
            hidden_pre=(results.hidden_pre * unit).reshape(*shape[:-1], self.cfg.d_sae),
            loss=results.loss,
            losses=results.terms,
            metrics=self._metrics(step_input),
        )

    @override
    def take_step(self, given: StepInputs, schedule: StepSchedule) -> StepResults:
        """The equations of a step, with what follows them over time.

        Args:
            given: The batch and what the host said of it.
            schedule: The numbers of the step.
        """
        sae_in = given.sae_in
        x_c = self.process_sae_in(sae_in)
        x_hat, token_scale = self.normalise(x_c)
        with torch.no_grad():
            decoder_norm = self.decoder_norm()
            hidden_pre = self.hook_sae_acts_pre(self.pre_activations(x_hat, decoder_norm))
            self.mechanisms.observe_preactivations(hidden_pre, schedule.step)
        selection = self.select(hidden_pre, schedule.k, schedule.budgets)
        coefficients = self.decoder_coefficients(
            selection, x_hat, token_scale, decoder_norm, self._centre(sae_in)
        )
        reconstructions = self.reconstruct(selection, coefficients, sae_in.shape[0])
        feature_acts = self._dense_latents(selection, token_scale, sae_in.shape[0])

        target = sae_in - self.cfg.skip_scale * x_c if self.cfg.skip_scale else sae_in
        weight = None
        if self.cfg.token_loss_weight != "none":
            weight = nested.token_weight(x_c, self.ranks)
        terms = nested.reconstruction_losses(
            self.cfg, reconstructions, target, weight, self._tier_scales()
        )
        residual = target - reconstructions.main
        terms |= self._auxiliary_losses(given, x_hat, token_scale, decoder_norm, residual, weight)
        terms |= self._sparsity_and_orthogonality(given, schedule, selection, coefficients)

        self._update_statistics(selection, feature_acts, schedule)
        sae_out = reconstructions.main
        if self.cfg.skip_scale:
            sae_out = sae_out + (sae_in - target)
        return StepResults(
            terms=terms,
            loss=torch.stack(list(terms.values())).sum(),
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
        )

    def decoder_coefficients(
        self,
        selection: Selection,
        x_hat: torch.Tensor,
        token_scale: torch.Tensor | None,
        decoder_norm: torch.Tensor | None,
        centre: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(n_pairs,) coefficients of the raw decoder rows, differentiable in the encoder.

        The decoder norm by which pre-activations are rescaled cancels in the reconstruction, so it
        is divided out here and carries no gradient.
        """
        tokens, latents = selection.tokens, selection.latents
        values = selection.values.to(torch.promote_types(selection.values.dtype, torch.float32))
        if decoder_norm is not None:
            values = values / decoder_norm.detach()[latents]
        kernel = self.mechanisms.decode_kernel(self.W_dec)
        values = active_preactivations(
            x_hat, self.W_enc, self.b_enc, values, tokens, latents, kernel, centre
        )
        values = selection.without_padding(values)
        if token_scale is not None:
            values = values * token_scale.squeeze(-1)[tokens]
        if self.mechanisms.importance is not None:
            factors = self.mechanisms.importance.factors(self.cfg.importance_power)
            values = scale_gradient(values, factors[latents])
        return values

    def _centre(self, sae_in: torch.Tensor) -> torch.Tensor | None:
        """(d_in,) b_dec where x_hat is the constant input less b_dec; None otherwise."""
        centred = self.cfg.apply_b_dec_to_input and self.mechanisms.normalisation is None
        return self.b_dec if centred and not sae_in.requires_grad else None

    def reconstruct(
        self, selection: Selection, coefficients: torch.Tensor, n_tokens: int
    ) -> Reconstructions:
        """[S]: every nested prefix and every sparsity budget, from one decoding pass."""
        W_dec: torch.Tensor = self.W_dec
        if self.mechanisms.importance is not None:
            factors = self.mechanisms.importance.factors(self.cfg.importance_power)
            W_dec = scale_gradient(W_dec, factors[:, None])
        return decode_nested(
            selection,
            coefficients,
            W_dec,
            self.b_dec,
            ring_of_latent=self.latent_ring,
            n_rings=len(self.cfg.prefix_widths),
            n_tiers=len(self._tier_scales()) + 1,
            n_tokens=n_tokens,
            detach_inner=self.cfg.detach_inner_prefixes,
            kernel=self.mechanisms.decode_kernel(self.W_dec),
        )

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
        x_hat, token_scale = self.normalise(self.process_sae_in(sae_in))
        norm = self.decoder_norm()
        detached_norm = norm.detach() if norm is not None else None
        residual = sae_in - self.in_units(sae_out)
        given = StepInputs(sae_in, self._dead_latents(step_input.dead_neuron_mask))
        return self._auxiliary_losses(given, x_hat, token_scale, detached_norm, residual, None)

    def _tier_scales(self) -> list[float]:
        """Further sparsity budgets in the order in which they are reconstructed."""
        return sorted(self.cfg.sparsity_scales)

    def _dead_latents(self, mask: torch.Tensor | None) -> DeadLatents | None:
        """Which latents AuxK trains; None when there are none, for which the host has to wait."""
        if mask is None or self.cfg.aux_loss_coefficient == 0:
            return None
        return DeadLatents.listed(mask)

    def _auxiliary_losses(
        self,
        given: StepInputs,
        x_hat: torch.Tensor,
        token_scale: torch.Tensor | None,
        decoder_norm: torch.Tensor | None,
        residual: torch.Tensor,
        token_weight: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        coefficient = self.cfg.aux_loss_coefficient
        if coefficient == 0:
            return {}
        if given.dead is None:
            return {"auxiliary_reconstruction_loss": residual.new_zeros(())}
        weights = (self.W_enc, self.b_enc, self.W_dec)
        loss = auxk_loss(
            x_hat, token_scale, residual, *weights, given.dead, token_weight, decoder_norm
        )
        return {"auxiliary_reconstruction_loss": coefficient * loss}

    def _sparsity_and_orthogonality(
        self,
        given: StepInputs,
        schedule: StepSchedule,
        selection: Selection,
        coefficients: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = {}
        sae_in = given.sae_in
        if given.l1_coefficient:
            norm = self.W_dec.norm(dim=-1).clamp(min=1e-8)
            terms["l1_loss"] = given.l1_coefficient * nested.l1_loss(
                selection, coefficients, norm, self.mechanisms.l1_weights(), sae_in.shape[0]
            )
        self.mechanisms.observe_inputs(sae_in, schedule.input_variance_rate)
        penalty = self.mechanisms.orthogonality(self.W_dec, schedule.step)
        if penalty is not None:
            terms["orthogonality_loss"] = penalty
        return terms

    @torch.no_grad()
    def _prepare_step(self, sae_in: torch.Tensor, step: int) -> None:
        """What changes weights or order before the step: unit norms, rings, [R]."""
        cfg = self.cfg
        if cfg.unit_norm_decoder:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
        if cfg.prefix_sort_every and step and step % cfg.prefix_sort_every == 0:
            self.latent_ring.copy_(assign_rings(self.firing_rate, cfg.prefix_widths))
        if cfg.revival_every and step and step % cfg.revival_every == 0:
            self.mechanisms.revive(
                lambda: self._errors(sae_in),
                self.W_enc,
                self.b_enc,
                self.W_dec,
                sae_in.shape[0] * self.ranks.count,
                step,
            )
        self.training_step.fill_(step)
        if self.mechanisms.normalisation is not None:
            rate = running_rate(1 - cfg.firing_rate_decay, step)
            x_c = self.process_sae_in(sae_in)
            self.mechanisms.normalisation.update_running_variance(x_c, rate, self.ranks)

    def _errors(self, sae_in: torch.Tensor) -> torch.Tensor:
        """(n_tokens, d_in) reconstruction errors in the training unit."""
        activations = self.from_units(sae_in)
        return sae_in - self.in_units(self.decode(self.encode(activations)))

    @torch.no_grad()
    def _dense_latents(
        self, selection: Selection, token_scale: torch.Tensor | None, n_tokens: int
    ) -> torch.Tensor:
        """(n_tokens, d_sae) latents at the budget k."""
        values = selection.values.to(torch.promote_types(selection.values.dtype, torch.float32))
        if token_scale is not None:
            values = values * token_scale.squeeze(-1)[selection.tokens]
        dense = values.new_zeros(n_tokens, self.cfg.d_sae)
        dense[selection.tokens, selection.latents] = values * selection.active()
        return self.hook_sae_acts_post(dense)

    @torch.no_grad()
    def _update_statistics(
        self, selection: Selection, feature_acts: torch.Tensor, schedule: StepSchedule
    ) -> None:
        """Everything that is followed over time; buffers only, no synchronisation needed."""
        cfg = self.cfg
        cut = selection.cut.float()
        known = cut < torch.inf  # neither infinity, of nothing active, nor NaN
        self.topk_threshold.lerp_(
            torch.where(known, cut, self.topk_threshold), schedule.threshold_rate
        )
        lowest = selection.lowest_score.float()
        self.candidate_cut.copy_(lowest.masked_fill(~(lowest < torch.inf), 0.0))

        active = selection.active()
        fired = torch.zeros(cfg.d_sae, dtype=torch.int64, device=active.device)
        fired.index_add_(0, selection.latents, active.long())
        fired = self.ranks.sum(fired)
        share = fired.float() / (feature_acts.shape[0] * self.ranks.count)
        self.firing_rate.lerp_(share, schedule.firing_rate_rate)
        self.mechanisms.follow_firing_floor(
            self.firing_rate, schedule.floor_rate, cut.masked_fill(~known, 0.0)
        )
        self.mechanisms.observe_latents(
            self.W_dec,
            feature_acts,
            selection.tokens,
            selection.latents,
            fired,
            schedule.step,
            schedule.k,
        )

    @torch.no_grad()
    def _metrics(self, step_input: TrainStepInput) -> dict[str, Any]:
        metrics: dict[str, Any] = {
            "k": self.cfg.k_at(step_input.n_training_steps),
            "topk_threshold": self.topk_threshold * self.latent_unit(),
        }
        if step_input.is_logging_step:
            metrics |= self.mechanisms.metrics(self.W_dec, step_input.n_training_steps)
        return metrics
