"""The training SAE: docs/method.md, equation by equation, each a call.

    x_c     = x - b_dec
    x_hat   = normalise(x_c)                              [N], [A]
    pre     = x_hat @ W_enc + b_enc
    f       = scale(x) * select(pre)                      [Z], [S]
    x_rec   = f @ W_dec + b_dec, for every nested prefix and sparsity budget
    loss    = reconstruction + AuxK + L1 + orthogonality  [S], [G], [O]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from torch import nn
from typing_extensions import override

from msae_plugin.architecture import losses
from msae_plugin.architecture.auxk import auxk_loss
from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.decoding import active_preactivations, scale_gradient
from msae_plugin.architecture.exact import (
    KeepsFloat32,
    add_remainders,
    exact_dtypes,
    restore_exact,
)
from msae_plugin.architecture.export import exported_tensors
from msae_plugin.architecture.initialisation import initialise_inverse_sqrt_d
from msae_plugin.architecture.mechanisms import Mechanisms
from msae_plugin.architecture.nested import Reconstructions, assign_rings, decode_nested
from msae_plugin.architecture.selection import (
    CANDIDATE_SHARE,
    Selection,
    above_threshold,
    batch_top_k,
    running_rate,
)
from msae_plugin.architecture.skip import with_skip
from msae_plugin.architecture.threshold import calibrated_cut
from msae_plugin.errors import RunFailure


class MultiScaleTrainingSAE(KeepsFloat32, TrainingSAE[MultiScaleTrainingSAEConfig]):
    """Multi-scale orthogonal SAE, trained with SAELens.

    In training mode `encode` selects over the batch (BatchTopK); in evaluation mode it compares
    each pre-activation with a threshold and is a deterministic function of one token.

    Args:
        cfg: Configuration; every mechanism is switched there.
        use_error_term: As in SAELens.
    """

    b_enc: nn.Parameter
    topk_threshold: torch.Tensor
    candidate_cut: torch.Tensor
    firing_rate: torch.Tensor
    latent_ring: torch.Tensor
    training_step: torch.Tensor
    mechanisms: Mechanisms

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
        cfg, kwargs = self.cfg, {"dtype": torch.float32, "device": self.device}
        if cfg.weight_init == "inverse_sqrt_d":
            initialise_inverse_sqrt_d(self.W_enc, self.W_dec, cfg.decoder_init_norm)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device))
        self.register_buffer("topk_threshold", torch.zeros((), **kwargs))
        self.register_buffer("candidate_cut", torch.zeros((), **kwargs))
        self.register_buffer("firing_rate", torch.zeros(cfg.d_sae, **kwargs))
        self.register_buffer("latent_ring", assign_rings(self.firing_rate, cfg.prefix_widths))
        # Steps completed; SAELens tells an SAE the step in training only, `encode` needs k always.
        self.register_buffer(
            "training_step", torch.zeros((), dtype=torch.int64, device=self.device)
        )
        self.mechanisms = Mechanisms(cfg, self.dtype, self.device)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        if self.cfg.l1_coefficient == 0:
            return {}
        return {
            "l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)
        }

    # ---- the equations ------------------------------------------------------------------------

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One training step: selection, nested and multi-budget reconstruction, losses.

        Args:
            step_input: `sae_in` (n_tokens, d_in) or (batch, seq, d_in), the step, dead latents.

        Returns:
            SAELens' output; `feature_acts` and `hidden_pre` carry no gradient of their own, since
            the loss reaches the weights over the active latents only.
        """
        shape = step_input.sae_in.shape
        sae_in = step_input.sae_in.to(self.dtype).reshape(-1, shape[-1])
        step = step_input.n_training_steps
        self._prepare_step(sae_in, step)

        x_c = self.process_sae_in(sae_in)
        x_hat, token_scale = self.normalise(x_c)
        with torch.no_grad():
            hidden_pre = self.hook_sae_acts_pre(self.pre_activations(x_hat))
            self.mechanisms.observe_preactivations(hidden_pre, step)
        selection = self.select(hidden_pre, self.cfg.k_at(step))
        coefficients = self.decoder_coefficients(selection, x_hat, token_scale)
        reconstructions = self.reconstruct(selection, coefficients, sae_in.shape[0])
        feature_acts = self._dense_latents(selection, coefficients, sae_in.shape[0])

        target = sae_in - self.cfg.skip_scale * x_c if self.cfg.skip_scale else sae_in
        weight = losses.token_weight(x_c) if self.cfg.token_loss_weight != "none" else None
        terms = losses.reconstruction_losses(
            self.cfg, reconstructions, target, weight, self._tier_scales()
        )
        terms |= self._auxiliary_losses(
            step_input, x_hat, token_scale, target - reconstructions.main, weight
        )
        terms |= self._sparsity_and_orthogonality(step_input, selection, coefficients, sae_in)

        self._update_statistics(selection, coefficients, feature_acts, step)
        sae_out = reconstructions.main + (sae_in - target)
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out.reshape(shape),
            feature_acts=feature_acts.reshape(*shape[:-1], self.cfg.d_sae),
            hidden_pre=hidden_pre.reshape(*shape[:-1], self.cfg.d_sae),
            loss=torch.stack([term.float() for term in terms.values()]).sum(),
            losses=terms,
            metrics=self._metrics(step_input),
        )

    def normalise(self, x_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N], [A]: (..., d_in) -> x_hat (..., d_in) and scale(x) (..., 1), None when off."""
        if self.mechanisms.normalisation is None:
            return x_c, None
        return self.mechanisms.normalisation(x_c)

    def pre_activations(self, x_hat: torch.Tensor) -> torch.Tensor:
        """(..., d_in) -> (..., d_sae): x_hat @ W_enc + b_enc, as if the decoder had unit norm."""
        hidden_pre = x_hat @ self.W_enc + self.b_enc
        norm = self.decoder_norm()
        return hidden_pre if norm is None else hidden_pre * norm

    def decoder_norm(self) -> torch.Tensor | None:
        """(d_sae,) norms by which pre-activations are rescaled; None without the rescaling."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return None
        return self.W_dec.norm(dim=-1).clamp(min=1e-8)

    def select(self, hidden_pre: torch.Tensor, k: float) -> Selection:
        """[Z], [S]: active pairs of (n_tokens, d_sae) pre-activations in training mode."""
        statistics = self.mechanisms.statistics
        if self.cfg.selection == "zscore" and statistics is not None:
            return above_threshold(hidden_pre, statistics.threshold())
        scores, cut = self.scores(hidden_pre), 0.0
        if self.cfg.standardise == 0:
            cut = CANDIDATE_SHARE * float(self.candidate_cut)
        return batch_top_k(hidden_pre, scores, k, self.cfg.sparsity_scales, cut)

    def scores(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """[Z]: what BatchTopK ranks; the pre-activations unless standardised."""
        statistics = self.mechanisms.statistics
        if statistics is None:
            return hidden_pre
        strength = 1.0 if self.cfg.selection == "zscore" else self.cfg.standardise
        return statistics.standardised(hidden_pre, strength)

    def threshold(self) -> torch.Tensor:
        """() or (d_sae,) float32: what pre-activations are compared with in evaluation mode."""
        statistics = self.mechanisms.statistics
        if statistics is None:
            return self.topk_threshold
        if self.cfg.selection == "zscore":
            return statistics.threshold().clamp(min=0)
        return statistics.threshold_of_score(self.topk_threshold, self.cfg.standardise).clamp(min=0)

    def decoder_coefficients(
        self, selection: Selection, x_hat: torch.Tensor, token_scale: torch.Tensor | None
    ) -> torch.Tensor:
        """(n_pairs,) coefficients of the raw decoder rows, differentiable in the encoder.

        The decoder norm by which pre-activations are rescaled cancels in the reconstruction, so it
        is divided out here and carries no gradient.
        """
        tokens, latents = selection.tokens, selection.latents
        values = selection.values.to(torch.promote_types(selection.values.dtype, torch.float32))
        norm = self.decoder_norm()
        if norm is not None:
            values = values / norm.detach()[latents]
        values = active_preactivations(x_hat, self.W_enc, self.b_enc, values, tokens, latents)
        if token_scale is not None:
            values = values * token_scale.squeeze(-1)[tokens]
        if self.mechanisms.importance is not None:
            factors = self.mechanisms.importance.factors(self.cfg.importance_power)
            values = scale_gradient(values, factors[latents])
        return values

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
        )

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and pre-activations, dense and differentiable.

        Args:
            x: (..., d_in) activations.

        Returns:
            feature_acts (..., d_sae) and hidden_pre (..., d_sae).
        """
        x_hat, token_scale = self.normalise(self.process_sae_in(x))
        hidden_pre = self.hook_sae_acts_pre(self.pre_activations(x_hat))
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
        return self.hook_sae_acts_post(feature_acts), hidden_pre

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(..., d_sae) -> (..., d_in): f @ W_dec + b_dec, over unit rows when rescaled."""
        norm = self.decoder_norm()
        return super().decode(feature_acts if norm is None else feature_acts / norm)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction, plus the skip connection when on (docs/method.md, "Skip")."""
        sae_out = super().forward(x)
        if self.cfg.skip_scale == 0 or self.use_error_term:
            return sae_out
        return with_skip(sae_out, x, self.b_dec, self.cfg.skip_scale)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """AuxK alone, for hosts that call it; `training_forward_pass` adds the other terms."""
        x_hat, token_scale = self.normalise(self.process_sae_in(step_input.sae_in))
        residual = step_input.sae_in - sae_out
        return self._auxiliary_losses(step_input, x_hat, token_scale, residual, None)

    # ---- losses and statistics ----------------------------------------------------------------

    def _tier_scales(self) -> list[float]:
        """Further sparsity budgets in the order in which they are reconstructed."""
        return sorted(self.cfg.sparsity_scales)

    def _auxiliary_losses(
        self,
        step_input: TrainStepInput,
        x_hat: torch.Tensor,
        token_scale: torch.Tensor | None,
        residual: torch.Tensor,
        token_weight: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        mask = step_input.dead_neuron_mask
        if self.cfg.aux_loss_coefficient == 0:
            return {}
        dead = mask.nonzero().squeeze(1) if mask is not None else None
        if dead is None or dead.numel() == 0:
            return {"auxiliary_reconstruction_loss": residual.new_zeros(())}
        norm = self.decoder_norm()
        loss = auxk_loss(
            x_hat,
            token_scale,
            residual,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            dead,
            token_weight,
            norm.detach() if norm is not None else None,
        )
        return {"auxiliary_reconstruction_loss": self.cfg.aux_loss_coefficient * loss}

    def _sparsity_and_orthogonality(
        self,
        step_input: TrainStepInput,
        selection: Selection,
        coefficients: torch.Tensor,
        sae_in: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = {}
        l1_coefficient = step_input.coefficients.get("l1", 0.0)
        if l1_coefficient:
            norm = self.W_dec.norm(dim=-1).clamp(min=1e-8)
            terms["l1_loss"] = l1_coefficient * losses.l1_loss(
                selection, coefficients, norm, self.mechanisms.l1_weights(), sae_in.shape[0]
            )
        penalty = self.mechanisms.orthogonality(
            self.W_dec, sae_in, step_input.n_training_steps
        )
        if penalty is not None:
            terms["orthogonality_loss"] = penalty
        return terms

    @torch.no_grad()
    def _prepare_step(self, sae_in: torch.Tensor, step: int) -> None:
        """What changes weights or order before the step: initial bias, unit norms, rings, [R]."""
        cfg = self.cfg
        if step == 0 and cfg.b_dec_init == "mean":
            self.b_dec.copy_(sae_in.float().mean(dim=0))
        if cfg.unit_norm_decoder:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
        if cfg.prefix_sort_every and step and step % cfg.prefix_sort_every == 0:
            self.latent_ring.copy_(assign_rings(self.firing_rate, cfg.prefix_widths))
        if cfg.revival_every and step and step % cfg.revival_every == 0:
            self.mechanisms.revive(
                lambda: sae_in - self.decode(self.encode(sae_in)),
                self.W_enc,
                self.b_enc,
                self.W_dec,
                sae_in.shape[0],
                step,
            )
        self.training_step.fill_(step)
        if self.mechanisms.normalisation is not None:
            rate = running_rate(1 - cfg.firing_rate_decay, step)
            x_c = self.process_sae_in(sae_in)
            self.mechanisms.normalisation.update_running_variance(x_c, rate)

    @torch.no_grad()
    def _dense_latents(
        self, selection: Selection, coefficients: torch.Tensor, n_tokens: int
    ) -> torch.Tensor:
        """(n_tokens, d_sae) latents at the budget k."""
        norm = self.decoder_norm()
        values = coefficients if norm is None else coefficients * norm[selection.latents]
        dense = values.new_zeros(n_tokens, self.cfg.d_sae)
        dense[selection.tokens, selection.latents] = values * selection.active()
        return self.hook_sae_acts_post(dense)

    @torch.no_grad()
    def _update_statistics(
        self,
        selection: Selection,
        coefficients: torch.Tensor,
        feature_acts: torch.Tensor,
        step: int,
    ) -> None:
        """Everything that is followed over time; buffers only, no synchronisation needed."""
        cfg = self.cfg
        # While k falls the cut falls with it, so the running estimate starts when k has arrived.
        rate = running_rate(cfg.topk_threshold_lr, max(0, step - cfg.k_anneal_steps))
        cut = selection.cut.float()
        known = torch.isfinite(cut)
        self.topk_threshold.lerp_(torch.where(known, cut, self.topk_threshold), rate)
        lowest = selection.lowest_score.float()
        self.candidate_cut.copy_(torch.where(torch.isfinite(lowest), lowest, 0.0))

        active = selection.active()
        fired = torch.bincount(selection.latents[active], minlength=cfg.d_sae)
        share = fired.float() / feature_acts.shape[0]
        self.firing_rate.lerp_(share, running_rate(1 - cfg.firing_rate_decay, step))
        self.mechanisms.observe_latents(
            self.W_dec,
            feature_acts,
            selection.tokens[active],
            selection.latents[active],
            fired,
            step,
            cfg.k_at(step),
        )

    @torch.no_grad()
    def _metrics(self, step_input: TrainStepInput) -> dict[str, Any]:
        metrics: dict[str, Any] = {
            "k": self.cfg.k_at(step_input.n_training_steps),
            "topk_threshold": self.topk_threshold.clone(),
        }
        if step_input.is_logging_step:
            metrics |= self.mechanisms.metrics(self.W_dec, step_input.n_training_steps)
        return metrics

    # ---- what our trainer asks for ------------------------------------------------------------

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let revival reset the optimiser state of the latents it re-aims."""
        self.mechanisms.optimizer = optimizer

    def pop_events(self) -> list[dict[str, Any]]:
        """Revivals and their outcomes since the last call, oldest first."""
        events, self.mechanisms.events = self.mechanisms.events, []
        return events

    @torch.no_grad()
    def calibrate_threshold(self, batches: Iterable[torch.Tensor]) -> dict[str, float]:
        """Set the cut so that the mean L0 over these activations is exactly k.

        Args:
            batches: Activations, each (n_tokens, d_in), scaled as training batches are.

        Returns:
            `l0_before`, `l0_after` and `threshold` (mean over the latents).

        Raises:
            RunFailure: No batch was given.
        """
        kept = list(batches)

        def hidden_pre_of(batch: torch.Tensor) -> torch.Tensor:
            x_hat, _ = self.normalise(self.process_sae_in(batch.to(self.device)))
            return self.pre_activations(x_hat)

        def mean_l0() -> float:
            counts = [(hidden_pre_of(b) > self.threshold()).sum(-1).float().mean() for b in kept]
            return float(torch.stack(counts).mean())

        cut = calibrated_cut(kept, hidden_pre_of, self.scores, self.cfg.k)
        if cut is None:
            raise RunFailure("calibrate_threshold needs at least one batch of activations; got none")
        before = mean_l0()
        statistics = self.mechanisms.statistics
        if self.cfg.selection == "batchtopk":
            self.topk_threshold.fill_(cut)
        elif self.cfg.zscore_z_lr > 0 and statistics is not None:
            statistics.z.fill_(cut)
        return {
            "l0_before": before,
            "l0_after": mean_l0(),
            "threshold": float(self.threshold().mean()),
        }

    @torch.no_grad()
    def export_order(self) -> torch.Tensor:
        """(d_sae,) long: exported latent j is training latent export_order()[j].

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
        if self.mechanisms.normalisation is not None:
            # x_hat does not depend on the unit of the activations: only the bias and eps do.
            self.b_dec.div_(scaling_factor)
            self.mechanisms.normalisation.fold_input_scaling(scaling_factor)
            self.cfg.normalize_activations = "none"
            return
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            # Pre-activations carry the decoder norm, which the fold has just divided.
            self.topk_threshold /= scaling_factor
            self.candidate_cut /= scaling_factor
            if self.mechanisms.statistics is not None:
                self.mechanisms.statistics.rescale(1 / scaling_factor)

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self, mean: torch.Tensor, whitening_matrix: torch.Tensor, unwhitening_matrix: torch.Tensor
    ) -> None:
        if self.cfg.rescale_acts_by_decoder_norm:
            # Unwhitening changes the row norms; folding them first keeps the selection as it is.
            self.fold_W_dec_norm()
            self.cfg.rescale_acts_by_decoder_norm = False
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        add_remainders(state_dict, exact_dtypes(self))

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        restore_exact(state_dict, exact_dtypes(self))

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        state_dict.clear()
        state_dict.update(exported_tensors(self))
