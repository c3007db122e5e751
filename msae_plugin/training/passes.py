"""Passes over activations: training on the language model or a cache, and `msae cache`."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger as sae_lens_logger
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activations_store import ActivationsStore
from typing_extensions import Self, override

from msae_plugin import upstream
from msae_plugin.common.claims import claimed_output
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import disk_errors_told, remove_leftovers
from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay
from msae_plugin.common.seeding import seed_everything
from msae_plugin.data.text import TextData
from msae_plugin.models.loading import LanguageModel
from msae_plugin.training.activation_store import (
    FORMAT,
    PLACEHOLDER,
    ActivationWriter,
    CachedActivations,
    CachedBatches,
    activations_key,
    check_new_cache,
    norm_batches,
    open_cache,
    rows_needed,
)
from msae_plugin.training.data_parallel import documents_read, own_batch_size, own_share
from msae_plugin.training.inputs import ModelAndText, load_model_and_text
from msae_plugin.training.plans import build_sae, default_device
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.session import (
    SessionSettings,
    TrainingSession,
    shared_settings,
)

SECONDS_BETWEEN_SAVES = 30.0
"""Of a cache that is being written."""


def _about_us(record: logging.LogRecord) -> bool:
    # SAELens' remarks on reproducing its own configuration are not: `run.json` holds ours.
    return not record.getMessage().startswith(("override_dataset", "override_model"))


@contextmanager
def _without_upstream_remarks() -> Generator[None]:
    sae_lens_logger.addFilter(_about_us)
    try:
        with warnings.catch_warnings():
            # Text is tokenised on the fly on purpose, and SAELens compares documents with tokens.
            warnings.filterwarnings("ignore", message="Dataset is not tokenized")
            warnings.filterwarnings("ignore", message="The training dataset contains fewer")
            yield
    finally:
        sae_lens_logger.removeFilter(_about_us)


def shared_pass_config(
    config: RunConfig,
    settings: SessionSettings,
    inputs: ModelAndText | CachedActivations,
) -> MultiSAETrainingRunnerConfig:
    """SAELens' configuration of the run that a recipe describes."""
    training, data, plans = config.training, config.data, settings.plans
    model = inputs if isinstance(inputs, CachedActivations) else inputs.language_model
    return MultiSAETrainingRunnerConfig(
        saes={plan.name: plan.config for plan in plans},
        hook_names={plan.name: plan.hook for plan in plans},
        model_name=model.model_name,
        model_class_name=model.model_class_name,
        # SAELens' own default centres the writing weights, which ours are not.
        model_from_pretrained_kwargs={},
        # Part of every exported cfg.json: a local corpus is named, its place is not told.
        dataset_path=Path(data.source).name if Path(data.source).exists() else data.source,
        streaming=data.streaming,
        context_size=data.context_size,
        prepend_bos=data.prepend_bos,
        exclude_special_tokens=data.exclude_special_tokens,
        n_batches_in_buffer=training.n_batches_in_buffer,
        store_batch_size_prompts=training.store_batch_size_prompts,
        activations_mixing_fraction=training.activations_mixing_fraction,
        training_tokens=training.whole_tokens,
        train_batch_size_tokens=training.batch_size_tokens,
        device=settings.device,
        seed=training.seed,
        dtype="float32",
        autocast_lm=inputs.autocast,
        # Exports are ours as well.
        output_path=None,
        **shared_settings(training),
    )


class ActivationStream:
    """What SAELens' `get_multi_hook_data_loader` gives, with a position.

    SAELens keeps the mixing buffer inside a generator. Rows stay in it for any number of refills,
    so that they cannot be made anew from a place in the text: they are saved. The text is read
    again up to its place, without the model.
    """

    def __init__(self, store: ActivationsStore, hooks: Sequence[str]) -> None:
        self._store = store
        self._hooks = list(dict.fromkeys(hooks))
        self._sequences = upstream.CountedSequences(store)
        self._passes = upstream.filtered_batches(store)
        self._widths: list[int] = []
        # (rows, sum of d_in), the first `_ready` mini-batches of it mixed and to be served.
        self._rows: torch.Tensor | None = None
        self._ready = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """(mini-batch, d_in) by hook; never ends."""
        while self._ready == 0 or self._rows is None:
            self._refill()
        size = self._store.train_batch_size_tokens
        batch, self._rows = self._rows[:size], self._rows[size:]
        self._ready -= 1
        return dict(zip(self._hooks, batch.split(self._widths, dim=1), strict=True))

    def _refill(self) -> None:
        """One forward pass; `mixing_buffer` of SAELens."""
        store = self._store
        made = next(self._passes)
        self._widths = [made[hook].shape[1] for hook in self._hooks]
        rows = torch.cat([made[hook] for hook in self._hooks], dim=1)
        if self._rows is not None:
            rows = torch.cat([self._rows, rows])
        whole = store.n_batches_in_buffer * store.training_context_size
        if len(rows) >= whole:
            if store.activations_mixing_fraction > 0:
                rows = rows[torch.randperm(len(rows))]
            served = len(rows) - int(whole * store.activations_mixing_fraction)
            self._ready = max(1, served // store.train_batch_size_tokens)
        self._rows = rows

    def state_dict(self) -> dict[str, Any]:
        """The position. The rows are not copied; they are never changed in place."""
        return {
            "rows": self._rows,
            "widths": self._widths,
            "ready": self._ready,
            "sequences": self._sequences.taken,
            "documents": self._store.n_dataset_processed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position."""
        rows = state["rows"]
        self._rows = None if rows is None else rows.to(self._store.device)
        self._widths, self._ready = list(state["widths"]), int(state["ready"])
        for _ in range(int(state["sequences"])):
            if next(self._store.iterable_sequences, None) is None:
                raise InputError(
                    "the text is shorter than when the checkpoint was written: give the same text, "
                    "or start a new run"
                )
        self._store.n_dataset_processed = int(state["documents"])

    def skip_documents(self, count: int) -> None:
        """Begin after so many documents, with an empty buffer."""
        while self._store.n_dataset_processed < count:
            self._store.get_batch_tokens(1, move_to_model_device=False)


class RecipeSession(TrainingSession):
    """Trains the SAEs of a recipe of `msae train`."""

    cfg: MultiSAETrainingRunnerConfig
    config: RunConfig

    @override
    def described(self) -> dict[str, Any]:
        return self.config.to_dict()

    @override
    def runner_config(self) -> dict[str, Any]:
        return self.cfg.to_dict()


class SharedPassRunner(RecipeSession, MultiSAETrainingRunner):
    """SAELens' multi-SAE runner with our training: one pass of the language model for all SAEs."""

    def __init__(
        self,
        config: RunConfig,
        settings: SessionSettings,
        inputs: ModelAndText,
        saes: dict[str, TrainingSAE[Any]],
    ) -> None:
        self.config = config
        ranks = settings.ranks
        cfg = shared_pass_config(config, settings, inputs)
        own_batch = own_batch_size(cfg.train_batch_size_tokens, ranks)
        with _without_upstream_remarks():
            try:
                MultiSAETrainingRunner.__init__(
                    self,
                    replace(cfg, train_batch_size_tokens=own_batch),
                    override_dataset=own_share(inputs.text.train, ranks),
                    override_model=inputs.language_model.model,
                    override_saes=saes,
                )
            except StopIteration as error:
                raise InputError("the data set has no documents left for training") from error
        # Of the whole run, whatever the number of ranks.
        self.cfg = cfg
        upstream.set_sae_metadata(self)
        hooks = [plan.hook for plan in settings.plans]
        self._batches = ActivationStream(self.activations_store, hooks)
        TrainingSession.__init__(self, settings, self.saes, self._batches)

    @override
    def approach(self, folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
        # It says how much of the text was read, not which documents are this rank's.
        read = documents_read(folder, states)
        self._batches.skip_documents(read // self.settings.ranks.count)


class CachedPass(RecipeSession):
    """Trains all SAEs of a recipe on the rows of a cache that was checked against it."""

    def __init__(
        self,
        config: RunConfig,
        settings: SessionSettings,
        inputs: CachedActivations,
        saes: dict[str, TrainingSAE[Any]],
    ) -> None:
        plans, device = settings.plans, settings.device
        self.config = config
        self.cfg = shared_pass_config(config, settings, inputs)
        self.saes = {name: sae.to(device) for name, sae in saes.items()}
        upstream.set_sae_metadata(self)
        self._batches = CachedBatches(
            inputs,
            [plan.hook for plan in plans],
            config.training.batch_size_tokens,
            device,
            settings.ranks,
        )
        self._before_training = norm_batches(config, plans)
        TrainingSession.__init__(self, settings, self.saes, self._batches)

    @override
    def approach(self, folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
        # A checkpoint carries the scaling: the batches it was estimated on are not read again.
        steps = self.trainer.n_training_steps * self.config.training.accumulation_steps
        self._batches.position = self._before_training + steps


def reading_runner(
    config: RunConfig, inputs: ModelAndText, device: str, guard: InterruptionGuard
) -> SharedPassRunner:
    """A runner that makes the batches of `msae train` and trains nothing."""
    # SAELens' runner wants an SAE.
    config = replace(config, sae=PLACEHOLDER, saes=None)
    plans = config.validate(inputs.language_model.shape)
    return SharedPassRunner(
        config,
        SessionSettings(
            plans=plans,
            training=config.training,
            device=device,
            seed=config.training.seed,
            log_every=config.logging.every_steps,
            guard=guard,
        ),
        inputs,
        {plan.name: build_sae(plan, 0, device) for plan in plans},
    )


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
        device = default_device(config.model.device)
        seed_everything(config.training.seed)
        inputs = load_model_and_text(
            config, device, progress.message, language_model=language_model, text=text
        )
        inputs.fitted(plans)
        with InterruptionGuard() as guard:
            runner = reading_runner(config, inputs, device, guard)
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
        return open_cache(output)


def write_activations(
    runner: SharedPassRunner,
    writer: ActivationWriter,
    guard: InterruptionGuard,
    advance: Callable[[int], object],
) -> None:
    """Make what is missing of a store and finish it; a signal raises between two batches."""
    started = saved = time.perf_counter()
    while writer.done < writer.rows:
        guard.check()
        (batch,) = runner.fresh_batches(1)
        writer.append(batch, runner.trainer.position())
        advance(writer.done)
        if time.perf_counter() - saved > SECONDS_BETWEEN_SAVES:
            writer.save_progress()
            saved = time.perf_counter()
    writer.finish(time.perf_counter() - started)
