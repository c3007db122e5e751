"""`msae cache`, and training from what it wrote: no language model, no text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from msae_plugin import upstream
from msae_plugin.architecture.ranks import ALONE
from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay, SilentProgress
from msae_plugin.common.seeding import seed_everything
from msae_plugin.data.text import TextData
from msae_plugin.models.loading import LanguageModel, ModelShape
from msae_plugin.training.activation_store import (
    PLACEHOLDER,
    CachedActivations,
    CachedBatches,
    CacheWriter,
    check_new_cache,
    norm_batches,
    open_cache,
    reading_runner,
    rows_needed,
)
from msae_plugin.training.data_parallel import load_position, save_positions
from msae_plugin.training.inputs import ModelAndText, load_model_and_text
from msae_plugin.training.passes import (
    SharedPassRunner,
    TrainingPass,
    TrainingSetting,
    shared_pass_config,
)
from msae_plugin.training.plans import default_device
from msae_plugin.training.recipe import RunConfig

SECONDS_BETWEEN_SAVES = 30.0


def make_cache(
    config: RunConfig,
    output: Path,
    *,
    language_model: LanguageModel | None = None,
    text: TextData | None = None,
    progress: ProgressDisplay | None = None,
) -> CachedActivations:
    """Run the text through the model and keep what a run of this recipe reads.

    Args:
        config: The recipe; its SAEs say only how many activations are needed.
        output: A new or empty folder, or one with an unfinished cache, which is continued. The
            mixing buffer of a pass that was killed is lost: the rows after it are mixed anew.
        language_model: An already loaded model to use instead of `config.model.name`.
        text: Already loaded text to use instead of `config.data.source`.
        progress: Shows how far the pass is.

    Raises:
        InputError: The recipe or the folder cannot work, the text is too short, the disk too small.
        InterruptedBySignalError: On SIGINT or SIGTERM, once everything so far is on the disk.
    """
    progress = progress or SilentProgress()
    config = replace(config, cached_activations=None)
    shape = None
    if language_model is not None:
        shape = ModelShape(
            language_model.d_model, language_model.n_layers, language_model.vocabulary
        )
    plans = config.validate(shape)
    rows = rows_needed(config, plans)
    check_new_cache(output)
    device = default_device(config.model.device)
    seed_everything(config.training.seed)
    inputs = load_model_and_text(
        config, plans, device, progress, language_model=language_model, text=text
    )
    started = time.perf_counter()
    with InterruptionGuard() as guard:
        runner = reading_runner(
            replace(config, sae=PLACEHOLDER, saes=None),
            inputs.language_model,
            inputs.text,
            output,
            device,
            autocast=inputs.autocast,
            guard=guard,
            progress=progress,
        )
        _write(runner, config, output, rows, guard, progress, inputs, started)
    return open_cache(output)


def _write(
    runner: SharedPassRunner,
    config: RunConfig,
    output: Path,
    rows: int,
    guard: InterruptionGuard,
    progress: ProgressDisplay,
    inputs: ModelAndText,
    started: float,
) -> None:
    store = runner.activations_store
    writer = CacheWriter(output, config, rows, inputs)
    if writer.position:
        with TemporaryDirectory() as folder:
            save_positions([writer.position], Path(folder))
            load_position(store, Path(folder), ALONE)
    progress.start(rows, writer.done, list(config.hooks))
    saved = time.perf_counter()
    try:
        while writer.done < rows:
            guard.check()
            (batch,) = runner.fresh_batches(1)
            writer.append(batch)
            progress.advance(writer.done)
            if time.perf_counter() - saved > SECONDS_BETWEEN_SAVES:
                writer.save_progress(store.n_dataset_processed)
                saved = time.perf_counter()
    except InterruptedBySignalError:
        if writer.done:
            writer.save_progress(store.n_dataset_processed)
        raise
    finally:
        progress.stop()
    writer.finish(time.perf_counter() - started)


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
