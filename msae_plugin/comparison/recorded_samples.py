"""Samples of a ground truth made once and shown to every SAE that is judged on them.

Making samples is most of the cost of judging an SAE on two cores (72 % at 2048 features); all SAEs
of a seed are judged on the same ones anyway. Latent features are sparse, so they are kept sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from sae_lens.synthetic import ActivationGenerator


class RecordedSamples:
    """What an evaluation calls in place of the generator; from the beginning again with `rewind`.

    Args:
        batches: Sparse feature activations, each (n_samples, n_features), in the order of the draw.
    """

    def __init__(self, batches: Sequence[torch.Tensor]) -> None:
        self._batches = list(batches)
        self._next = 0

    @classmethod
    def record(
        cls, generator: ActivationGenerator, n_samples: int, batch_size: int
    ) -> RecordedSamples:
        """Draw `n_samples` in batches of `batch_size`, the last one smaller, as SAELens does."""
        sizes = [batch_size] * (n_samples // batch_size)
        if n_samples % batch_size:
            sizes.append(n_samples % batch_size)
        with torch.no_grad():
            return cls([generator.sample(size).to_sparse() for size in sizes])

    def rewind(self) -> ActivationGenerator:
        """Begin again.

        Returns:
            Itself, as the generator it stands for: SAELens' evaluation calls `sample` alone.
        """
        self._next = 0
        return cast("ActivationGenerator", self)

    def sample(self, n_samples: int) -> torch.Tensor:
        """The next batch, dense (n_samples, n_features).

        Raises:
            ValueError: Another size than was recorded is asked for, or more batches.
        """
        if self._next == len(self._batches):
            raise ValueError(f"only {len(self._batches)} batches were recorded")
        batch = self._batches[self._next]
        if batch.shape[0] != n_samples:
            raise ValueError(f"batch of {batch.shape[0]} samples recorded, {n_samples} asked for")
        self._next += 1
        return batch.to_dense()
