"""The optional parts of a training SAE, each present only when its switch is on.

This module holds them and calls them at the right moments; what each computes is its own module's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.float32_buffers import KeepsFloat32
from msae_plugin.architecture.kernels.cuda_graphs import RecordedSteps
from msae_plugin.architecture.kernels.decoding import DecodeKernel, triton_runs_on
from msae_plugin.architecture.mechanisms.firing_floor import FiringFloor
from msae_plugin.architecture.mechanisms.importance import FeatureImportance
from msae_plugin.architecture.mechanisms.normalisation import MultiScaleNormalisation
from msae_plugin.architecture.mechanisms.orthogonality import (
    NeighbourCoactivation,
    chunk_penalty,
    coactivation_weights,
    nearest_in_chunks_penalty,
    nearest_neighbours,
    pair_penalty,
    random_chunks,
)
from msae_plugin.architecture.mechanisms.revival import (
    RevivalRecord,
    new_directions,
    re_aim,
    reset_optimizer_rows,
    revival_candidates,
    revival_events,
)
from msae_plugin.architecture.mechanisms.sketch import CoactivationSketch
from msae_plugin.architecture.mechanisms.zscore import PreActivationStatistics
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.architecture.selection import running_rate
from msae_plugin.architecture.step_schedule import Number

# The mean nearest cosine in the log is taken over so many latents, evenly spaced, against all: over
# all 16,384 of width 2304 it is 1.2 TFLOP, eight times what the encoder of the step costs.
_LATENTS_MEASURED = 1024

logger = logging.getLogger(__name__)


class Mechanisms(KeepsFloat32):
    """The switchable mechanisms of one SAE and their buffers.

    Args:
        cfg: Configuration of the SAE.
        dtype: Data type of learned parameters.
        device: Device of parameters and buffers.
    """

    exact_tensor_names = ("input_variance",)
    input_variance: torch.Tensor

    def __init__(
        self, cfg: MultiScaleTrainingSAEConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.cfg = cfg
        # A queue for the log, a handle to the host's optimiser, the processes that train together,
        # recordings of the step: none decides what the SAE is.
        self.events: list[dict[str, Any]] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.ranks: Ranks = ALONE
        self.recorded_steps = RecordedSteps()
        d_sae = cfg.d_sae
        weighted = cfg.orthogonality_coefficient > 0 and cfg.orthogonality_weighting != "none"
        self.normalisation: MultiScaleNormalisation | None = None
        self.statistics: PreActivationStatistics | None = None
        self.firing_floor: FiringFloor | None = None
        self.neighbours: NeighbourCoactivation | None = None
        self.sketch: CoactivationSketch | None = None
        self.revivals: RevivalRecord | None = None
        self.importance: FeatureImportance | None = None
        if cfg.norm_scales:
            self.normalisation = MultiScaleNormalisation(cfg, dtype, device)
        if cfg.needs_preactivation_statistics:
            self.statistics = PreActivationStatistics(d_sae, cfg.zscore_z, device)
        if cfg.firing_floor > 0:
            self.firing_floor = FiringFloor(d_sae, device)
        if weighted and cfg.orthogonality_pairs == "neighbours":
            self.neighbours = NeighbourCoactivation(d_sae, cfg.neighbour_count, device)
        if cfg.sketch_rank:
            self.sketch = CoactivationSketch(d_sae, cfg.sketch_rank, device)
        if cfg.revival_every:
            self.revivals = RevivalRecord(d_sae, device)
        if cfg.importance_power > 0:
            self.importance = FeatureImportance(d_sae, device)
        self.register_buffer("input_variance", torch.zeros((), dtype=torch.float32, device=device))

    @torch.no_grad()
    def observe_preactivations(self, hidden_pre: torch.Tensor, step: int) -> None:
        """[Z]: follow the statistics of (n_tokens, d_sae) pre-activations."""
        if self.statistics is not None:
            rate = running_rate(1 - self.cfg.zscore_decay, step)
            self.statistics.update(hidden_pre, rate, self.ranks)

    @torch.no_grad()
    def follow_firing_floor(
        self, firing_rate: torch.Tensor, floor: Number, cut: torch.Tensor
    ) -> None:
        """[Z]: help the latents that hardly fire.

        Args:
            firing_rate: (d_sae,) running share of tokens on which each latent fires.
            floor: Firing rate below which a latent is helped.
            cut: Zero-dimensional, the cut of the step at the budget k.
        """
        if self.firing_floor is not None:
            self.firing_floor.follow(firing_rate, floor, cut, self.cfg.firing_floor_rate)

    @torch.no_grad()
    def observe_latents(
        self,
        W_dec: torch.Tensor,
        feature_acts: torch.Tensor,
        tokens: torch.Tensor,
        latents: torch.Tensor,
        fired_tokens: torch.Tensor,
        step: int,
        k: Number,
    ) -> None:
        """[Z], [O], [C], [R], [G]: follow the statistics of the latents of one step.

        Args:
            W_dec: (d_sae, d_in) decoder.
            feature_acts: (n_tokens, d_sae) latents, dense.
            tokens: (n_pairs,) tokens of pairs among which all active ones are; other latents are
                zero.
            latents: (n_pairs,) their latents.
            fired_tokens: (d_sae,) tokens on which each latent fired, of all ranks.
            step: Training step.
            k: Target L0 of the step.
        """
        cfg, n_tokens = self.cfg, feature_acts.shape[0] * self.ranks.count
        if self.statistics is not None and cfg.selection == "zscore" and cfg.zscore_z_lr > 0:
            l0 = fired_tokens.sum() / n_tokens
            self.statistics.follow_target(l0, float(k), cfg.zscore_z_lr)
        rate = running_rate(1 - cfg.coactivation_decay, step)
        if self.neighbours is not None:
            if step % cfg.neighbour_refresh_every == 0:
                self.neighbours.refresh(W_dec, cfg.orthogonality_chunk_size)
            values = feature_acts[tokens, latents]
            self.neighbours.update(feature_acts, values, tokens, latents, rate, self.ranks)
        if self.sketch is not None:
            self.sketch.update(feature_acts, rate, self.ranks)
        if self.revivals is not None:
            self.revivals.observe(fired_tokens)
        if self.importance is not None:
            norm = torch.ones_like(W_dec[:, 0])
            if not cfg.rescale_acts_by_decoder_norm:
                norm = W_dec.norm(dim=-1)
            total = torch.linalg.vector_norm(feature_acts, ord=1, dim=0)
            mean_activation = self.ranks.mean(total / feature_acts.shape[0])
            self.importance.update(
                mean_activation, norm, running_rate(1 - cfg.importance_decay, step)
            )

    @property
    def can_be_recorded(self) -> bool:
        """Whether steps may be recorded, and are the same each time without asking the device.

        Mechanisms that are off the presets are not written for it: they copy small tables, or have
        lists whose length the data give them.
        """
        switched = (self.normalisation, self.statistics, self.neighbours, self.sketch)
        compared = self.cfg.orthogonality_coefficient > 0
        return (
            self.cfg.cuda_graphs
            and all(mechanism is None for mechanism in (*switched, self.importance))
            and self.ranks.count == 1
            and not (compared and self.cfg.orthogonality_pairs == "neighbours")
        )

    def decode_kernel(self, W_dec: torch.Tensor) -> DecodeKernel:
        """What sums decoder rows; in recorded steps starting a kernel of our own costs nothing."""
        chosen = self.cfg.decode_kernel
        ours = chosen == "auto" and self.can_be_recorded and triton_runs_on(W_dec)
        return "triton" if ours else chosen

    def l1_weights(self) -> torch.Tensor | None:
        """[G]: (d_sae,) weights of the L1 penalty, or None when all are equal."""
        if self.importance is None:
            return None
        return 1 / self.importance.factors(self.cfg.importance_power)

    @torch.no_grad()
    def observe_inputs(self, sae_in: torch.Tensor, rate: Number) -> None:
        """[O]: follow the variance of the activations, the unit of the penalty.

        Args:
            sae_in: (n_tokens, d_in) activations.
            rate: Weight of this batch.
        """
        if self.cfg.orthogonality_coefficient > 0:
            variance = self.ranks.var_mean(sae_in.float())[0].sum()
            self.input_variance.lerp_(variance, rate)

    def penalty_is_due(self, step: int) -> bool:
        """[O]: whether the penalty is taken in this step."""
        cfg = self.cfg
        return cfg.orthogonality_coefficient > 0 and step % cfg.orthogonality_every == 0

    def orthogonality(self, W_dec: torch.Tensor, step: int) -> torch.Tensor | None:
        """[O]: the weighted penalty of this step, or None when it is not due.

        Args:
            W_dec: (d_sae, d_in) decoder.
            step: Training step.

        Returns:
            Zero-dimensional loss, or None.
        """
        if not self.penalty_is_due(step):
            return None
        cfg = self.cfg
        scale = cfg.orthogonality_coefficient * cfg.orthogonality_every * self.input_variance
        return scale * self._penalty(W_dec)

    def _penalty(self, W_dec: torch.Tensor) -> torch.Tensor:
        cfg = self.cfg
        if cfg.orthogonality_pairs == "chunks":
            chunks = random_chunks(cfg.d_sae, cfg.orthogonality_chunk_size, W_dec.device)
            sketch = self.sketch
            if cfg.orthogonality_weighting == "none" or sketch is None:
                return nearest_in_chunks_penalty(W_dec, chunks, self.decode_kernel(W_dec))
            factors = sketch.factors()
            return chunk_penalty(
                W_dec,
                chunks,
                lambda chunk: coactivation_weights(
                    sketch.normalised(factors, chunk), cfg.orthogonality_tau
                ),
            )
        if self.neighbours is None or cfg.orthogonality_weighting == "none":
            _, listed = nearest_neighbours(W_dec, cfg.neighbour_count, cfg.orthogonality_chunk_size)
            weights = torch.ones_like(listed, dtype=torch.float32)
        else:
            listed = self.neighbours.neighbours
            weights = coactivation_weights(
                self.neighbours.normalised(cfg.orthogonality_weighting), cfg.orthogonality_tau
            )
        first, slot = (weights > 0).nonzero(as_tuple=True)
        return pair_penalty(W_dec, first, listed[first, slot], weights[first, slot])

    @torch.no_grad()
    def revive(
        self,
        errors: Callable[[], torch.Tensor],
        W_enc: torch.nn.Parameter,
        b_enc: torch.nn.Parameter,
        W_dec: torch.nn.Parameter,
        tokens_per_step: int,
        step: int,
    ) -> None:
        """[R]: judge the latents revived before, and re-aim those that are dead now.

        Args:
            errors: Gives the reconstruction errors (n_tokens, d_in) of this rank's tokens; called
                only when there is a latent to revive.
            W_enc: (d_in, d_sae), changed in place.
            b_enc: (d_sae,), changed in place.
            W_dec: (d_sae, d_in), changed in place.
            tokens_per_step: Tokens per training step of all ranks, for firing rates.
            step: Training step.
        """
        cfg, record = self.cfg, self.revivals
        if record is None:
            return
        self.events += record.judge(
            step, cfg.revival_survival_steps, cfg.revival_dead_steps, tokens_per_step
        )
        latents, neighbours, cosines = revival_candidates(
            record,
            W_dec,
            cfg.revival_dead_steps,
            cfg.revival_min_cosine,
            max(1, int(cfg.revival_max_fraction * cfg.d_sae)),
        )
        if latents.numel() == 0:
            return
        missed, _ = self.ranks.concatenated(errors())
        directions = new_directions(missed, latents.numel(), cfg.revival_source)
        n_new = directions.shape[0]
        latents, neighbours, cosines = latents[:n_new], neighbours[:n_new], cosines[:n_new]
        kept = torch.nn.functional.cosine_similarity(W_dec[latents].float(), directions, dim=-1)
        live = ~record.dead(cfg.revival_dead_steps)
        re_aim(latents, directions, live, W_enc, b_enc, W_dec)
        if self.optimizer is not None:
            rows = [(W_enc, 1), (b_enc, 0), (W_dec, 0)]
            reset_optimizer_rows(self.optimizer, latents, rows)
        elif int(record.totals[0]) == 0:
            logger.warning(
                "revival without the optimiser: the moments of revived latents are kept; "
                "train with `msae train`, or call sae.attach_optimizer(optimizer)"
            )
        record.mark_revived(latents, step)
        self.events += revival_events(
            step, latents, neighbours, cosines, cfg.revival_source, 1 - kept
        )

    @torch.no_grad()
    def metrics(self, W_dec: torch.Tensor, step: int) -> dict[str, float | torch.Tensor]:
        """Values for the metrics log, computed on logging steps only."""
        found: dict[str, float | torch.Tensor] = {}
        if W_dec.shape[0] > 1:
            d_sae = W_dec.shape[0]
            sample = torch.arange(0, d_sae, -(-d_sae // _LATENTS_MEASURED), device=W_dec.device)
            cosines, _ = nearest_neighbours(W_dec, 1, self.cfg.orthogonality_chunk_size, sample)
            found["nearest_cosine"] = cosines.mean()
        if self.statistics is not None and self.cfg.selection == "zscore":
            found["z"] = self.statistics.z.clone()
        if self.sketch is not None:
            found["sketch_error"] = self.sketch.relative_error(self.sketch.factors())
        if self.revivals is not None:
            found |= self.revivals.summary(step)
        return found
