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

import torch
from typing_extensions import override

from msae_plugin.architecture import losses
from msae_plugin.architecture.kernels.decoding import active_preactivations, scale_gradient
from msae_plugin.architecture.kernels.static_selection import fast_batch_top_k
from msae_plugin.architecture.losses import Reconstructions
from msae_plugin.architecture.mechanisms.base import Latents, Step
from msae_plugin.architecture.selection import Selection, above_threshold
from msae_plugin.architecture.step_schedule import (
    Budgets,
    DeadLatents,
    EncoderInput,
    Number,
    StepInputs,
    StepResults,
    StepSchedule,
)
from msae_plugin.architecture.training_host import HostedTrainingSAE


class MultiScaleTrainingSAE(HostedTrainingSAE):
    """Multi-scale orthogonal SAE, trained with SAELens.

    In training mode `encode` selects over the batch (BatchTopK); in evaluation mode it compares
    each pre-activation with a threshold and is a deterministic function of one token.

    Args:
        cfg: Configuration; every mechanism is switched there.
        use_error_term: As in SAELens.
    """

    # ---- the SAE ------------------------------------------------------------------------------

    @override
    def normalise(self, x_c: torch.Tensor, *, constant_input: bool = False) -> EncoderInput:
        """[N], [A]: (..., d_in) tokens less b_dec, in the training unit, as the encoder takes them.

        `constant_input` says that x_c depends on nothing that is trained but b_dec.
        """
        if self.mechanisms.normalisation is not None:
            x_hat, token_scale = self.mechanisms.normalisation(x_c)
            return EncoderInput(x_hat, token_scale, self.decoder_norm())
        centred = constant_input and self.cfg.apply_b_dec_to_input
        return EncoderInput(x_c, None, self.decoder_norm(), self.b_dec if centred else None)

    @override
    def pre_activations(self, given: EncoderInput) -> torch.Tensor:
        """(..., d_sae): x_hat @ W_enc + b_enc, as if the decoder had unit norm."""
        hidden_pre = given.x_hat @ self.W_enc + self.b_enc
        return hidden_pre if given.decoder_norm is None else hidden_pre * given.decoder_norm

    def select(
        self, hidden_pre: torch.Tensor, k: Number, budgets: Budgets | None = None
    ) -> Selection:
        """[Z], [S]: active pairs of (n_tokens, d_sae) pre-activations in training mode.

        `budgets` is what the target L0 allows in this batch; counted anew if None.
        """
        cfg, statistics = self.cfg, self.mechanisms.statistics
        if cfg.selection == "zscore" and statistics is not None:
            return above_threshold(hidden_pre, statistics.own_threshold(), self.ranks)
        # Standardised scores are in another unit than the threshold before.
        previous = None if cfg.standardise else self.candidate_threshold
        return fast_batch_top_k(
            hidden_pre, self.scores(hidden_pre), k, cfg.sparsity_scales, budgets, previous,
            self.ranks,
        )  # fmt: skip

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and pre-activations (..., d_sae) of activations (..., d_in), differentiable."""
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
        return sae_out + self.cfg.skip_scale * (x.to(sae_out.dtype) - self.decoder_bias())

    # ---- the training step --------------------------------------------------------------------

    @override
    def take_step(self, given: StepInputs, schedule: StepSchedule) -> StepResults:
        """The equations of a step on plain tensors, which can be recorded (`kernels/replay.py`)."""
        sae_in, cfg, n_tokens = given.sae_in, self.cfg, given.sae_in.shape[0]
        step = Step(self, sae_in, schedule, list(self.mechanisms))
        x_c = self.process_sae_in(sae_in)
        encoder_input = self.normalise(x_c, constant_input=not sae_in.requires_grad)
        hidden_pre = self.followed_pre_activations(encoder_input, step)
        selection = self.select(hidden_pre, schedule.k, schedule.budgets)
        factors = self.gradient_factors()
        coefficients = self.decoder_coefficients(selection, encoder_input, factors)
        reconstructions = self.reconstruct(selection, coefficients, n_tokens, factors)
        feature_acts = self.dense_latents(selection, encoder_input, n_tokens)

        target = sae_in - cfg.skip_scale * x_c if cfg.skip_scale else sae_in
        terms = losses.reconstruction_losses(cfg, reconstructions, target)
        terms |= self.auxk(given.dead, encoder_input, target - reconstructions.main)
        terms |= self.l1(given.l1_coefficient, selection, coefficients, factors, n_tokens)
        for mechanism in step.switched_on:
            terms |= mechanism.loss(step)

        self.follow(selection, feature_acts, step)
        sae_out = reconstructions.main
        return StepResults(
            terms=terms,
            loss=torch.stack(list(terms.values())).sum(),
            sae_out=sae_out + (sae_in - target) if cfg.skip_scale else sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
        )

    @torch.no_grad()
    def followed_pre_activations(self, given: EncoderInput, step: Step) -> torch.Tensor:
        """(n_tokens, d_sae) pre-activations, shown to the mechanisms."""
        hidden_pre = self.hook_sae_acts_pre(self.pre_activations(given))
        for mechanism in step.switched_on:
            mechanism.on_pre_activations(hidden_pre, step)
        return hidden_pre

    def gradient_factors(self) -> torch.Tensor | None:
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
    ) -> Reconstructions:
        """[S]: every nested prefix and every sparsity budget, from one decoding pass."""
        W_dec = self.W_dec if factors is None else scale_gradient(self.W_dec, factors[:, None])
        return losses.decode_nested(
            self.cfg, selection, coefficients, W_dec, self.b_dec, self.latent_group, n_tokens,
            self.decode_kernel(),
        )  # fmt: skip

    @torch.no_grad()
    def dense_latents(
        self, selection: Selection, given: EncoderInput, n_tokens: int
    ) -> torch.Tensor:
        """(n_tokens, d_sae) latents at the budget k."""
        values = selection.values.to(torch.promote_types(selection.values.dtype, torch.float32))
        if given.token_scale is not None:
            values = values * given.token_scale.squeeze(-1)[selection.tokens]
        dense = values.new_zeros(n_tokens, self.cfg.d_sae)
        dense[selection.tokens, selection.latents] = values * selection.active()
        return self.hook_sae_acts_post(dense)

    @override
    def auxk(
        self, dead: DeadLatents | None, given: EncoderInput, residual: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The weighted AuxK loss; zero while nothing is dead."""
        coefficient = self.cfg.aux_loss_coefficient
        if coefficient == 0:
            return {}
        if dead is None:
            return {"auxiliary_reconstruction_loss": residual.new_zeros(())}
        loss = losses.auxk_loss(given, residual, self.W_enc, self.b_enc, self.W_dec, dead)
        return {"auxiliary_reconstruction_loss": coefficient * loss}

    def l1(
        self,
        coefficient: float,
        selection: Selection,
        values: torch.Tensor,
        factors: torch.Tensor | None,
        n_tokens: int,
    ) -> dict[str, torch.Tensor]:
        """The weighted L1 loss; [G] penalises least what contributes most."""
        if not coefficient:
            return {}
        norm = self.W_dec.norm(dim=-1).clamp(min=1e-8)
        latent_weight = None if factors is None else 1 / factors
        l1 = losses.l1_loss(selection, values, norm, latent_weight, n_tokens)
        return {"l1_loss": coefficient * l1}

    @torch.no_grad()
    def follow(self, selection: Selection, feature_acts: torch.Tensor, step: Step) -> None:
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
