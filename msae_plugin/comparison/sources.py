"""Where the SAEs of a comparison get their activations: batches that can be had again by number.

A batch is a function of hook, seed and number. So every SAE of a seed sees the same batches in the
same order, whichever of them are trained together, and a killed run goes on where it stopped.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import Self

SAMPLE_TOKENS = 4096
"""Activations that the export check gets."""


class ActivationSource(Protocol):
    """Activations of one comparison."""

    side_by_side: int | None
    """SAEs to train at once: 1 where batches are read, several where each has to be made; None for
    all of a seed."""

    def d_in(self, hook: str) -> int:
        """Width of the activations."""
        ...

    def batch(self, hook: str, seed: int, number: int) -> torch.Tensor:
        """Training batch `number`, (batch_size, d_in)."""
        ...

    def fresh(self, hook: str, seed: int, count: int) -> list[torch.Tensor]:
        """Further batches that no SAE is trained on, each (batch_size, d_in)."""
        ...

    def samples(self, hook: str, seed: int) -> torch.Tensor:
        """(SAMPLE_TOKENS, d_in) further activations in float32."""
        ...

    def describe(self, metadata: SAEMetadata, hook: str) -> None:
        """Write into an SAE's metadata where its activations are from."""
        ...

    def record(self) -> dict[str, Any]:
        """`model` and `data` of a `run.json`."""
        ...


class SeededBatches:
    """One seed's batches of some hooks, as SAELens' trainers take them.

    Args:
        source: Where they are from.
        hooks: Which hooks.
        seed: Whose order.
    """

    def __init__(self, source: ActivationSource, hooks: list[str], seed: int) -> None:
        self._source = source
        self._hooks = list(dict.fromkeys(hooks))
        self._seed = seed
        self.position = 0

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next mini-batch by hook; never ends."""
        number, self.position = self.position, self.position + 1
        return {hook: self._source.batch(hook, self._seed, number) for hook in self._hooks}
