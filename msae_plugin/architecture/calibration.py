"""Calibration of the export's threshold, and what an SAE offers beyond SAELens' contract.

SAELens exports BatchTopK with a running mean of the smallest active latent of each batch. At its
default rate of .01 that mean lags: 160 latents instead of 32 after 150 steps were measured. Both
SAEs of a comparison get theirs from the same kind of batches, so they stand at the same L0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE

from msae_plugin.architecture.mechanisms.firing_floor import thresholds_at_rate
from msae_plugin.architecture.ranks import Ranks
from msae_plugin.architecture.selection import batch_top_k
from msae_plugin.architecture.training_base import MultiScaleTrainingBase
from msae_plugin.common.errors import RunFailure

# Scores kept per batch at first, as a multiple of k: room for batches denser than the average.
_KEPT_MULTIPLE = 2.0


@torch.no_grad()
def calibrated_threshold(
    batches: Sequence[torch.Tensor],
    hidden_pre_of: Callable[[torch.Tensor], torch.Tensor],
    scores_of: Callable[[torch.Tensor], torch.Tensor],
    k: float,
) -> float | None:
    """Score above which exactly k latents per token are active on average.

    Halfway between the last score kept and the first one dropped; low enough to admit all when no
    more than k latents per token are positive; None when there was no batch.
    """
    if not batches:
        return None
    multiple = _KEPT_MULTIPLE
    while True:
        kept: list[torch.Tensor] = []
        # Scores below the last one kept of a batch that had more are not known.
        known_down_to = float("-inf")
        n_tokens = 0
        for batch in batches:
            hidden_pre = hidden_pre_of(batch)
            scores = scores_of(hidden_pre)
            chosen = batch_top_k(hidden_pre, scores, multiple * k, [])
            kept.append(scores[chosen.tokens, chosen.latents].float())
            if kept[-1].numel() < int((hidden_pre > 0).sum()):
                known_down_to = max(known_down_to, float(chosen.lowest_score))
            n_tokens += hidden_pre.shape[0]
        threshold = _threshold_among(torch.cat(kept), round(k * n_tokens))
        if not threshold < known_down_to:
            return threshold
        multiple *= 2


def _threshold_among(scores: torch.Tensor, n_wanted: int) -> float:
    scores = torch.sort(scores, descending=True).values
    if scores.numel() == 0:
        return 0.0
    if scores.numel() <= n_wanted:
        # Scores that are not standardised are positive; others are admitted down to the last.
        below = torch.nextafter(scores[-1], scores.new_tensor(-torch.inf))
        return min(0.0, float(below))
    if not n_wanted:
        return float("inf")
    last, first_dropped = scores[n_wanted - 1 : n_wanted + 1].tolist()
    return (last + first_dropped) / 2


@torch.no_grad()
def calibrate_multiscale(
    sae: MultiScaleTrainingBase,
    batches: Sequence[torch.Tensor],
    hidden_pre_of: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Set the threshold of our own SAE; see `MultiScaleTrainingSAE.calibrate_threshold`.

    With a firing floor, every latent gets the threshold at which it fires at the floor, where that
    is below the common one; training leaves it somewhere around.
    """
    cfg, floor, statistics = sae.cfg, sae.mechanisms.firing_floor, sae.mechanisms.statistics

    def mean_l0() -> float:
        active = sum(int((hidden_pre_of(b) > sae.threshold()).sum()) for b in batches)
        return active / sum(batch.shape[0] for batch in batches)

    if not batches:
        raise RunFailure("calibrate_threshold needs at least one batch of activations; got none")
    before = mean_l0()
    lowest, scores = None, sae.scores
    if floor is not None:
        lowest = thresholds_at_rate(batches, hidden_pre_of, cfg.floor_rate(cfg.k))
    if floor is not None and lowest is not None:
        # What the floor admits is active whatever the common threshold is; dense latents that are
        # held back stay so.
        held = floor.allowance.clamp(max=0)
        scores = partial(_above_all, lowest.masked_fill(held < 0, torch.inf), held)
    threshold = calibrated_threshold(batches, hidden_pre_of, scores, cfg.k)
    if threshold is not None and not isfinite(threshold):
        # Tokens are so alike that the floor alone would take the whole budget.
        lowest = None
        threshold = calibrated_threshold(batches, hidden_pre_of, sae.scores, cfg.k)
    assert threshold is not None, "there are batches"
    if floor is not None and lowest is not None:
        floor.allow_down_to(lowest, threshold)
    if cfg.selection == "batchtopk":
        sae.topk_threshold.fill_(threshold)
    elif cfg.zscore_z_lr > 0 and statistics is not None:
        statistics.z.fill_(threshold)
    return {
        "l0_before": before,
        "l0_after": mean_l0(),
        "threshold": float(sae.threshold().mean() * sae.latent_unit()),
    }


def _above_all(
    threshold: torch.Tensor, held: torch.Tensor, hidden_pre: torch.Tensor
) -> torch.Tensor:
    """Scores that keep what exceeds its latent's threshold before anything else."""
    return torch.where(hidden_pre > threshold, torch.inf, hidden_pre + held)


@runtime_checkable
class SupportsRevival(Protocol):
    """An SAE that re-aims dead latents and reports it."""

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets the SAE reset the optimiser's state of the latents that it re-aims."""

    def pop_events(self) -> list[dict[str, Any]]:
        """Revivals and their outcomes since the last call, as JSON-able dictionaries."""
        ...


@runtime_checkable
class SupportsRanks(Protocol):
    """An SAE that can train on a share of each batch, beside other processes."""

    def attach_ranks(self, ranks: Ranks) -> None:
        """Compute what depends on the batch over the batches of all ranks."""


@runtime_checkable
class SupportsCalibration(Protocol):
    """An SAE that can set its own threshold so that its mean L0 is k."""

    def calibrate_threshold(self, batches: Iterable[torch.Tensor]) -> dict[str, float]:
        """Set the threshold on these batches, scaled as training batches are."""
        ...


@runtime_checkable
class SupportsLatentThresholds(Protocol):
    """A BatchTopK whose latents are exported with thresholds of their own."""

    def latent_thresholds(self) -> torch.Tensor:
        """(d_sae,) pre-activations above which they are active."""
        ...


def needs_calibration(sae: TrainingSAE[Any]) -> bool:
    """Whether a threshold can be set: topk, standard, gated and jumprelu have none to set."""
    return isinstance(sae, (SupportsCalibration, BatchTopKTrainingSAE))


def calibrate(sae: TrainingSAE[Any], batches: Sequence[torch.Tensor]) -> dict[str, float]:
    """Set the inference threshold of an SAE for which `needs_calibration` holds, before folding.

    `batches` (n_tokens, d_in) are scaled as training batches are. Gives `l0_before` and `l0_after`,
    active latents per token on them, and `threshold`. Raises TypeError without a threshold.
    """
    was_training = sae.training
    sae.eval()
    try:
        if isinstance(sae, SupportsCalibration):
            return {key: float(value) for key, value in sae.calibrate_threshold(batches).items()}
        if isinstance(sae, BatchTopKTrainingSAE):
            return calibrate_batchtopk(sae, batches)
        raise TypeError(f"{type(sae).__name__} has no threshold to calibrate")
    finally:
        sae.train(was_training)


@torch.no_grad()
def calibrate_batchtopk(
    sae: BatchTopKTrainingSAE,
    batches: Sequence[torch.Tensor],
    scores_of: Callable[[torch.Tensor], torch.Tensor] = lambda hidden_pre: hidden_pre,
) -> dict[str, float]:
    """Set `topk_threshold` of SAELens' batchtopk and its kin so that mean L0 is k.

    Latents whose score is infinite are kept before anything else.
    """

    def hidden_pre_of(batch: torch.Tensor) -> torch.Tensor:
        return sae.encode_with_hidden_pre(batch)[1].float()

    l0_before = _mean_l0(sae, batches)
    threshold = calibrated_threshold(batches, hidden_pre_of, scores_of, sae.cfg.k)
    assert threshold is not None, "there are batches"
    sae.topk_threshold.fill_(threshold)
    return {
        "l0_before": l0_before,
        "l0_after": _mean_l0(sae, batches),
        "threshold": threshold,
    }


def exported_threshold(sae: BatchTopKTrainingSAE) -> torch.Tensor:
    """Pre-activation above which exported latents are active: (), or (d_sae,) if it differs."""
    if isinstance(sae, SupportsLatentThresholds):
        return sae.latent_thresholds()
    return sae.topk_threshold


def _mean_l0(sae: BatchTopKTrainingSAE, batches: Sequence[torch.Tensor]) -> float:
    """Active latents per token as the exported JumpReLU counts them."""
    active, threshold = 0, exported_threshold(sae)
    for batch in batches:
        hidden_pre = sae.encode_with_hidden_pre(batch)[1]
        active += int(((hidden_pre > threshold) & (hidden_pre > 0)).sum())
    return active / sum(len(batch) for batch in batches)
