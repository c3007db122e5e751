"""Randomness of a run: every part draws from its own stream, derived from the run's seed.

SAELens never reads `cfg.seed` when it trains on a language model, and everything draws from one
global generator: there, adding a second SAE changes the first one and the order of the data. Here
the data and each SAE own a stream, so that an SAE of a comparison is the SAE of a run alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(seed: int, *labels: str) -> int:
    """A seed for one part of the run, below 2**32 (numpy's range), independent of other parts."""
    digest = hashlib.sha256("\x1f".join([str(seed), *labels]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RandomStream:
    """One part's own view of torch's, numpy's and Python's global generators.

    The CPU's generators always belong to the stream, those of a CUDA device where it is given.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device) if torch.device(device).type == "cuda" else None
        outside = self._capture()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # Not torch.manual_seed: it would reseed the devices that are not this stream's as well.
        torch.default_generator.manual_seed(seed)
        if self._cuda is not None:
            with torch.cuda.device(self._cuda):
                torch.cuda.manual_seed(seed)
        self._state = self._capture()
        self._restore(outside)

    def _capture(self) -> tuple[object, object, torch.Tensor, torch.Tensor | None]:
        cuda = None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda

    def _restore(self, state: tuple[object, object, torch.Tensor, torch.Tensor | None]) -> None:
        python, numpy, cpu, cuda = state
        random.setstate(python)  # pyright: ignore[reportArgumentType]
        np.random.set_state(numpy)  # pyright: ignore[reportArgumentType]
        torch.set_rng_state(cpu)
        if self._cuda is not None and cuda is not None:
            torch.cuda.set_rng_state(cuda, self._cuda)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as `torch.load` takes it with `weights_only`."""
        python, numpy, cpu, cuda = self._state
        kind, words, *rest = numpy  # pyright: ignore[reportGeneralTypeIssues]
        return {
            "python": python,
            "numpy": (kind, torch.from_numpy(words.astype(np.int64)), *rest),
            "cpu": cpu,
            "cuda": cuda,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another stream was."""
        kind, words, *rest = state["numpy"]
        numpy = (kind, words.numpy().astype(np.uint32), *rest)
        self._state = state["python"], numpy, state["cpu"], state["cuda"]

    @contextmanager
    def active(self) -> Generator[None]:
        """Draw from this stream inside the block; the generators outside stay untouched."""
        outside = self._capture()
        self._restore(self._state)
        try:
            yield
        finally:
            self._state = self._capture()
            self._restore(outside)
