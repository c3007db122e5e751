"""Training of all SAEs of a recipe on one stream of batches: logs, checkpoints, interruptions.

Where the batches come from is its subclasses' own: the language model (`shared_pass`), or a cache
(`cached_pass`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE

from msae_plugin.architecture.capabilities import SupportsRevival
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.errors import RunFailure
from msae_plugin.common.files import json_safe
from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay
from msae_plugin.saes.health import HealthWatch
from msae_plugin.training.checkpoints import Checkpoint, CheckpointStore
from msae_plugin.training.data_parallel import gathered
from msae_plugin.training.log import REVIVALS_FILE, JsonLines, MetricsLog
from msae_plugin.training.plans import SAEPlan
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.step_trainer import StepOptions
from msae_plugin.training.trainer import LockstepTrainer


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
