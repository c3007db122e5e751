"""Training of SAEs on one stream of batches: logs, health, checkpoints, interruptions, exports.

A run of `msae train` and every group of a comparison is one session. Where the batches come from is
its subclasses' own: the language model, a cache, the activations of a comparison.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE

from msae_plugin.architecture.calibration import SupportsRevival
from msae_plugin.architecture.kernels.decoding import MachineSettings
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.files import json_safe
from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay
from msae_plugin.saes.export import REPORT_FILENAME, ExportReport, export_sae
from msae_plugin.saes.health import HealthWatch
from msae_plugin.saes.run_record import METRICS_FILE, read_rows
from msae_plugin.training.checkpoints import Checkpoint, CheckpointStore
from msae_plugin.training.data_parallel import gathered, load_states, save_states, states_of_all
from msae_plugin.training.log import REVIVALS_FILE, JsonLines, MetricsLog
from msae_plugin.training.plans import SAEPlan
from msae_plugin.training.recipe import TrainingSettings
from msae_plugin.training.step_trainer import StepOptions
from msae_plugin.training.trainer import LockstepTrainer


@dataclass(frozen=True)
class SessionSettings:
    """Everything about a session but its batches."""

    plans: Sequence[SAEPlan]
    training: TrainingSettings
    device: str
    seed: int  # Of their own randomness and of the data's
    log_every: int
    guard: InterruptionGuard
    progress: ProgressDisplay = field(default_factory=ProgressDisplay)
    # Folder of each SAE; empty keeps no logs (a trial of a search)
    folders: Mapping[str, Path] = field(default_factory=dict[str, Path])
    store: CheckpointStore | None = None  # Where checkpoints go; None writes none
    metrics: MetricsLog = field(default_factory=lambda: MetricsLog([]))
    # The processes that share the session. Rank 0 alone writes; the others take part
    ranks: Ranks = ALONE


# Fields that have the same name in a recipe and in both of SAELens' configurations.
_SHARED_FIELDS = (
    "n_checkpoints", "autocast", "lr", "lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles",
    "adam_beta1", "adam_beta2", "dead_feature_window", "feature_sampling_window",
)  # fmt: skip


def shared_settings(training: TrainingSettings) -> dict[str, Any]:
    """Arguments of SAELens' trainer and runner configurations that a recipe decides."""
    return {
        **{name: getattr(training, name) for name in _SHARED_FIELDS},
        "lr_scheduler_name": training.lr_scheduler,
        "lr_end": training.lr / 10 if training.lr_end is None else training.lr_end,
        "n_batches_for_norm_estimate": training.norm_estimate_batches,
        # Our own store writes checkpoints, and our own log metrics.
        "checkpoint_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }


def _step_options(training: TrainingSettings, plan: SAEPlan) -> StepOptions:
    """How one SAE is stepped: as its plan says, else as the recipe does."""
    return StepOptions(
        lr=plan.lr,
        accumulation_steps=training.accumulation_steps,
        weight_decay=training.weight_decay,
        clip_grad_norm=training.clip_grad_norm,
        lr_floor=training.lr_floor if plan.lr_floor is None else plan.lr_floor,
        gradient_lr=plan.gradient_lr or training.gradient_lr,
        centres_inputs=plan.centres_inputs,
        machine=MachineSettings(training.decode_kernel, training.cuda_graphs),
    )


@dataclass(frozen=True)
class FinishedSAE:
    """An exported SAE, as its `run.json` tells of it."""

    final: Mapping[str, Any]  # Last row of its metrics.jsonl; empty where nothing was logged
    # What setting its threshold found; None where there was none to set
    calibration: Mapping[str, float] | None
    report: ExportReport  # What the export check measured

    def record(self, tokens_per_second: float | None) -> dict[str, Any]:
        """Its entry in `run.json`."""
        return {
            "final": self.final,
            "calibration": self.calibration,
            "tokens_per_second": tokens_per_second,
            "export": json_safe(self.report.to_dict()),
            "health": [asdict(finding) for finding in self.report.health],
        }


def sae_record(plan: SAEPlan, folder: str) -> dict[str, Any]:
    """An SAE's entry in `run.json` before it is trained."""
    return {"hook": plan.hook, "architecture": plan.config.architecture(), "folder": folder}


class TrainingSession:
    """Trains SAEs on one stream of batches, this rank's shares by hook, and exports them."""

    saes: dict[str, TrainingSAE[Any]]  # The initialised SAEs by name

    def __init__(
        self,
        settings: SessionSettings,
        saes: dict[str, TrainingSAE[Any]],
        batches: Iterator[dict[str, torch.Tensor]],
    ) -> None:
        training, plans = settings.training, settings.plans
        self.settings = settings
        self.saes = saes
        self._fit_seconds = 0.0
        self._revivals = {
            name: JsonLines(folder / REVIVALS_FILE, step_key="logged_at_step")
            for name, folder in settings.folders.items()
            if isinstance(saes[name], SupportsRevival) and settings.ranks.rank == 0
        }
        self._events = {name: list[dict[str, Any]]() for name in saes}
        self._saved_step = 0
        minutes = training.checkpoint_minutes
        self.trainer = LockstepTrainer(
            SAETrainerConfig(
                **shared_settings(training),
                save_final_checkpoint=False,
                total_training_samples=training.whole_tokens,
                train_batch_size_samples=training.batch_size_tokens,
                device=settings.device,
            ),
            saes,
            {plan.name: plan.hook for plan in plans},
            batches,
            options={plan.name: _step_options(training, plan) for plan in plans},
            seed=settings.seed,
            log_every=settings.log_every,
            guard=settings.guard,
            on_step=lambda trainer: settings.progress.advance(trainer.n_training_samples),
            on_log=self._log,
            on_checkpoint=self.save_checkpoint,
            checkpoint_seconds=minutes and 60 * minutes,
            ranks=settings.ranks,
        )
        self._health = HealthWatch(
            self.trainer.total_steps, {name: sae.cfg.d_sae for name, sae in saes.items()}
        )

    @property
    def steps(self) -> int:
        """Optimiser updates of the whole session."""
        return self.trainer.total_steps

    @property
    def tokens(self) -> int:
        """Activations that each SAE is trained on."""
        return self.trainer.total_steps * self.trainer.tokens_per_step

    def described(self) -> dict[str, Any]:
        """The run that a checkpoint belongs to, for its manifest."""
        return {}

    def runner_config(self) -> dict[str, Any] | None:
        """SAELens' configuration, kept in checkpoints; None where its runner has no part."""
        return None

    def prepare(self) -> None:
        """Called before the first step."""

    def approach(self, folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
        """Put the batches near where they were when a checkpoint was written.

        Of a checkpoint of another number of ranks, or of version 0.1; `states` is what its ranks
        knew.
        """

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: weights, optimisers, schedules, position in the batches."""
        trainer, ranks = self.trainer, self.settings.ranks
        trainer.load_checkpoint(checkpoint.path)
        states = load_states(checkpoint.path)
        if len(states) == ranks.count:
            trainer.load_state_dict(states[ranks.rank])
            self._events |= states[ranks.rank]["events"]
        else:
            self.approach(checkpoint.path, states)
        store = self.settings.store
        if store is not None and checkpoint.path == store.folder_of(trainer.n_training_samples):
            self._saved_step = trainer.n_training_steps
        for name, folder in self.settings.folders.items():
            for row in read_rows(folder / METRICS_FILE):
                # What was warned about is not warned about again.
                self._health.check(name, row)

    def run(self) -> dict[str, TrainingSAE[Any]]:
        """Train to the end and write the checkpoint of the finished training.

        InterruptedBySignalError carries the checkpoint that was written.
        """
        trainer, progress = self.trainer, self.settings.progress
        for revivals in self._revivals.values():
            revivals.truncate_after(trainer.n_training_steps)
            # An empty file says that nothing was revived; none would say that nobody looked.
            revivals.path.parent.mkdir(parents=True, exist_ok=True)
            revivals.path.touch()
        progress.start(self.tokens, trainer.n_training_samples, list(self.saes))
        started = time.perf_counter()
        try:
            self.prepare()
            trainer.fit()
            self._fit_seconds = time.perf_counter() - started
            # A kill while the SAEs are exported then costs no training.
            self.save_checkpoint()
            return self.saes
        except InterruptedBySignalError as interruption:
            progress.stop()
            if trainer.n_training_steps:
                interruption.checkpoint = self.save_checkpoint()
            raise
        finally:
            progress.stop()
            self.flush()
            for revivals in self._revivals.values():
                revivals.close()

    def _log(self, name: str, row: dict[str, float]) -> None:
        if self.settings.folders:
            self.settings.metrics.write(name, row)
            self.settings.progress.metrics(name, row)
            for warning in self._health.check(name, row):
                self.settings.progress.message(f"warning: {warning}")
        for event in self._pending_events(name):
            if name in self._revivals:
                self._revivals[name].append({"logged_at_step": int(row["step"]), **event})
        self._events[name] = []

    def _pending_events(self, name: str) -> list[dict[str, Any]]:
        """Revivals since the last log row."""
        sae = self.saes[name]
        if isinstance(sae, SupportsRevival):
            self._events[name] += sae.pop_events()
        return self._events[name]

    def flush(self) -> None:
        """Put every log line onto the disk."""
        for revivals in self._revivals.values():
            revivals.flush()
        self.settings.metrics.flush()

    def save_checkpoint(self) -> Path | None:
        """Write a checkpoint of this moment; the logs up to it are on the disk before it is."""
        store, trainer = self.settings.store, self.trainer
        if store is None:
            return None
        if self._saved_step == trainer.n_training_steps:
            return store.folder_of(trainer.n_training_samples)
        self.flush()
        events = {name: self._pending_events(name) for name in self.saes}
        states = states_of_all({**trainer.state_dict(), "events": events}, self.settings.ranks)
        if self.settings.ranks.rank == 0:
            store.save(
                trainer.n_training_steps,
                trainer.n_training_samples,
                self.described(),
                lambda folder: self._write_files(folder, states),
            )
        self._saved_step = trainer.n_training_steps
        return store.folder_of(trainer.n_training_samples)

    def _write_files(self, folder: Path, states: Sequence[bytes]) -> None:
        self.trainer.write_checkpoint(folder)
        save_states(states, folder)
        runner_config = self.runner_config()
        if runner_config is not None:
            (folder / RUNNER_CFG_FILENAME).write_text(
                json.dumps(json_safe(runner_config)), encoding="utf-8"
            )

    def fresh_batches(self, count: int) -> list[dict[str, torch.Tensor]]:
        """Mini-batches that no SAE has seen in this epoch, (tokens, d_in) by hook.

        Every rank gets the whole ones.
        """
        own = (self.trainer.next_batch() for _ in range(count))
        return list(gathered(own, self.settings.ranks))

    def scaled(self, name: str, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Raw activations, each (tokens, d_in), as the SAE's training batches see them."""
        return [self.trainer.scaled(name, batch) for batch in batches]

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

    def export(
        self,
        name: str,
        activations: torch.Tensor,
        runner_cfg: Callable[[], Mapping[str, Any]],
        *,
        calibration: Mapping[str, float] | None,
        l0: float | None,
    ) -> FinishedSAE:
        """Export a trained SAE, its scaling folded in, with its metadata complete.

        `activations` (n, d_in) are for the export check; `runner_cfg` is asked once the metadata is
        complete; `l0` counts active latents per token at the calibrated threshold, None leaves
        SAELens' own figure, which counts the training batches.
        """
        folder, sae = self.settings.folders[name], self.saes[name]
        log = read_rows(folder / METRICS_FILE)
        final = log[-1] if log else {}
        metadata = sae.cfg.metadata
        metadata.training_steps, metadata.training_tokens = self.steps, self.tokens
        metadata.final_loss, metadata.seed = final.get("loss"), self.settings.seed
        if l0 is not None:
            metadata.l0 = l0
        sae.eval()
        # Left by a run that was stopped between the export and its record.
        (folder / REPORT_FILENAME).unlink(missing_ok=True)
        self.settings.progress.message(f"exporting {name}")
        sparsity = self.trainer.step_trainers[name].log_feature_sparsity
        report = export_sae(sae, folder, activations, sparsity, runner_cfg(), log)
        return FinishedSAE(final, calibration, report)
