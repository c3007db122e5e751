"""The moments of a training step at which a mechanism may act.

A mechanism holds buffers and parameters; its settings are fields of the configuration, where 0 or
an empty list switches it off. `mechanisms/__init__.py` lists all of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from typing_extensions import Self

from msae_plugin.architecture.config import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.float32_buffers import KeepsFloat32
from msae_plugin.architecture.kernels.decoding import DecodeKernel
from msae_plugin.architecture.ranks import Ranks
from msae_plugin.architecture.step_schedule import StepSchedule

_M = TypeVar("_M", bound="Mechanism")


class TrainedSAE(Protocol):
    """What a mechanism knows of its SAE."""

    cfg: MultiScaleTrainingSAEConfig
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    firing_rate: torch.Tensor
    ranks: Ranks

    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """The input less b_dec."""
        ...

    def errors(self, sae_in: torch.Tensor) -> torch.Tensor:
        """(n_tokens, d_in) input minus reconstruction, in the training unit."""
        ...

    def decode_kernel(self) -> DecodeKernel:
        """The kernel that sums decoder rows."""
        ...


@dataclass(frozen=True)
class Step:
    """A training step."""

    sae: TrainedSAE  # The SAE, in a recorded step with the recording's own weights
    sae_in: torch.Tensor  # (n_tokens, d_in) activations of this rank, in the training unit
    schedule: StepSchedule  # The numbers of the step
    switched_on: Sequence[Mechanism]

    @property
    def cfg(self) -> MultiScaleTrainingSAEConfig:
        """Configuration of the SAE."""
        return self.sae.cfg

    @property
    def n_tokens(self) -> int:
        """Tokens of all ranks."""
        return self.sae_in.shape[0] * self.sae.ranks.count

    def mechanism(self, kind: type[_M]) -> _M | None:
        """The mechanism of a class, if it is on."""
        return next((one for one in self.switched_on if isinstance(one, kind)), None)


@dataclass(frozen=True)
class Latents:
    """The latents of a step."""

    feature_acts: torch.Tensor  # (n_tokens, d_sae) latents at the budget k, dense
    # (n_pairs,) tokens of pairs among which all active ones are; other latents are zero
    tokens: torch.Tensor
    latents: torch.Tensor  # (n_pairs,) their latents
    fired: torch.Tensor  # (d_sae,) tokens on which each latent fired, of all ranks
    # Zero-dimensional, smallest score at the budget k; 0 when nothing is active
    threshold: torch.Tensor


class Mechanism(KeepsFloat32):
    """A part of the method that can be switched off. By default it does nothing."""

    @classmethod
    def of(cls, cfg: MultiScaleTrainingSAEConfig, device: torch.device) -> Self | None:
        """The mechanism that a configuration asks for; None when it is off."""
        raise NotImplementedError

    def before_step(self, step: Step) -> None:
        """Change weights or statistics before anything is computed; never part of a recording."""

    def on_pre_activations(self, hidden_pre: torch.Tensor, step: Step) -> None:
        """Follow the (n_tokens, d_sae) pre-activations, without gradient."""

    def scores(self, hidden_pre: torch.Tensor, cfg: MultiScaleTrainingSAEConfig) -> torch.Tensor:
        """(n_tokens, d_sae) what BatchTopK ranks."""
        del cfg
        return hidden_pre

    def threshold(self, threshold: torch.Tensor, cfg: MultiScaleTrainingSAEConfig) -> torch.Tensor:
        """() or (d_sae,) pre-activation of each latent whose score is a threshold ()."""
        del cfg
        return threshold

    def loss(self, step: Step) -> dict[str, torch.Tensor]:
        """Terms of the loss by name, zero-dimensional and weighted."""
        del step
        return {}

    def on_latents(self, latents: Latents, step: Step) -> None:
        """Follow the latents, after the losses and without gradient."""

    def metrics(self, cfg: MultiScaleTrainingSAEConfig, step: int) -> dict[str, Any]:
        """Values for the metrics log; asked for on logging steps only."""
        del cfg, step
        return {}

    def fold_scale(self, factor: float) -> None:
        """Take inputs x instead of `factor` * x, once training is over."""

    def recordable(self, cfg: MultiScaleTrainingSAEConfig) -> bool:
        """Whether its operations and their shapes are the same at every step.

        Mechanisms off the presets copy small tables, or have lists whose length the data give.
        """
        del cfg
        return False

    def recording_key(self, cfg: MultiScaleTrainingSAEConfig, step: int) -> Hashable:
        """What a recording of a step depends on, and a replay cannot be given."""
        del cfg, step
        return None
