"""Training of all SAEs of a recipe on one stream of batches: logs, checkpoints, interruptions.

Where the batches come from is its subclasses' own: the language model (`shared_pass`), or a cache
(`cached_pass`).
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from sae_lens import logger as sae_lens_logger
from sae_lens.config import HfDataset, LoggingConfig
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from msae_plugin import upstream
from msae_plugin.architecture.calibration import SupportsRevival
from msae_plugin.architecture.kernels.decoding import MachineSettings
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import json_safe
from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay
from msae_plugin.models.loading import LanguageModel
from msae_plugin.saes.health import HealthWatch
from msae_plugin.training.checkpoints import Checkpoint, CheckpointStore
from msae_plugin.training.data_parallel import (
    gathered,
    load_position,
    own_batch_size,
    own_share,
    positions_of_all,
    save_positions,
)
from msae_plugin.training.log import REVIVALS_FILE, JsonLines, MetricsLog
from msae_plugin.training.plans import SAEPlan
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.trainer import LockstepTrainer, StepOptions


@dataclass(frozen=True)
class TrainingSetting:
    """What a training needs, wherever its batches come from.

    Attributes:
        config: The recipe.
        plans: The SAEs.
        folders: Folder of each SAE.
        store: Where checkpoints go.
        guard: Knows about signals.
        metrics: Takes the log rows.
        progress: Shows them.
        ranks: The processes that share the run. Rank 0 alone writes; the others take part.
    """

    config: RunConfig
    plans: list[SAEPlan]
    folders: Mapping[str, Path]
    store: CheckpointStore
    guard: InterruptionGuard
    metrics: MetricsLog
    progress: ProgressDisplay
    ranks: Ranks = ALONE


def _own_options(options: StepOptions, plan: SAEPlan) -> StepOptions:
    return replace(
        options,
        lr_floor=options.lr_floor if plan.lr_floor is None else plan.lr_floor,
        gradient_lr=plan.gradient_lr or options.gradient_lr,
        centres_inputs=plan.centres_inputs,
    )


class TrainingPass:
    """Trains all SAEs of a recipe; the caller finishes and exports them."""

    cfg: MultiSAETrainingRunnerConfig
    saes: dict[str, TrainingSAE[Any]]

    def begin(self, setting: TrainingSetting, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """Make the trainer; `cfg`, of the whole run whatever the ranks, and `saes` are there.

        Args:
            setting: The run.
            batches: This rank's shares of the mini-batches, by hook.
        """
        config, ranks, saes = setting.config, setting.ranks, self.saes
        self.config = config
        self.ranks = ranks
        self._store = setting.store
        self._metrics = setting.metrics
        self._progress = setting.progress
        self._fit_seconds = 0.0
        self._revivals = {
            name: JsonLines(setting.folders[name] / REVIVALS_FILE, step_key="logged_at_step")
            for name, sae in saes.items()
            if isinstance(sae, SupportsRevival) and ranks.rank == 0
        }
        training = config.training
        options = StepOptions(
            accumulation_steps=training.accumulation_steps,
            weight_decay=training.weight_decay,
            clip_grad_norm=training.clip_grad_norm,
            lr_floor=training.lr_floor,
            gradient_lr=training.gradient_lr,
            machine=MachineSettings(training.decode_kernel, training.cuda_graphs),
        )
        self.trainer = LockstepTrainer(
            self.cfg.to_sae_trainer_config(),
            self.saes,
            self.cfg.hook_names_per_sae,
            batches,
            options=options,
            own_options={plan.name: _own_options(options, plan) for plan in setting.plans},
            learning_rates={plan.name: plan.lr for plan in setting.plans if plan.lr is not None},
            seed=training.seed,
            log_every=config.logging.every_steps,
            guard=setting.guard,
            on_step=lambda trainer: setting.progress.advance(trainer.n_training_samples),
            on_log=self._log,
            on_checkpoint=self.save_checkpoint,
            ranks=ranks,
        )
        widths = {name: sae.cfg.d_sae for name, sae in saes.items()}
        self._health = HealthWatch(self.trainer.total_steps, widths)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: weights, optimisers, schedules, place in the corpus.

        Raises:
            InputError: If a file of the checkpoint cannot be read or does not fit.
        """
        self.trainer.load_checkpoint(checkpoint.path)
        self.go_to_place(checkpoint.path)

    def go_to_place(self, folder: Path) -> None:
        """Put the batches where they stood when the checkpoint in this folder was written."""
        raise NotImplementedError

    def place_writer(self) -> Callable[[Path], None]:
        """What writes that place into a folder; called on every rank, its result on rank 0."""
        raise NotImplementedError

    def run(self) -> dict[str, TrainingSAE[Any]]:
        """Train to the end and write the checkpoint of the finished training.

        Raises:
            InterruptedBySignalError: With the checkpoint that was written.
            RunFailure: When training diverged; the last good checkpoint stays.
        """
        step = self.trainer.n_training_steps
        for revivals in self._revivals.values():
            revivals.truncate_after(step)
            # An empty file says that nothing was revived; none would say that nobody looked.
            revivals.path.parent.mkdir(parents=True, exist_ok=True)
            revivals.path.touch()
        self._progress.start(
            self.cfg.total_training_tokens, self.trainer.n_training_samples, list(self.saes)
        )
        started = time.perf_counter()
        try:
            saes = self.trainer.fit()
            self._fit_seconds = time.perf_counter() - started
            if self.trainer.n_training_steps > step:
                self.save_checkpoint()
            return saes
        except InterruptedBySignalError as interruption:
            self._progress.stop()
            if self.trainer.n_training_steps > step:
                interruption.checkpoint = self.save_checkpoint()
            elif (newest := self._store.newest()) is not None:
                interruption.checkpoint = newest.path
            raise
        except RunFailure as failure:
            newest = self._store.newest()
            kept = (
                "no checkpoint had been written"
                if newest is None
                else f"the last good checkpoint is {newest.path}"
            )
            raise RunFailure(f"{failure}; {kept}") from failure
        finally:
            self._progress.stop()
            self.flush()

    def _log(self, name: str, row: dict[str, float]) -> None:
        self._metrics.write(name, row)
        self._progress.metrics(name, row)
        for warning in self._health.check(name, row):
            self._progress.message(f"warning: {warning}")
        self._drain_revivals(name, int(row["step"]))

    def _drain_revivals(self, name: str, step: int) -> None:
        sae = self.saes[name]
        if isinstance(sae, SupportsRevival):
            for event in sae.pop_events():
                if name in self._revivals:
                    self._revivals[name].append({"logged_at_step": step, **event})

    def flush(self) -> None:
        """Put every log line onto the disk."""
        for name in self.saes:
            self._drain_revivals(name, self.trainer.n_training_steps)
        for revivals in self._revivals.values():
            revivals.flush()
        self._metrics.flush()

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of this moment; the logs up to it are on the disk before it is."""
        self.flush()
        trainer = self.trainer
        write_place = self.place_writer()
        if self.ranks.rank > 0:
            return self._store.folder_of(trainer.n_training_samples)
        return self._store.save(
            trainer.n_training_steps,
            trainer.n_training_samples,
            self.config.to_dict(),
            lambda folder: self._write_files(folder, write_place),
        )

    def _write_files(self, folder: Path, write_place: Callable[[Path], None]) -> None:
        self.trainer.write_checkpoint(folder)
        write_place(folder)
        runner_config = json.dumps(json_safe(self.cfg.to_dict()))
        (folder / RUNNER_CFG_FILENAME).write_text(runner_config, encoding="utf-8")

    def fresh_batches(self, count: int) -> list[dict[str, torch.Tensor]]:
        """Mini-batches that no SAE has seen in this epoch, (tokens, d_in) by hook.

        Every rank gets the whole ones.
        """
        own = (self.trainer.next_batch() for _ in range(count))
        return list(gathered(own, self.ranks))

    def speeds(self) -> dict[str, float]:
        """Tokens per second of this session: each SAE's own steps, and `overall` with the model.

        Empty when no step was left to do.
        """
        trainers = self.trainer.step_trainers
        tokens = next(iter(trainers.values())).session_tokens
        if tokens == 0:
            return {}
        own = {name: trainer.tokens_per_second for name, trainer in trainers.items()}
        return {**own, "overall": tokens / self._fit_seconds}


class ModelNames(Protocol):
    """How a model is named in the metadata of SAEs."""

    @property
    def model_name(self) -> str:
        """The name that SAELens and SAEBench load it by."""
        ...

    @property
    def model_class_name(self) -> str:
        """SAELens' name of its loader."""
        ...


class _NotAboutUs(logging.Filter):
    """Drops SAELens' remarks that a run with a given model or data set cannot be reproduced.

    They are about its own configuration; `run.json` holds ours.
    """

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("override_dataset", "override_model"))


@contextmanager
def _without_upstream_remarks() -> Generator[None]:
    remark_filter = _NotAboutUs()
    sae_lens_logger.addFilter(remark_filter)
    try:
        with warnings.catch_warnings():
            # Text is tokenised on the fly on purpose, and SAELens compares documents with tokens.
            warnings.filterwarnings("ignore", message="Dataset is not tokenized")
            warnings.filterwarnings("ignore", message="The training dataset contains fewer")
            yield
    finally:
        sae_lens_logger.removeFilter(remark_filter)


def shared_pass_config(
    config: RunConfig,
    plans: list[SAEPlan],
    names: ModelNames,
    device: str,
    *,
    autocast: bool,
) -> MultiSAETrainingRunnerConfig:
    """SAELens' configuration of the run that a recipe describes.

    Args:
        config: The recipe.
        plans: Its SAEs.
        names: The loaded model, or what is recorded of it, for the SAEs' metadata.
        device: Device of SAEs and activations.
        autocast: Whether the model runs in bfloat16.
    """
    training, data = config.training, config.data
    return MultiSAETrainingRunnerConfig(
        saes={plan.name: plan.config for plan in plans},
        hook_names={plan.name: plan.hook for plan in plans},
        model_name=names.model_name,
        model_class_name=names.model_class_name,
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
        # Whole steps only: SAELens would run one more than its schedules count.
        training_tokens=config.total_steps * config.tokens_per_step,
        train_batch_size_tokens=training.batch_size_tokens,
        device=device,
        seed=training.seed,
        dtype="float32",
        autocast=training.autocast,
        autocast_lm=autocast,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        lr=training.lr,
        lr_end=training.lr_end,
        lr_scheduler_name=training.lr_scheduler,
        lr_warm_up_steps=training.lr_warm_up_steps,
        lr_decay_steps=training.lr_decay_steps,
        n_restart_cycles=training.n_restart_cycles,
        dead_feature_window=training.dead_feature_window,
        feature_sampling_window=training.feature_sampling_window,
        n_batches_for_norm_estimate=training.norm_estimate_batches,
        n_checkpoints=training.n_checkpoints,
        # Our own store writes checkpoints and exports, and our own log metrics.
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )


class SharedPassRunner(TrainingPass, MultiSAETrainingRunner):
    """SAELens' multi-SAE runner with our training: one pass of the language model for all SAEs.

    Args:
        cfg: SAELens' configuration, from `shared_pass_config`: of the whole run, whatever the
            number of ranks.
        setting: The run.
        dataset: The training text.
        language_model: The model.
        saes: The initialised SAEs by name.
    """

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        setting: TrainingSetting,
        *,
        dataset: HfDataset,
        language_model: LanguageModel,
        saes: dict[str, TrainingSAE[Any]],
    ) -> None:
        own_batch = own_batch_size(cfg.train_batch_size_tokens, setting.ranks)
        with _without_upstream_remarks():
            try:
                MultiSAETrainingRunner.__init__(
                    self,
                    replace(cfg, train_batch_size_tokens=own_batch),
                    override_dataset=own_share(dataset, setting.ranks),
                    override_model=language_model.model,
                    override_saes=saes,
                )
            except StopIteration as error:
                raise InputError("the data set has no documents left for training") from error
        self.cfg = cfg
        upstream.set_sae_metadata(self)
        self.begin(setting, self.activations_store.get_multi_hook_data_loader())

    @override
    def go_to_place(self, folder: Path) -> None:
        load_position(self.activations_store, folder, self.ranks)

    @override
    def place_writer(self) -> Callable[[Path], None]:
        return partial(save_positions, positions_of_all(self.activations_store, self.ranks))
