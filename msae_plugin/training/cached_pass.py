"""Training from a cache of activations: no language model, no text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from msae_plugin import upstream
from msae_plugin.training.activation_store import CachedActivations, CachedBatches, norm_batches
from msae_plugin.training.passes import TrainingPass, TrainingSetting
from msae_plugin.training.shared_pass import shared_pass_config


class CachedPass(TrainingPass):
    """Trains all SAEs of a recipe on the rows of a cache.

    Args:
        cache: The cache, already checked against the recipe.
        setting: The run.
        saes: The initialised SAEs by name.
        device: Device of SAEs and activations.
    """

    def __init__(
        self,
        cache: CachedActivations,
        setting: TrainingSetting,
        *,
        saes: dict[str, TrainingSAE[Any]],
        device: str,
    ) -> None:
        config, plans = setting.config, setting.plans
        self.cfg = shared_pass_config(config, plans, cache, device, autocast=cache.autocast)
        self.saes = {name: sae.to(device) for name, sae in saes.items()}
        upstream.set_sae_metadata(self)
        self._batches = CachedBatches(
            cache,
            [plan.hook for plan in plans],
            config.training.batch_size_tokens,
            device,
            setting.ranks,
        )
        self._before_training = norm_batches(config, plans)
        self.begin(setting, self._batches)

    @override
    def go_to_place(self, folder: Path) -> None:
        # A checkpoint carries the scaling: the batches it was estimated on are not read again.
        steps = self.trainer.n_training_steps * self.config.training.accumulation_steps
        self._batches.position = self._before_training + steps

    @override
    def place_writer(self) -> Callable[[Path], None]:
        # The step says it.
        return lambda _: None
