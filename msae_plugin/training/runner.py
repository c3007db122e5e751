"""One training run, from a recipe to exported SAEs, and the rules of its folder.

OUTPUT/run.json, checkpoints/, tensorboard/
OUTPUT/ or, with several SAEs, OUTPUT/<name>/: sae/, jumprelu/, export.json, metrics.jsonl,
revivals.jsonl
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE

from msae_plugin.architecture.calibration import calibrate, needs_calibration
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.claims import claimed_output
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import disk_errors_told, held_in, human_bytes, remove_leftovers
from msae_plugin.common.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay
from msae_plugin.common.seeding import seed_everything
from msae_plugin.common.stored import read_json_object
from msae_plugin.data.text import TextData
from msae_plugin.models.loading import LanguageModel
from msae_plugin.saes.export import ExportReport
from msae_plugin.saes.load import check_evaluable
from msae_plugin.saes.run_record import (
    RUN_FILE,
    RunRecord,
    describe_device,
    read_run_record,
    software_versions,
)
from msae_plugin.training.activation_store import (
    ACTIVATION_SAMPLES,
    CachedActivations,
    check_cache,
    open_cache,
)
from msae_plugin.training.checkpoints import Checkpoint, CheckpointStore
from msae_plugin.training.data_parallel import own_batch_size
from msae_plugin.training.inputs import ModelAndText, load_model_and_text
from msae_plugin.training.log import (
    JsonLinesSink,
    MetricSink,
    MetricsLog,
    TensorBoardSink,
    WandbSink,
    tensorboard_wanted,
)
from msae_plugin.training.passes import CachedPass, RecipeSession, SharedPassRunner
from msae_plugin.training.plans import (
    SAEPlan,
    build_sae,
    changed_settings,
    default_device,
    plans_as_begun,
    require_memory,
)
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.session import FinishedSAE, SessionSettings, sae_record

# How steps are computed; before they were training's they were the SAEs' settings.
_OF_THE_MACHINE = (".decode_kernel", ".cuda_graphs")
_MAY_CHANGE = (
    "logging.",
    "model.device",
    "model.autocast",
    "training.n_checkpoints",
    "training.checkpoint_minutes",
    "training.keep_checkpoints",
    "training.calibrate_batches",
    "training.store_batch_size_prompts",
)


def check_output(output: Path, resume: str | None) -> None:
    """Refuse a folder whose contents a run would overwrite."""
    contents = held_in(output)
    if not contents:
        return
    record = read_run_record(output)
    if resume is None:
        unfinished = record is not None and record.get("status") != "complete"
        hint = "continue its run with --resume auto, or " if unfinished else ""
        raise InputError(f"--output {str(output)!r} is not empty: {hint}choose another --output")
    if record is None and RUN_FILE not in contents:
        raise InputError(
            f"--output {str(output)!r} holds files but no run of msae train: "
            "choose another --output"
        )
    if record is not None and record.get("status") == "complete":
        raise InputError(
            f"the run in {str(output)!r} is complete: there is nothing to resume; choose another "
            "--output to train again"
        )


def is_complete(output: Path, config: RunConfig) -> bool:
    """Whether a folder holds the complete run of a recipe; refused if it is of another."""
    record = read_run_record(output)
    if record is None or record.get("status") != "complete":
        return False
    check_same_run(output, record["config"], config)
    return True


def check_same_run(path: Path, earlier: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse to continue a run or checkpoint with a recipe that would train something else."""
    # A setting that is younger than the run had what is now its default.
    then = dict(_flatten(RunConfig().to_dict())) | dict(_flatten(earlier))
    now = dict(_flatten(config.to_dict()))
    for key in sorted(then.keys() | now.keys()):
        may_change = key.startswith(_MAY_CHANGE) or key.endswith(_OF_THE_MACHINE)
        if may_change or then.get(key) == now.get(key):
            continue
        raise InputError(
            f"cannot resume {str(path)!r} with another recipe: {key!r} was "
            f"{then.get(key)!r} and is now {now.get(key)!r}; change it back or start a new run"
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"

Inputs: TypeAlias = ModelAndText | CachedActivations


@dataclass(frozen=True)
class RunResult:
    """A finished run in memory."""

    # The trained SAEs by name: eval mode, activation scaling folded in
    saes: dict[str, TrainingSAE[Any]]
    folders: dict[str, Path]  # Folder of each SAE, with its `sae/` export
    hook_names: dict[str, str]
    heldout: list[str]  # Documents that were kept from training; none where a cache was trained on
    language_model: LanguageModel | None  # The model; None where a cache was trained on
    # Training speed by SAE name (its own steps, without the language model) and under `overall`
    # (everything), of this session; empty if no step was left to do
    tokens_per_second: dict[str, float]
    activation_samples: dict[str, torch.Tensor]  # (n, d_in) raw activations by hook
    # What the export check measured, by SAE name; empty on ranks that do not write
    exports: dict[str, ExportReport]
    final_rows: dict[str, dict[str, Any]]  # Last row of each SAE's metrics.jsonl, likewise


class MultiScaleRunner:
    """Trains, calibrates, exports and records the SAEs of a recipe.

    Everything that can be refused without loading a model is refused here, in the constructor.
    `resume` is None for a new run, `auto` for the newest complete checkpoint of `output` (a new run
    when there is none), or a checkpoint's path. A model and a text that are loaded already stand in
    for those of the recipe. Of several ranks, rank 0 alone writes into the folder and exports.
    """

    def __init__(
        self,
        config: RunConfig,
        output: Path,
        resume: str | None = None,
        language_model: LanguageModel | None = None,
        text: TextData | None = None,
        *,
        progress: ProgressDisplay | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.output = output
        self._language_model = language_model
        self._text = text
        self._leads = ranks.rank == 0
        self._progress = progress if progress and self._leads else ProgressDisplay()
        self._inputs = None
        shape = None
        if config.cached_activations is not None:
            self._inputs = open_cache(Path(config.cached_activations))
            shape = self._inputs.shape
        elif language_model is not None:
            shape = language_model.shape
        self.plans = config.validate(shape)
        if shape is None and self._leads:
            check_evaluable(config.model.name, config.hooks, config.model.loader)
        if self._inputs is not None:
            check_cache(self._inputs, config, self.plans)
            self.plans = self._inputs.fitted(self.plans)
        own_batch_size(config.training.batch_size_tokens, ranks)
        self.device = default_device(config.model.device)
        require_memory(self.plans, self.device)
        self._tensorboard = tensorboard_wanted(config.logging.tensorboard)
        if self._leads:
            check_output(output, resume)
        # Reads alone until the folder is claimed.
        self._store = self._checkpoints(writes=False)
        self._resume = resume
        self.checkpoint: Checkpoint | None = None
        if resume is not None:
            self.checkpoint = self._store.resolve(resume)
        if self.checkpoint is not None:
            check_same_run(self.checkpoint.path, self.checkpoint.config, config)
            recipe = self.plans
            self.plans = plans_as_begun(recipe, self.checkpoint.path)
            self._tell_of_changes(recipe)
        self.folders = {plan.name: plan.folder(output) for plan in self.plans}

    def _tell_of_changes(self, recipe: Sequence[SAEPlan]) -> None:
        for begun, plan in zip(self.plans, recipe, strict=True):
            if changed := changed_settings(begun, plan):
                self._progress.message(
                    f"{plan.name} goes on with the settings that it was begun with, where its "
                    f"preset or this version has others: {', '.join(changed.values())}"
                )

    def _checkpoints(self, *, writes: bool) -> CheckpointStore:
        folder = self.output / CHECKPOINTS_FOLDER
        return CheckpointStore(folder, self.config.training.keep_checkpoints, writes=writes)

    def run(self) -> RunResult:
        """Run to the end.

        Raises InterruptedBySignalError on SIGINT or SIGTERM, once a checkpoint is written.
        """
        if not self._leads:
            return self._run()
        with claimed_output(self.output), disk_errors_told(self.output):
            # Another process may have finished there since this one began.
            check_output(self.output, self._resume)
            remove_leftovers(self.output)
            self._store = self._checkpoints(writes=True)
            self._store.remove_after(0 if self.checkpoint is None else self.checkpoint.step)
            return self._run()

    def _run(self) -> RunResult:
        seed_everything(self.config.training.seed)
        # Before the language model: an architecture may refuse its configuration here.
        self._saes = self._built(self.plans)
        self._require_disk()
        inputs = self._inputs or load_model_and_text(
            self._as_before(),
            self.device,
            self._progress.message,
            language_model=self._language_model,
            text=self._text,
            ranks=self.ranks,
        )
        fitted = inputs.fitted(self.plans)
        changed = [plan for plan in fitted if plan not in self.plans]
        self.plans = fitted
        self._saes |= self._built(changed)
        record = self._start_record(inputs)
        metrics = MetricsLog(self._sinks())
        try:
            with disk_errors_told(self.output), InterruptionGuard() as guard:
                session = self._begin(inputs, guard, metrics)
                if self.checkpoint is not None:
                    self._progress.message(f"resuming from {self.checkpoint.path}")
                    with guard.interruptible():
                        session.resume(self.checkpoint)
                self._train(session)
                return self._finish(session, inputs, record, guard)
        except InterruptedBySignalError as interruption:
            if interruption.checkpoint is None and (newest := self._store.newest()):
                interruption.checkpoint = newest.path
            record.write("interrupted")
            raise
        except KeyboardInterrupt:  # a second signal
            record.write("interrupted")
            raise
        except Exception as failure:
            told = isinstance(failure, (InputError, RunFailure))
            # The disk may be what failed; without a word the run counts as interrupted.
            with contextlib.suppress(OSError, RunFailure):
                reason = str(failure) if told else f"{type(failure).__name__}: {failure}"
                record.write("failed", failure=reason)
            raise
        finally:
            metrics.close()

    def _as_before(self) -> RunConfig:
        """The recipe; `auto` as it was chosen when the run began: a clock may choose otherwise."""
        config = self.config
        if self.checkpoint is None or config.model.autocast != "auto":
            return config
        chosen = read_json_object(self.checkpoint.path / RUNNER_CFG_FILENAME)["autocast_lm"]
        return replace(config, model=replace(config.model, autocast=bool(chosen)))

    def _built(self, plans: Sequence[SAEPlan]) -> dict[str, TrainingSAE[Any]]:
        seed = self.config.training.seed
        return {plan.name: build_sae(plan, seed, self.device) for plan in plans}

    def _require_disk(self) -> None:
        """Refuse a disk that has no room for one checkpoint: weights and two moments of Adam."""
        parameters = [p for sae in self._saes.values() for p in sae.parameters()]
        needed = 3 * sum(p.numel() * p.element_size() for p in parameters)
        free = shutil.disk_usage(self.output).free if self._leads else needed
        if needed > free:
            raise InputError(
                f"--output {str(self.output)!r}: a checkpoint takes {human_bytes(needed)} and "
                f"{human_bytes(free)} are free there: choose another --output"
            )

    def _begin(
        self, inputs: Inputs, guard: InterruptionGuard, metrics: MetricsLog
    ) -> RecipeSession:
        config = self.config
        settings = SessionSettings(
            plans=self.plans,
            training=config.training,
            device=self.device,
            seed=config.training.seed,
            log_every=config.logging.every_steps,
            guard=guard,
            progress=self._progress,
            folders=self.folders,
            store=self._store,
            metrics=metrics,
            ranks=self.ranks,
        )
        if isinstance(inputs, CachedActivations):
            return CachedPass(config, settings, inputs, self._saes)
        return SharedPassRunner(config, settings, inputs, self._saes)

    def _train(self, session: RecipeSession) -> None:
        try:
            session.run()
        except RunFailure as failure:
            newest = self._store.newest()
            kept = (
                "no checkpoint had been written"
                if newest is None
                else f"the last good checkpoint is {newest.path}"
            )
            raise RunFailure(f"{failure}; {kept}") from failure

    def _sinks(self) -> list[MetricSink]:
        if not self._leads:
            return []
        step = 0 if self.checkpoint is None else self.checkpoint.step
        sinks: list[MetricSink] = [
            JsonLinesSink(self.folders, step, self.config.logging.every_steps)
        ]
        if self._tensorboard:
            sinks.append(
                TensorBoardSink(self.output / TENSORBOARD_FOLDER, list(self.folders), step)
            )
        for client in ("wandb", "trackio"):
            settings = getattr(self.config.logging, client)
            if settings is not None:
                options = {key: value for key, value in vars(settings).items() if value is not None}
                sinks.append(WandbSink(options, self.config.to_dict(), client))
        return sinks

    def _start_record(self, inputs: Inputs) -> RunRecord:
        earlier = (read_run_record(self.output) or {}) if self.checkpoint is not None else {}
        resumed = cast("list[int]", earlier.get("resumed_at_steps", []))
        record = RunRecord(
            self.output,
            {
                "versions": software_versions(),
                "seed": self.config.training.seed,
                "device": describe_device(self.device),
                **inputs.record(),
                "processes": self.ranks.count,
                "steps": self.config.training.steps,
                "tokens": self.config.training.whole_tokens,
                "resumed_at_steps": [
                    *resumed,
                    *([] if self.checkpoint is None else [self.checkpoint.step]),
                ],
                "saes": {
                    plan.name: sae_record(plan, plan.folder(Path()).as_posix())
                    for plan in self.plans
                },
                "config": self.config.to_dict(),
            },
            float(earlier.get("wall_seconds", 0.0)),
            writes=self._leads,
        )
        record.write("running")
        return record

    def _finish(
        self,
        session: RecipeSession,
        inputs: Inputs,
        record: RunRecord,
        guard: InterruptionGuard,
    ) -> RunResult:
        """Set the thresholds, fold, export, record. A signal here loses nothing."""
        speeds = session.speeds()
        calibrations = self._calibrate(session)
        samples = self._activation_samples(session)
        session.trainer.leave_ranks()
        session.trainer.fold_scaling()
        finished: dict[str, FinishedSAE] = {}
        for plan in self.plans:
            guard.check()
            session.saes[plan.name].eval()
            if not self._leads:
                continue
            calibration = calibrations.get(plan.name)
            found = finished[plan.name] = session.export(
                plan.name,
                samples[plan.hook],
                partial(self._runner_cfg, session, plan.name),
                calibration=calibration,
                l0=None if calibration is None else calibration["l0_after"],
            )
            details = cast("dict[str, dict[str, Any]]", record.content["saes"])[plan.name]
            details.update(found.record(speeds.get(plan.name)))
        record.write("complete", tokens_per_second=speeds.get("overall"))
        if self._leads:
            self._store.finish()
        return RunResult(
            saes=session.saes,
            folders=self.folders,
            hook_names={plan.name: plan.hook for plan in self.plans},
            heldout=inputs.heldout_texts(),
            language_model=inputs.language_model,
            tokens_per_second=speeds,
            activation_samples=samples,
            exports={name: found.report for name, found in finished.items()},
            final_rows={name: dict(found.final) for name, found in finished.items()},
        )

    def _runner_cfg(self, session: RecipeSession, name: str) -> dict[str, Any]:
        return {
            **session.cfg.to_dict(),
            # The run's rate is not that of an SAE with its own.
            "lr": session.trainer.step_trainers[name].cfg.lr,
            "accumulation_steps": self.config.training.accumulation_steps,
            "recipe": self.config.to_dict(),
        }

    def _calibrate(self, session: RecipeSession) -> dict[str, dict[str, float]]:
        count = self.config.training.calibrate_batches
        wanted = {name: sae for name, sae in session.saes.items() if needs_calibration(sae)}
        if count == 0 or not wanted:
            return {}
        self._progress.message(f"calibrating the thresholds on {count} fresh batches")
        batches = session.fresh_batches(count)
        hooks = session.trainer.hook_names
        return {
            name: calibrate(sae, session.scaled(name, [batch[hooks[name]] for batch in batches]))
            for name, sae in wanted.items()
        }

    def _activation_samples(self, session: RecipeSession) -> dict[str, torch.Tensor]:
        batch_size = self.config.training.batch_size_tokens
        batches = session.fresh_batches(-(-ACTIVATION_SAMPLES // batch_size))
        return {
            hook: torch.cat([batch[hook] for batch in batches])[:ACTIVATION_SAMPLES].float()
            for hook in self.config.hooks
        }
