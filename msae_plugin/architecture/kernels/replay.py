"""A training step as something that can be recorded: plain tensors in, plain tensors out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import nn
from torch.func import functional_call
from typing_extensions import override

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.kernels.cuda_graphs import StepOutputs
from msae_plugin.architecture.step_schedule import (
    Budgets,
    DeadLatents,
    StepInputs,
    StepResults,
    StepSchedule,
)
from msae_plugin.architecture.training_base import MultiScaleTrainingBase

# While k falls a recorded list has room for the largest k of its part of the fall.
_PARTS_OF_THE_FALL = 8
# Shortest padded list of dead latents; the others are twice, four times as long, and so on.
_SHORTEST_LIST = 64


def replayed_step(
    sae: MultiScaleTrainingBase, given: StepInputs, schedule: StepSchedule
) -> StepResults | None:
    """The step of an SAE, replayed from a recording (`kernels/cuda_graphs.py`).

    The loss alone has a gradient. None where the step has to be run as it is.
    """
    if not _can_be_recorded(sae, given.sae_in):
        return None
    n_listed = room_for_pairs(sae.cfg, schedule.step, given.sae_in.shape[0])
    inputs, numbers = [given.sae_in], schedule.numbers()
    if given.dead is not None:
        latents, n_dead = padded(given.dead)
        inputs += [latents, given.dead.mask]
        numbers.append(n_dead)

    named = {name: p for name, p in sae.named_parameters() if p.requires_grad}

    def function(
        inputs: Sequence[torch.Tensor], numbers: torch.Tensor, parameters: Sequence[torch.Tensor]
    ) -> StepOutputs:
        sae_in, *static_dead = inputs
        dead = None
        if static_dead:
            latents, mask = static_dead
            dead = DeadLatents(mask, latents, count=numbers[-1])
            numbers = numbers[:-1]
        inside = schedule.with_numbers(numbers, n_listed)
        # A cast that autocast keeps for later would be a tensor from outside the recording.
        kind = sae_in.device.type
        dtype, mixed = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.autocast(kind, dtype, enabled=mixed, cache_enabled=False):
            results = functional_call(
                _Step(sae),
                {f"sae.{name}": leaf for name, leaf in zip(named, parameters, strict=True)},
                (StepInputs(sae_in, dead, given.l1_coefficient), inside),
            )
        return StepOutputs(
            loss=results.loss,
            terms=torch.stack([term.detach() for term in results.terms.values()]),
            names=tuple(results.terms),
            others=(results.sae_out, results.feature_acts, results.hidden_pre),
        )

    signature = _signature(sae, inputs, n_listed, given.l1_coefficient, schedule.step)
    outputs = sae.recorded_steps.step(
        function, signature, inputs, numbers, list(named.values()), phase=n_listed
    )
    if outputs is None:
        return None
    terms = dict(zip(outputs.names, outputs.terms.unbind(), strict=True))
    return StepResults(terms, outputs.loss, *outputs.others)


class _Step(nn.Module):
    """`take_step` as a forward pass, for `functional_call`."""

    def __init__(self, sae: MultiScaleTrainingBase) -> None:
        super().__init__()
        self.sae = sae

    @override
    def forward(self, given: StepInputs, schedule: StepSchedule) -> StepResults:
        return self.sae.take_step(given, schedule)


def _can_be_recorded(sae: MultiScaleTrainingBase, sae_in: torch.Tensor) -> bool:
    return (
        sae_in.device.type == "cuda"
        and sae.can_be_recorded
        and torch.is_grad_enabled()
        and not sae_in.requires_grad
        # A function of the user's would be called while recording only.
        and not any(point.fwd_hooks or point.bwd_hooks for point in sae.hook_points())
    )


def _signature(
    sae: MultiScaleTrainingBase,
    inputs: Sequence[torch.Tensor],
    n_listed: int,
    l1_coefficient: float,
    step: int,
) -> Hashable:
    """Everything that a recording of a step depends on and that a replay cannot be given."""
    kind = inputs[0].device.type
    tensors = (*sae.parameters(), *sae.buffers())
    return (
        tuple((tensor.shape, tensor.dtype) for tensor in inputs),
        tuple((tensor.data_ptr(), tensor.requires_grad) for tensor in tensors),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        n_listed,
        l1_coefficient,
        sae.machine,
        tuple(mechanism.recording_key(sae.cfg, step) for mechanism in sae.mechanisms),
        tuple(
            tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType]
            for name, value in vars(sae.cfg).items()
            if name != "metadata"
        ),
    )


def room_for_pairs(cfg: MultiScaleTrainingSAEConfig, step: int, n_tokens: int) -> int:
    """Length of a list that holds the pairs of this step and of those near it.

    The same number for every step of an eighth of the fall of k, and after it.
    """
    k, highest = cfg.k, cfg.k * cfg.k_initial_multiplier
    if highest > k:
        part = math.ceil((cfg.k_at(step) - k) / (highest - k) * _PARTS_OF_THE_FALL)
        k += (highest - k) * part / _PARTS_OF_THE_FALL
    at_least = Budgets.of(cfg.k_at(step), cfg.sparsity_scales, n_tokens, cfg.d_sae).n_listed
    return max(at_least, Budgets.of(k, cfg.sparsity_scales, n_tokens, cfg.d_sae).n_listed)


def padded(dead: DeadLatents) -> tuple[torch.Tensor, int]:
    """The list of dead latents in one of few lengths, and how many there are in it."""
    n_dead, length = dead.latents.numel(), _SHORTEST_LIST
    while length < n_dead:
        length *= 2
    latents = dead.latents.new_zeros(min(length, dead.mask.numel()))
    latents[:n_dead] = dead.latents
    return latents, n_dead
