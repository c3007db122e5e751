"""The values of a training step: its schedules, its inputs, its results.

A step that was recorded on a GPU (`kernels/cuda_graphs.py`) is replayed with other numbers, so that
everything that changes from step to step is here, as Python numbers or as tensors of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.selection import pair_budgets, running_rate

Number = float | torch.Tensor


@dataclass(frozen=True)
class Budgets:
    """How many pairs of a batch may be active."""

    # Pairs that k and every s * k allow, ascending; zero-dimensional tensors in a recorded step
    pairs: Sequence[int] | Sequence[torch.Tensor]
    main_level: int  # Which of them is k's own
    n_listed: int  # Length of the list of pairs; at least the last budget

    @classmethod
    def of(cls, k: float, sparsity_scales: Sequence[float], n_tokens: int, d_sae: int) -> Budgets:
        """Budgets at a k, in a list no longer than the largest."""
        pairs, main_level = pair_budgets(k, sparsity_scales, n_tokens, d_sae)
        return cls(pairs, main_level, pairs[-1])


@dataclass(frozen=True)
class StepSchedule:
    """The numbers of one training step."""

    step: int  # Training steps before this one
    k: Number
    budgets: Budgets  # Pairs that may be active
    floor_rate: Number  # Firing rate below which a latent is helped
    # Weight of this step in the running threshold. While k falls the threshold falls with it, so
    # the running estimate starts when k has arrived
    threshold_rate: Number
    firing_rate_rate: Number  # Weight of this step in the running firing rates
    statistics_rate: Number  # Weight of this step in all other running means

    @classmethod
    def at(cls, cfg: MultiScaleTrainingSAEConfig, step: int, n_tokens: int) -> StepSchedule:
        """The schedule of a step on a batch of so many tokens."""
        k = cfg.k_at(step)
        return cls(
            step=step,
            k=k,
            budgets=Budgets.of(k, cfg.sparsity_scales, n_tokens, cfg.d_sae),
            floor_rate=cfg.floor_rate(k),
            threshold_rate=running_rate(cfg.topk_threshold_lr, max(0, step - cfg.k_anneal_steps)),
            firing_rate_rate=running_rate(1 - cfg.firing_rate_decay, step),
            statistics_rate=running_rate(1 - cfg.statistics_decay, step),
        )

    def numbers(self) -> list[float]:
        """Everything that is a tensor in a recorded step, in the order of `with_numbers`."""
        rates = (self.threshold_rate, self.firing_rate_rate, self.statistics_rate)
        numbers = (self.k, self.floor_rate, *rates, *self.budgets.pairs)
        return [float(number) for number in numbers]

    def with_numbers(self, numbers: torch.Tensor, n_listed: int) -> StepSchedule:
        """The same schedule with tensors for numbers (n,), as `numbers` gives them."""
        n_pairs = len(self.budgets.pairs)
        k, *rates = numbers[:-n_pairs].float().unbind()
        pairs = numbers[-n_pairs:].long().unbind()
        budgets = replace(self.budgets, pairs=pairs, n_listed=n_listed)
        return StepSchedule(self.step, k, budgets, *rates)


@dataclass(frozen=True)
class DeadLatents:
    """The latents that AuxK trains."""

    mask: torch.Tensor  # (d_sae,) bool, which latents are dead
    latents: torch.Tensor  # (n_listed,) their indices, long, and padding behind them
    # How many there are, where the list is padded: a zero-dimensional tensor. None where the list
    # is as long as they are many
    count: torch.Tensor | None = None

    @classmethod
    def listed(cls, mask: torch.Tensor) -> DeadLatents | None:
        """A list as long as there are dead latents, or None when there are none."""
        latents = mask.nonzero().squeeze(1)
        return cls(mask, latents) if latents.numel() else None


@dataclass(frozen=True)
class StepInputs:
    """What a step is given."""

    sae_in: torch.Tensor  # (n_tokens, d_in) activations in the dtype of the SAE
    dead: DeadLatents | None  # The latents that AuxK trains; None when there are none
    l1_coefficient: float = 0.0  # Weight of the L1 penalty in this step


@dataclass(frozen=True)
class EncoderInput:
    """What the encoder is given."""

    x_hat: torch.Tensor  # (n_tokens, d_in) normalised tokens
    # (n_tokens, 1) factor that undoes the normalisation; None without one
    token_scale: torch.Tensor | None = None
    # (d_sae,) norms by which pre-activations are multiplied, so that they are ranked as if the
    # decoder had unit norm; None without the rescaling. They cancel in the reconstruction and carry
    # no gradient
    decoder_norm: torch.Tensor | None = None
    # (d_in,) b_dec where x_hat is a constant less b_dec; None otherwise
    centre: torch.Tensor | None = None


@dataclass(frozen=True)
class StepResults:
    """What a step gives."""

    terms: dict[str, torch.Tensor]  # Loss terms by name, zero-dimensional
    loss: torch.Tensor
    sae_out: torch.Tensor  # (n_tokens, d_in) reconstruction
    feature_acts: torch.Tensor  # (n_tokens, d_sae) latents
    hidden_pre: torch.Tensor  # (n_tokens, d_sae) pre-activations
