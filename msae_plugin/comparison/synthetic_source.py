"""Ground truth as a source of activations: `sae_lens.synthetic` models.

Batch `number` of a seed is drawn from a random stream of its own, so that it can be had again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from collections.abc import Mapping
from typing import Any, cast

import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig

from msae_plugin.common.errors import InputError
from msae_plugin.common.recipes import unknown_key_message
from msae_plugin.common.seeding import RandomStream, derive_seed
from msae_plugin.comparison.compare_sections import SyntheticSection
from msae_plugin.comparison.sources import SAMPLE_TOKENS
from msae_plugin.training.plans import default_device


def model_config(section: SyntheticSection) -> SyntheticModelConfig:
    """SAELens' configuration of the ground truth.

    Raises:
        InputError: A field is unknown, missing or impossible.
    """
    known = {item.name for item in dataclasses.fields(SyntheticModelConfig)}
    for key in section.model:
        if key not in known:
            raise InputError(unknown_key_message(key, known, "synthetic.model"))
    for key in ("num_features", "hidden_dim", "firing_probability", "seed"):
        if section.model.get(key) is None:
            raise InputError(f"'synthetic.model.{key}' is missing")
    try:
        return SyntheticModelConfig.from_dict(copy.deepcopy(section.model))
    # SAELens checks some values, and leaves others to its dataclasses and registries.
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"'synthetic.model': {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


class SyntheticSource:
    """Ground-truth models and their samples.

    Args:
        section: The recipe's section.
        batch_size: Samples per mini-batch.

    Raises:
        InputError: The section cannot work.
    """

    def __init__(self, section: SyntheticSection, batch_size: int) -> None:
        self.config = model_config(section)
        self.device = default_device(section.device)
        self.side_by_side = section.saes_at_once
        self._section = section
        self._batch_size = batch_size
        # The model of the seed that was asked for last: seeds are trained one after another.
        self._model: tuple[int, SyntheticModel] | None = None

    def model(self, seed: int) -> SyntheticModel:
        """The ground truth of a seed."""
        own = self._section.new_model_per_seed
        model_seed = cast("int", self.config.seed) + (seed if own else 0)
        if self._model is None or self._model[0] != model_seed:
            config = dataclasses.replace(self.config, seed=model_seed)
            # Features are made orthogonal by gradient descent, with a progress bar.
            with torch.enable_grad(), contextlib.redirect_stderr(io.StringIO()):
                self._model = model_seed, SyntheticModel(config, device=self.device)
        return self._model[1]

    def stream(self, seed: int, *labels: str) -> RandomStream:
        """Random numbers for one purpose."""
        return RandomStream(derive_seed(seed, "ground truth", *labels), self.device)

    def d_in(self, hook: str) -> int:
        """Width of the samples."""
        del hook
        return self.config.hidden_dim

    def batch(self, hook: str, seed: int, number: int) -> torch.Tensor:
        """Batch `number` of the seed."""
        del hook
        return self._sample(seed, "train", number, self._batch_size)

    def fresh(self, hook: str, seed: int, count: int) -> list[torch.Tensor]:
        """Batches from streams that training does not draw from."""
        del hook
        return [self._sample(seed, "fresh", n, self._batch_size) for n in range(count)]

    def samples(self, hook: str, seed: int) -> torch.Tensor:
        """Samples for the export check."""
        del hook
        return self._sample(seed, "check", 0, SAMPLE_TOKENS).float()

    @torch.no_grad()
    def _sample(self, seed: int, purpose: str, number: int, count: int) -> torch.Tensor:
        model = self.model(seed)
        kind = torch.device(self.device).type
        with (
            self.stream(seed, purpose, str(number)).active(),
            torch.autocast(kind, dtype=torch.bfloat16, enabled=self._section.autocast),
        ):
            return model.sample(count)

    def describe(self, metadata: SAEMetadata, hook: str) -> None:
        """There is no language model to name."""
        del hook
        metadata.dataset_path = "sae_lens.synthetic"

    def record(self) -> dict[str, Any]:
        """The ground truth's configuration."""
        described = (
            f"ground truth: {self.config.num_features:,} features in {self.config.hidden_dim} "
            f"dimensions, seed {self.config.seed}"
            + (" + the SAE's seed" if self._section.new_model_per_seed else "")
        )
        model: Mapping[str, Any] = self.config.to_dict()
        return {
            "model": {"name": "sae_lens.synthetic", **model},
            "data": {"description": described},
        }
