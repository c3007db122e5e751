"""Training of SAEs that share their batches: one where batches are read, several where made."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE

from msae_plugin.architecture.calibration import SupportsRevival
from msae_plugin.architecture.kernels.decoding import MachineSettings
from msae_plugin.common.errors import RunFailure
from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.comparison.activations import ActivationSource, SeededBatches
from msae_plugin.comparison.methods import Entry, entry_training, plan_entry, sae_folder
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.evaluation.outcomes import Reporter
from msae_plugin.saes.health import HealthWatch
from msae_plugin.training.checkpoints import Checkpoint, CheckpointStore
from msae_plugin.training.log import REVIVALS_FILE, JsonLines, JsonLinesSink, MetricsLog
from msae_plugin.training.plans import SAEPlan, build_sae
from msae_plugin.training.settings import TrainingSection
from msae_plugin.training.trainer import LockstepTrainer, StepOptions


@dataclass(frozen=True)
class Workplace:
    """What every training of a comparison needs.

    Args:
        config: The recipe.
        source: The activations.
        output: The comparison's folder.
        device: Where SAEs live.
        guard: Knows about signals.
        report: Shows progress.
    """

    config: CompareConfig
    source: ActivationSource
    output: Path
    device: str
    guard: InterruptionGuard
    report: Reporter

    def folder(self, name: str) -> Path:
        """Folder of an SAE."""
        return sae_folder(self.output, name)


@dataclass(frozen=True)
class Group:
    """SAEs to train together, of one seed and one number of mini-batches per step.

    Args:
        entries: The SAEs.
        coefficients: Value of each searched knob by the SAE's name.
        tokens: Length of the run.
    """

    entries: Sequence[Entry]
    coefficients: Mapping[str, float]
    tokens: int

    @property
    def seed(self) -> int:
        """The seed that all share."""
        return self.entries[0].seed


@dataclass(frozen=True)
class TrainedGroup:
    """What training left: SAEs with their scaling not folded yet, cuts not set.

    Args:
        group: What was trained.
        plans: SAELens' configurations by name.
        trainer: Holds the SAEs.
        training: The section with the group's own schedule.
        seconds: Of each SAE's own steps, in all sessions.
    """

    group: Group
    plans: Mapping[str, SAEPlan]
    trainer: LockstepTrainer
    training: TrainingSection
    seconds: Mapping[str, float]

    @property
    def steps(self) -> int:
        """Optimiser updates."""
        return self.trainer.total_steps

    @property
    def tokens(self) -> int:
        """Activations that each SAE was trained on."""
        return self.trainer.total_steps * self.trainer.tokens_per_step


def train_group(
    place: Workplace,
    group: Group,
    *,
    keys: Mapping[str, str] | None = None,
    store: CheckpointStore | None = None,
    checkpoint: Checkpoint | None = None,
    title: str,
) -> TrainedGroup:
    """Train to the end.

    Args:
        place: The comparison.
        group: Which SAEs.
        keys: By name, what an SAE depends on; kept in checkpoints. None writes neither logs nor
            checkpoints: a trial of a search.
        store: Where checkpoints go.
        checkpoint: Continue from here.
        title: For the progress.

    Raises:
        InterruptedBySignalError: Between two steps, once a checkpoint is written.
        RunFailure: A loss is not finite.
    """
    config = place.config
    first = group.entries[0]
    training = entry_training(first, config, group.tokens)
    plans = {
        entry.name: plan_entry(
            entry,
            config,
            place.source.d_in(entry.hook),
            coefficient=group.coefficients.get(entry.name),
            tokens=group.tokens,
        )
        for entry in group.entries
    }
    saes = {entry.name: _build(entry, plans[entry.name], place.device) for entry in group.entries}
    hooks = {entry.name: entry.hook for entry in group.entries}
    batches = SeededBatches(place.source, list(hooks.values()), group.seed)
    total = _total_tokens(training)
    steps = total // (training.batch_size_tokens * training.accumulation_steps)
    logs = _Logs(place, saes, checkpoint, steps) if keys is not None else None
    earlier = _earlier_seconds(checkpoint)

    def save() -> None:
        if store is None or keys is None:
            return
        if logs is not None:
            logs.flush(trainer)
        state = {"entries": dict(keys), "seconds": _seconds(trainer, earlier)}
        store.save(
            trainer.n_training_steps, trainer.n_training_samples, state, trainer.write_checkpoint
        )

    trainer = LockstepTrainer(
        _trainer_config(training, place.device, total),
        saes,
        hooks,
        batches,
        options=_options(training),
        own_options={name: _own_options(training, plan) for name, plan in plans.items()},
        learning_rates={name: plan.lr for name, plan in plans.items() if plan.lr is not None},
        seed=group.seed,
        log_every=config.log_every_steps,
        guard=place.guard,
        on_step=lambda trainer: place.report(title, trainer.n_training_samples, total),
        on_log=None if logs is None else logs.write,
        on_checkpoint=save,
    )
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint.path)
    try:
        # SAELens counts the batches with a bar of its own.
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.prepare_scaling()
        batches.position = trainer.n_training_steps * training.accumulation_steps
        trainer.fit()
        # A kill while the SAEs are exported then costs no training.
        save()
    except InterruptedBySignalError as interruption:
        if trainer.n_training_steps and store is not None:
            save()
            newest = store.newest()
            interruption.checkpoint = None if newest is None else newest.path
        raise
    finally:
        if logs is not None:
            logs.close(trainer)
    return TrainedGroup(group, plans, trainer, training, _seconds(trainer, earlier))


def _build(entry: Entry, plan: SAEPlan, device: str) -> TrainingSAE[Any]:
    sae = build_sae(plan, entry.seed, device)
    if entry.method.frozen_decoder:
        sae.W_dec.requires_grad_(False)
    return sae


def _total_tokens(training: TrainingSection) -> int:
    per_step = training.batch_size_tokens * training.accumulation_steps
    return training.tokens // per_step * per_step


def _trainer_config(training: TrainingSection, device: str, total: int) -> SAETrainerConfig:
    return SAETrainerConfig(
        n_checkpoints=training.n_checkpoints,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=total,
        device=device,
        autocast=training.autocast,
        lr=training.lr,
        lr_end=training.lr / 10 if training.lr_end is None else training.lr_end,
        lr_scheduler_name=training.lr_scheduler,
        lr_warm_up_steps=training.lr_warm_up_steps,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        lr_decay_steps=training.lr_decay_steps,
        n_restart_cycles=training.n_restart_cycles,
        train_batch_size_samples=training.batch_size_tokens,
        dead_feature_window=training.dead_feature_window,
        feature_sampling_window=training.feature_sampling_window,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=training.norm_estimate_batches,
    )


def _options(training: TrainingSection) -> StepOptions:
    return StepOptions(
        accumulation_steps=training.accumulation_steps,
        weight_decay=training.weight_decay,
        clip_grad_norm=training.clip_grad_norm,
        lr_floor=training.lr_floor,
        gradient_lr=training.gradient_lr,
        machine=MachineSettings(training.decode_kernel, training.cuda_graphs),
    )


def _own_options(training: TrainingSection, plan: SAEPlan) -> StepOptions:
    options = _options(training)
    return replace(
        options,
        lr_floor=options.lr_floor if plan.lr_floor is None else plan.lr_floor,
        gradient_lr=plan.gradient_lr or options.gradient_lr,
        centres_inputs=plan.centres_inputs,
    )


def _earlier_seconds(checkpoint: Checkpoint | None) -> Mapping[str, float]:
    return {} if checkpoint is None else checkpoint.config.get("seconds", {})


def _seconds(trainer: LockstepTrainer, earlier: Mapping[str, float]) -> dict[str, float]:
    return {
        name: earlier.get(name, 0.0) + step_trainer.seconds
        for name, step_trainer in trainer.step_trainers.items()
    }


class _Logs:
    """metrics.jsonl and revivals.jsonl of a group."""

    def __init__(
        self,
        place: Workplace,
        saes: Mapping[str, TrainingSAE[Any]],
        checkpoint: Checkpoint | None,
        steps: int,
    ) -> None:
        step = 0 if checkpoint is None else checkpoint.step
        folders = {name: place.folder(name) for name in saes}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsLog([JsonLinesSink(folders, step)])
        self._report = place.report
        self._health = HealthWatch(steps, {name: sae.cfg.d_sae for name, sae in saes.items()})
        self._saes = saes
        self._revivals: dict[str, JsonLines] = {}
        for name, sae in saes.items():
            if isinstance(sae, SupportsRevival):
                log = JsonLines(folders[name] / REVIVALS_FILE, step_key="logged_at_step")
                log.truncate_after(step)
                # An empty file says that nothing was revived; none that nobody looked.
                log.path.touch()
                self._revivals[name] = log

    def write(self, name: str, row: Mapping[str, float]) -> None:
        self._metrics.write(name, row)
        for warning in self._health.check(name, row):
            self._report(f"warning: {warning}")
        self._drain(name, int(row["step"]))

    def _drain(self, name: str, step: int) -> None:
        sae = self._saes[name]
        if name in self._revivals and isinstance(sae, SupportsRevival):
            for event in sae.pop_events():
                self._revivals[name].append({"logged_at_step": step, **event})

    def flush(self, trainer: LockstepTrainer) -> None:
        for name, log in self._revivals.items():
            self._drain(name, trainer.n_training_steps)
            log.flush()
        self._metrics.flush()

    def close(self, trainer: LockstepTrainer) -> None:
        self.flush(trainer)
        for log in self._revivals.values():
            log.close()
        self._metrics.close()


def halves(group: Group) -> list[Group]:
    """A group in two, to find the SAE that fails."""
    middle = len(group.entries) // 2
    parts = (group.entries[:middle], group.entries[middle:])
    return [replace(group, entries=part) for part in parts]


def trained_or_failed(
    train: Callable[[Group], None], group: Group, failed: Callable[[Entry, RunFailure], None]
) -> None:
    """Train a group; where one of its SAEs fails, train the others without it.

    Args:
        train: Trains and exports a group, or raises RunFailure.
        group: The SAEs.
        failed: Told of each SAE that fails by itself.
    """
    try:
        train(group)
    except RunFailure as failure:
        if len(group.entries) == 1:
            failed(group.entries[0], failure)
            return
        for part in halves(group):
            trained_or_failed(train, part, failed)
