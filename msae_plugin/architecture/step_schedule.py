"""What a training step takes from its number: k, its budgets, rates of running means.

A step that was recorded on a GPU (`kernels/cuda_graphs.py`) is replayed with other numbers, so that
everything that changes from step to step is here, as Python numbers or as tensors of the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from msae_plugin.architecture.auxk import DeadLatents
from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.selection import pair_budgets, running_rate

Number = float | torch.Tensor

_INPUT_VARIANCE_DECAY = 0.99
# While k falls a recorded list has room for the largest k of its part of the fall.
_PARTS_OF_THE_FALL = 8


@dataclass(frozen=True)
class Budgets:
    """How many pairs of a batch may be active.

    Attributes:
        pairs: Pairs that k and every s * k allow, ascending; zero-dimensional tensors in a recorded
            step.
        main_tier: Which of them is k's own.
        n_listed: Length of the list of pairs; at least the last budget.
    """

    pairs: Sequence[int] | Sequence[torch.Tensor]
    main_tier: int
    n_listed: int

    @classmethod
    def of(cls, k: float, sparsity_scales: Sequence[float], n_tokens: int, d_sae: int) -> Budgets:
        """Budgets at a k, in a list no longer than the largest."""
        pairs, main_tier = pair_budgets(k, sparsity_scales, n_tokens, d_sae)
        return cls(pairs, main_tier, pairs[-1])


@dataclass(frozen=True)
class StepSchedule:
    """The numbers of one training step.

    Attributes:
        step: Training steps before this one.
        k: Target L0.
        budgets: Pairs that may be active.
        floor_rate: Firing rate below which a latent is helped.
        threshold_rate: Weight of this step in the running cut. While k falls the cut falls with it,
            so the running estimate starts when k has arrived.
        firing_rate_rate: Weight of this step in the running firing rates.
        input_variance_rate: Weight of this step in the running variance of the activations.
    """

    step: int
    k: Number
    budgets: Budgets
    floor_rate: Number
    threshold_rate: Number
    firing_rate_rate: Number
    input_variance_rate: Number

    @classmethod
    def at(cls, cfg: MultiScaleTrainingSAEConfig, step: int, n_tokens: int) -> StepSchedule:
        """The schedule of a step.

        Args:
            cfg: Configuration of the SAE.
            step: Training steps before this one.
            n_tokens: Tokens of the batch.
        """
        k = cfg.k_at(step)
        return cls(
            step=step,
            k=k,
            budgets=Budgets.of(k, cfg.sparsity_scales, n_tokens, cfg.d_sae),
            floor_rate=cfg.floor_rate(k),
            threshold_rate=running_rate(cfg.topk_threshold_lr, max(0, step - cfg.k_anneal_steps)),
            firing_rate_rate=running_rate(1 - cfg.firing_rate_decay, step),
            input_variance_rate=running_rate(1 - _INPUT_VARIANCE_DECAY, step),
        )

    def numbers(self) -> list[float]:
        """Everything that is a tensor in a recorded step, in the order of `with_numbers`."""
        rates = (self.threshold_rate, self.firing_rate_rate, self.input_variance_rate)
        numbers = (self.k, self.floor_rate, *rates, *self.budgets.pairs)
        return [float(number) for number in numbers]

    def with_numbers(self, numbers: torch.Tensor, n_listed: int) -> StepSchedule:
        """The same schedule with tensors for numbers.

        Args:
            numbers: (n,) float64, values as `numbers` gives them.
            n_listed: Length of the list of pairs.
        """
        n_pairs = len(self.budgets.pairs)
        k, *rates = numbers[:-n_pairs].float().unbind()
        pairs = numbers[-n_pairs:].long().unbind()
        budgets = replace(self.budgets, pairs=pairs, n_listed=n_listed)
        return StepSchedule(self.step, k, budgets, *rates)


def room_for_pairs(cfg: MultiScaleTrainingSAEConfig, step: int, n_tokens: int) -> int:
    """Length of a list that holds the pairs of this step and of those near it.

    Args:
        cfg: Configuration of the SAE.
        step: Training steps before this one.
        n_tokens: Tokens of the batch.

    Returns:
        The same number for every step of an eighth of the fall of k, and after it.
    """
    k, highest = cfg.k, cfg.k * cfg.k_initial_multiplier
    if highest > k:
        part = math.ceil((cfg.k_at(step) - k) / (highest - k) * _PARTS_OF_THE_FALL)
        k += (highest - k) * part / _PARTS_OF_THE_FALL
    at_least = Budgets.of(cfg.k_at(step), cfg.sparsity_scales, n_tokens, cfg.d_sae).n_listed
    return max(at_least, Budgets.of(k, cfg.sparsity_scales, n_tokens, cfg.d_sae).n_listed)


@dataclass(frozen=True)
class StepInputs:
    """What a step is given.

    Attributes:
        sae_in: (n_tokens, d_in) activations in the dtype of the SAE.
        dead: The latents that AuxK trains; None when there are none.
        l1_coefficient: Weight of the L1 penalty in this step.
    """

    sae_in: torch.Tensor
    dead: DeadLatents | None
    l1_coefficient: float = 0.0


@dataclass(frozen=True)
class StepResults:
    """What a step gives.

    Attributes:
        terms: Loss terms by name, zero-dimensional.
        loss: Their sum.
        sae_out: (n_tokens, d_in) reconstruction.
        feature_acts: (n_tokens, d_sae) latents.
        hidden_pre: (n_tokens, d_sae) pre-activations.
    """

    terms: dict[str, torch.Tensor]
    loss: torch.Tensor
    sae_out: torch.Tensor
    feature_acts: torch.Tensor
    hidden_pre: torch.Tensor
