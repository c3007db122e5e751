"""`msae cache`: activations kept for runs that repeat."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from msae_plugin.common.claims import claimed_output
from msae_plugin.common.files import disk_errors_told, remove_leftovers
from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay
from msae_plugin.common.seeding import seed_everything
from msae_plugin.data.text import TextData
from msae_plugin.models.loading import LanguageModel
from msae_plugin.training.activation_store import (
    FORMAT,
    ActivationWriter,
    CachedActivations,
    activations_key,
    check_new_cache,
    open_cache,
    rows_needed,
)
from msae_plugin.training.inputs import load_model_and_text
from msae_plugin.training.passes import SharedPassRunner, reading_runner
from msae_plugin.training.plans import SAEPlan, default_device
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

    Its SAEs say only how many activations are needed. An unfinished cache in the folder is
    continued; a signal raises once everything so far is on the disk.
    """
    progress = progress or ProgressDisplay()
    config = replace(config, cached_activations=None)
    plans = config.validate(None if language_model is None else language_model.shape)
    rows = rows_needed(config, plans)
    check_new_cache(output)
    with claimed_output(output), disk_errors_told(output):
        # Another process may have finished there since this one began.
        check_new_cache(output)
        remove_leftovers(output)
        return _make_cache(config, plans, rows, output, language_model, text, progress)


def _make_cache(
    config: RunConfig,
    plans: list[SAEPlan],
    rows: int,
    output: Path,
    language_model: LanguageModel | None,
    text: TextData | None,
    progress: ProgressDisplay,
) -> CachedActivations:
    device = default_device(config.model.device)
    seed_everything(config.training.seed)
    inputs = load_model_and_text(config, device, progress, language_model=language_model, text=text)
    inputs.fitted(plans)
    started = time.perf_counter()
    with InterruptionGuard() as guard:
        runner = reading_runner(
            config,
            inputs.language_model,
            inputs.text,
            device,
            autocast=inputs.autocast,
            guard=guard,
            progress=progress,
        )
        record = inputs.record()
        facts = {
            "format": FORMAT,
            "key": activations_key(config),
            "rows": rows,
            "seed": config.training.seed,
            "model": {**record["model"], "vocabulary": inputs.language_model.vocabulary},
            "data": record["data"],
        }
        writer = ActivationWriter(output, facts, config.hooks)
        if writer.position is not None:
            runner.trainer.go_to(writer.position)
        progress.start(rows, writer.done, list(config.hooks))
        try:
            write_activations(runner, writer, guard, progress.advance)
        except InterruptedBySignalError:
            writer.save_progress()
            raise
        finally:
            progress.stop()
        writer.finish(time.perf_counter() - started)
    return open_cache(output)


def write_activations(
    runner: SharedPassRunner,
    writer: ActivationWriter,
    guard: InterruptionGuard,
    advance: Callable[[int], object],
) -> None:
    """Make what is missing of a store; a signal raises between two batches."""
    saved = time.perf_counter()
    while writer.done < writer.rows:
        guard.check()
        (batch,) = runner.fresh_batches(1)
        writer.append(batch, runner.trainer.position())
        advance(writer.done)
        if time.perf_counter() - saved > SECONDS_BETWEEN_SAVES:
            writer.save_progress()
            saved = time.perf_counter()
