"""The training SAE: docs/method.md, equation by equation.

x       = (activations - shift) / scale               first batch; folded at export
x_c     = x - b_dec
x_hat   = normalise(x_c)                              [N], [A]
pre     = x_hat @ W_enc + b_enc
f       = scale(x) * select(pre)                      [Z], [S]
x_rec   = f @ W_dec + b_dec, for every nested prefix and sparsity budget
loss    = reconstruction + AuxK + L1 + orthogonality  [S], [G], [O]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from msae_plugin.architecture import nested
from msae_plugin.architecture.auxk import auxk_loss
from msae_plugin.architecture.calibration import calibrate_multiscale
from msae_plugin.architecture.export import exported_tensors
from msae_plugin.architecture.kernels.decoding import active_preactivations, scale_gradient
from msae_plugin.architecture.kernels.replay import replayed_step
from msae_plugin.architecture.kernels.static_selection import (
    needs_static_shapes,
    static_batch_top_k,
)
from msae_plugin.architecture.mechanisms.base import Latents, Step
from msae_plugin.architecture.mechanisms.orthogonality import mean_nearest_cosine
from msae_plugin.architecture.mechanisms.skip import with_skip
from msae_plugin.architecture.selection import (
    CANDIDATE_SHARE,
    Selection,
    above_threshold,
    batch_top_k,
)
from msae_plugin.architecture.step_schedule import (
    Budgets,
    DeadLatents,
    EncoderInput,
    Number,
    StepInputs,
    StepResults,
    StepSchedule,
)
from msae_plugin.architecture.training_base import MultiScaleTrainingBase

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _never_compiled(method: _Method) -> _Method:
    # SAELens' runner compiles what calls it, with compile_sae=True, and Inductor lets running means
    # be overwritten without a word (pytorch issue 183575).
    return cast("_Method", torch.compiler.disable(method))


class MultiScaleTrainingSAE(MultiScaleTrainingBase):
    """Multi-scale orthogonal SAE, trained with SAELens.

    In training mode `encode` selects over the batch (BatchTopK); in evaluation mode it compares
    each pre-activation with a threshold and is a deterministic function of one token.

    Args:
        cfg: Configuration; every mechanism is switched there.
        use_error_term: As in SAELens.
    """

    # ---- encode, select, decode ---------------------------------------------------------------

    def normalise(self, x_c: torch.Tensor, *, constant_input: bool = False) -> EncoderInput:
        """[N], [A]: (..., d_in) tokens less b_dec, in the training unit, as the encoder takes them.

        Args:
            x_c: The tokens.
            constant_input: Whether x_c depends on nothing that is trained but b_dec.
        """
        if self.mechanisms.normalisation is not None:
            x_hat, token_scale = self.mechanisms.normalisation(x_c)
            return EncoderInput(x_hat, token_scale, self.decoder_norm())
        centred = constant_input and self.cfg.apply_b_dec_to_input
        return EncoderInput(x_c, None, self.decoder_norm(), self.b_dec if centred else None)

    def pre_activations(self, given: EncoderInput) -> torch.Tensor:
        """(..., d_sae): x_hat @ W_enc + b_enc, as if the decoder had unit norm."""
        hidden_pre = given.x_hat @ self.W_enc + self.b_enc
        return hidden_pre if given.decoder_norm is None else hidden_pre * given.decoder_norm

    def select(
        self, hidden_pre: torch.Tensor, k: Number, budgets: Budgets | None = None
    ) -> Selection:
        """[Z], [S]: active pairs of (n_tokens, d_sae) pre-activations in training mode.

        Args:
            hidden_pre: (n_tokens, d_sae).
            k: Target L0.
            budgets: What k allows in this batch; counted anew if None.
        """
        statistics, scales = self.mechanisms.statistics, self.cfg.sparsity_scales
        if self.cfg.selection == "zscore" and statistics is not None:
            return above_threshold(hidden_pre, statistics.own_threshold(), self.ranks)
        scores, candidates = self.scores(hidden_pre), 0.0
        if self.ranks.count == 1 and needs_static_shapes(hidden_pre):
            budgets = budgets or Budgets.of(float(k), scales, *hidden_pre.shape)
            return static_batch_top_k(hidden_pre, scores, budgets)
        if self.cfg.standardise == 0:
            candidates = CANDIDATE_SHARE * float(self.candidate_threshold)
        return batch_top_k(hidden_pre, scores, float(k), scales, candidates, self.ranks)

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and pre-activations, dense and differentiable.

        Args:
            x: (..., d_in) activations.

        Returns:
            feature_acts (..., d_sae) and hidden_pre (..., d_sae), in units of the activations.
        """
        given = self.normalise(self.process_sae_in(self.in_units(x)))
        hidden_pre = self.hook_sae_acts_pre(self.pre_activations(given))
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
        if given.token_scale is not None:
            feature_acts = feature_acts * given.token_scale
        unit = self.latent_unit()
        return self.hook_sae_acts_post(feature_acts * unit), hidden_pre * unit

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

    # ---- the training step --------------------------------------------------------------------

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
        results = replayed_step(self, self.take_step, given, schedule)
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
            self.latent_group.copy_(nested.assign_groups(self.firing_rate, cfg.prefix_widths))
        step = Step(self, sae_in, schedule, list(self.mechanisms))
        for mechanism in step.switched_on:
            mechanism.before_step(step)
        self.training_step.fill_(now)

    def take_step(self, given: StepInputs, schedule: StepSchedule) -> StepResults:
        """The equations of a step on plain tensors, which can be recorded (`kernels/replay.py`).

        Args:
            given: The batch and what the host said of it.
            schedule: The numbers of the step.
        """
        sae_in, cfg = given.sae_in, self.cfg
        step = Step(self, sae_in, schedule, list(self.mechanisms))
        x_c = self.process_sae_in(sae_in)
        encoder_input = self.normalise(x_c, constant_input=not sae_in.requires_grad)
        with torch.no_grad():
            hidden_pre = self.hook_sae_acts_pre(self.pre_activations(encoder_input))
            for mechanism in step.switched_on:
                mechanism.on_pre_activations(hidden_pre, step)
        selection = self.select(hidden_pre, schedule.k, schedule.budgets)
        factors = self._gradient_factors()
        coefficients = self.decoder_coefficients(selection, encoder_input, factors)
        reconstructions = self.reconstruct(selection, coefficients, sae_in.shape[0], factors)
        feature_acts = self._dense_latents(selection, encoder_input, sae_in.shape[0])

        target = sae_in - cfg.skip_scale * x_c if cfg.skip_scale else sae_in
        terms = nested.reconstruction_losses(cfg, reconstructions, target)
        terms |= self._auxk(given, encoder_input, target - reconstructions.main)
        if given.l1_coefficient:
            norm = self.W_dec.norm(dim=-1).clamp(min=1e-8)
            latent_weight = None if factors is None else 1 / factors
            l1 = nested.l1_loss(selection, coefficients, norm, latent_weight, sae_in.shape[0])
            terms["l1_loss"] = given.l1_coefficient * l1
        for mechanism in step.switched_on:
            terms |= mechanism.loss(step)

        self._update_statistics(selection, feature_acts, step)
        sae_out = reconstructions.main
        if cfg.skip_scale:
            sae_out = sae_out + (sae_in - target)
        return StepResults(
            terms=terms,
            loss=torch.stack(list(terms.values())).sum(),
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
        )

    def _gradient_factors(self) -> torch.Tensor | None:
        """[G]: (d_sae,) factors of the latents' gradients; None when all are 1."""
        importance = self.mechanisms.importance
        return None if importance is None else importance.factors(self.cfg.importance_power)

    def decoder_coefficients(
        self, selection: Selection, given: EncoderInput, factors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(n_pairs,) coefficients of the raw decoder rows, differentiable in the encoder."""
        tokens, latents = selection.tokens, selection.latents
        values = selection.values.to(torch.promote_types(selection.values.dtype, torch.float32))
        if given.decoder_norm is not None:
            values = values / given.decoder_norm.detach()[latents]
        values = active_preactivations(
            given.x_hat, self.W_enc, self.b_enc, values, tokens, latents,
            self.decode_kernel(), given.centre,
        )  # fmt: skip
        values = selection.without_padding(values)
        if given.token_scale is not None:
            values = values * given.token_scale.squeeze(-1)[tokens]
        return values if factors is None else scale_gradient(values, factors[latents])

    def reconstruct(
        self,
        selection: Selection,
        coefficients: torch.Tensor,
        n_tokens: int,
        factors: torch.Tensor | None = None,
    ) -> nested.Reconstructions:
        """[S]: every nested prefix and every sparsity budget, from one decoding pass."""
        W_dec = self.W_dec if factors is None else scale_gradient(self.W_dec, factors[:, None])
        return nested.decode_nested(
            self.cfg, selection, coefficients, W_dec, self.b_dec, self.latent_group, n_tokens,
            self.decode_kernel(),
        )  # fmt: skip

    @torch.no_grad()
    def _dense_latents(
        self, selection: Selection, given: EncoderInput, n_tokens: int
    ) -> torch.Tensor:
        """(n_tokens, d_sae) latents at the budget k."""
        values = selection.values.to(torch.promote_types(selection.values.dtype, torch.float32))
        if given.token_scale is not None:
            values = values * given.token_scale.squeeze(-1)[selection.tokens]
        dense = values.new_zeros(n_tokens, self.cfg.d_sae)
        dense[selection.tokens, selection.latents] = values * selection.active()
        return self.hook_sae_acts_post(dense)

    def _dead_latents(self, mask: torch.Tensor | None) -> DeadLatents | None:
        """Which latents AuxK trains; None when there are none, for which the host has to wait."""
        if mask is None or self.cfg.aux_loss_coefficient == 0:
            return None
        return DeadLatents.listed(mask)

    def _auxk(
        self,
        given: StepInputs,
        encoder_input: EncoderInput,
        residual: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        coefficient, weights = self.cfg.aux_loss_coefficient, (self.W_enc, self.b_enc, self.W_dec)
        if coefficient == 0:
            return {}
        if given.dead is None:
            return {"auxiliary_reconstruction_loss": residual.new_zeros(())}
        loss = auxk_loss(encoder_input, residual, *weights, given.dead)
        return {"auxiliary_reconstruction_loss": coefficient * loss}

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
        given = StepInputs(sae_in, self._dead_latents(step_input.dead_neuron_mask))
        encoder_input = self.normalise(self.process_sae_in(sae_in))
        return self._auxk(given, encoder_input, sae_in - self.in_units(sae_out))

    @torch.no_grad()
    def _update_statistics(
        self, selection: Selection, feature_acts: torch.Tensor, step: Step
    ) -> None:
        """Everything that is followed over time; buffers only, no synchronisation needed."""
        threshold, lowest = selection.threshold.float(), selection.lowest_score.float()
        known = threshold < torch.inf  # neither infinity, of nothing active, nor NaN
        self.topk_threshold.lerp_(
            torch.where(known, threshold, self.topk_threshold), step.schedule.threshold_rate
        )
        self.candidate_threshold.copy_(lowest.masked_fill(~(lowest < torch.inf), 0.0))

        active = selection.active()
        fired = torch.zeros(self.cfg.d_sae, dtype=torch.int64, device=active.device)
        fired.index_add_(0, selection.latents, active.long())
        fired = self.ranks.sum(fired)
        self.firing_rate.lerp_(fired.float() / step.n_tokens, step.schedule.firing_rate_rate)
        threshold = threshold.masked_fill(~known, 0.0)
        latents = Latents(feature_acts, selection.tokens, selection.latents, fired, threshold)
        for mechanism in step.switched_on:
            mechanism.on_latents(latents, step)

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

    # ---- what follows training ----------------------------------------------------------------

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
