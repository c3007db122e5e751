"""What an SAE can do beyond SAELens' contract; the trainer uses it where it finds it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch

from msae_plugin.architecture.ranks import Ranks


@runtime_checkable
class SupportsRevival(Protocol):
    """An SAE that re-aims dead latents and reports it."""

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets the SAE reset the optimiser's state of the latents that it re-aims."""
        ...

    def pop_events(self) -> list[dict[str, Any]]:
        """Revivals and their outcomes since the last call, as JSON-able dictionaries."""
        ...


@runtime_checkable
class SupportsRanks(Protocol):
    """An SAE that can train on a share of each batch, beside other processes."""

    def attach_ranks(self, ranks: Ranks) -> None:
        """Compute what depends on the batch over the batches of all ranks."""
        ...


@runtime_checkable
class SupportsCalibration(Protocol):
    """An SAE that can set its own cut so that its mean L0 is k."""

    def calibrate_threshold(self, batches: Iterable[torch.Tensor]) -> dict[str, float]:
        """Set the cut on these batches, scaled as training batches are."""
        ...
