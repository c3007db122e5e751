"""One training run, from a recipe to exported SAEs: what `msae train` and `msae demo` call.

OUTPUT/run.json, checkpoints/, tensorboard/
OUTPUT/ or, with several SAEs, OUTPUT/<name>/: sae/, jumprelu/, export.json, metrics.jsonl,
revivals.jsonl
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.saes.sae import TrainingSAE

from msae_plugin.errors import InputError, RunFailure
from msae_plugin.evaluation.model_pass import faster_in_bfloat16
from msae_plugin.hub.export_run import REPORT_FILENAME, ExportReport, export_sae
from msae_plugin.training.atomic_files import json_safe
from msae_plugin.training.calibration import calibrate, needs_calibration
from msae_plugin.training.checkpoints import Checkpoint, CheckpointStore
from msae_plugin.training.interruption import InterruptedBySignalError, InterruptionGuard
from msae_plugin.training.metrics_log import (
    METRICS_FILE,
    JsonLinesSink,
    MetricSink,
    MetricsLog,
    TensorBoardSink,
    WandbSink,
    last_row,
    tensorboard_wanted,
)
from msae_plugin.training.models import (
    LanguageModel,
    ModelShape,
    hook_widths,
    load_language_model,
)
from msae_plugin.training.progress import ProgressDisplay, SilentProgress
from msae_plugin.training.run_config import RunConfig
from msae_plugin.training.run_folder import check_output, check_same_run
from msae_plugin.training.run_record import (
    RunRecord,
    describe_device,
    read_run_record,
    software_versions,
)
from msae_plugin.training.sae_plans import build_sae, default_device
from msae_plugin.training.seeding import derive_seed, seed_everything
from msae_plugin.training.shared_pass import SharedPassRunner, shared_pass_config
from msae_plugin.training.text_data import TextData, load_text

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"
ACTIVATION_SAMPLES = 4096
"""Real activations kept per hook for the export check: a few megabytes."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves in memory.

    Attributes:
        saes: The trained SAEs by name: eval mode, activation scaling folded in.
        folders: Folder of each SAE, with its `sae/` export.
        hook_names: Hook of each SAE.
        heldout: Documents that were kept from training.
        language_model: The model.
        tokens_per_second: Training speed by SAE name (its own steps, without the language model)
            and under `overall` (everything), of this session; empty if no step was left to do.
        activation_samples: (n, d_in) raw activations by hook.
        exports: What the export check measured, by SAE name.
        final_rows: Last row of each SAE's metrics.jsonl.
    """

    saes: dict[str, TrainingSAE[Any]]
    folders: dict[str, Path]
    hook_names: dict[str, str]
    heldout: list[str]
    language_model: LanguageModel
    tokens_per_second: dict[str, float]
    activation_samples: dict[str, torch.Tensor]
    exports: dict[str, ExportReport]
    final_rows: dict[str, dict[str, Any]]


class MultiScaleRunner:
    """Trains, calibrates, exports and records the SAEs of a recipe.

    Everything that can be refused without loading a model is refused here, in the constructor.

    Args:
        config: The recipe.
        output: The run's folder; new or empty unless resuming.
        resume: None for a new run, `auto` for the newest complete checkpoint of `output` (a new
            run when there is none), or the path of a checkpoint.
        language_model: An already loaded model to use instead of `config.model.name`.
        text: Already loaded text to use instead of `config.data.source`.
        progress: Shows how far the run is; silent by default.

    Raises:
        InputError: If the recipe, the folder or the checkpoint cannot work.
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
    ) -> None:
        self.config = config
        self.output = output
        self._language_model = language_model
        self._text = text
        self._progress = progress or SilentProgress()
        shape = None
        if language_model is not None:
            shape = ModelShape(
                language_model.d_model, language_model.n_layers, language_model.vocabulary
            )
        self.plans = config.validate(shape)
        self.device = default_device(config.model.device)
        self._tensorboard = tensorboard_wanted(config.logging.tensorboard)
        check_output(output, resume)
        self._store = CheckpointStore(output / CHECKPOINTS_FOLDER, config.training.keep_checkpoints)
        self.checkpoint: Checkpoint | None = None
        if resume is not None:
            self.checkpoint = self._store.resolve(resume)
        if self.checkpoint is not None:
            check_same_run(self.checkpoint, config)
        self.folders = {plan.name: plan.folder(output) for plan in self.plans}

    def run(self) -> RunResult:
        """Run to the end.

        Raises:
            InputError: For what only the loaded model or text can show.
            RunFailure: If training diverges or an export does not agree with what was trained.
            InterruptedBySignalError: On SIGINT or SIGTERM, once a checkpoint is written.
        """
        seed_everything(self.config.training.seed)
        # Before the language model: an architecture may refuse its configuration here.
        saes = {
            plan.name: build_sae(plan, self.config.training.seed, self.device)
            for plan in self.plans
        }
        # Likewise the text: a wrong path must not cost the minutes that a large model takes.
        text = self._load_text()
        language_model = self._load_language_model()
        autocast = self._autocast(language_model)
        record = self._start_record(language_model, text, autocast)
        metrics = MetricsLog(self._sinks())
        try:
            with InterruptionGuard() as guard:
                runner = SharedPassRunner(
                    shared_pass_config(
                        self.config, self.plans, language_model, self.device, autocast=autocast
                    ),
                    config=self.config,
                    dataset=text.train,
                    language_model=language_model,
                    saes=saes,
                    plans=self.plans,
                    folders=self.folders,
                    store=self._store,
                    guard=guard,
                    metrics=metrics,
                    progress=self._progress,
                )
                if self.checkpoint is not None:
                    self._progress.message(f"resuming from {self.checkpoint.path}")
                    with guard.interruptible():
                        runner.resume(self.checkpoint)
                runner.run()
                return self._finish(runner, language_model, text, record, guard)
        except InterruptedBySignalError as interruption:
            if interruption.checkpoint is None and (newest := self._store.newest()):
                interruption.checkpoint = newest.path
            record.write("interrupted")
            raise
        except (InputError, RunFailure) as failure:
            record.write("failed", failure=str(failure))
            raise
        finally:
            metrics.close()

    def _load_language_model(self) -> LanguageModel:
        if self._language_model is None:
            self._progress.message(f"loading {self.config.model.name}")
            self._language_model = load_language_model(
                self.config.model.name,
                self.config.hooks,
                device=self.device,
                dtype=self.config.model.dtype,
            )
        widths = hook_widths(self._language_model, self.config.hooks)
        for plan in self.plans:
            if widths[plan.hook] != plan.config.d_in:
                raise InputError(
                    f"SAE {plan.name!r} has d_in {plan.config.d_in} but the activations at "
                    f"{plan.hook!r} have width {widths[plan.hook]}: set its d_in to that"
                )
        return self._language_model

    def _autocast(self, language_model: LanguageModel) -> bool:
        setting = self.config.model.autocast
        if setting != "auto":
            return setting
        faster = faster_in_bfloat16(language_model.model, self.config.hooks)
        outcome = "faster here: on" if faster else "slower here: off"
        self._progress.message(f"bfloat16 autocast is {outcome}")
        return faster

    def _load_text(self) -> TextData:
        if self._text is None:
            data = self.config.data
            self._progress.message(f"reading {data.source}")
            self._text = load_text(
                data.source,
                split=data.split,
                text_column=data.text_column,
                heldout_documents=data.heldout_documents,
                seed=derive_seed(self.config.training.seed, "text"),
                streaming=data.streaming,
            )
        return self._text

    def _sinks(self) -> list[MetricSink]:
        step = 0 if self.checkpoint is None else self.checkpoint.step
        sinks: list[MetricSink] = [JsonLinesSink(self.folders, step)]
        if self._tensorboard:
            sinks.append(
                TensorBoardSink(self.output / TENSORBOARD_FOLDER, list(self.folders), step)
            )
        wandb = self.config.logging.wandb
        if wandb is not None:
            options = {key: value for key, value in vars(wandb).items() if value is not None}
            sinks.append(WandbSink(options, self.config.to_dict()))
        return sinks

    def _start_record(
        self, language_model: LanguageModel, text: TextData, autocast: bool
    ) -> RunRecord:
        earlier = (read_run_record(self.output) or {}) if self.checkpoint is not None else {}
        resumed = cast("list[int]", earlier.get("resumed_at_steps", []))
        record = RunRecord(
            self.output,
            {
                "versions": software_versions(),
                "seed": self.config.training.seed,
                "device": describe_device(self.device),
                "model": {
                    "name": language_model.model_name,
                    "loader": language_model.model_class_name,
                    "d_model": language_model.d_model,
                    "n_layers": language_model.n_layers,
                    "autocast": autocast,
                },
                "data": {
                    "description": text.description,
                    "heldout_documents": len(text.heldout) + len(text.heldout_tokens),
                },
                "steps": self.config.total_steps,
                "tokens": self.config.total_steps * self.config.tokens_per_step,
                "resumed_at_steps": [
                    *resumed,
                    *([] if self.checkpoint is None else [self.checkpoint.step]),
                ],
                "saes": {
                    plan.name: {
                        "hook": plan.hook,
                        "architecture": plan.config.architecture(),
                        "folder": plan.folder(Path()).as_posix(),
                    }
                    for plan in self.plans
                },
                "config": self.config.to_dict(),
            },
            float(earlier.get("wall_seconds", 0.0)),
        )
        record.write("running")
        return record

    def _finish(
        self,
        runner: SharedPassRunner,
        language_model: LanguageModel,
        text: TextData,
        record: RunRecord,
        guard: InterruptionGuard,
    ) -> RunResult:
        """Set the cuts, fold, export, record. A signal here loses nothing: training is saved."""
        speeds = runner.speeds()
        calibrations = self._calibrate(runner)
        samples = self._activation_samples(runner)
        runner.trainer.fold_scaling()
        exports: dict[str, ExportReport] = {}
        final_rows: dict[str, dict[str, Any]] = {}
        for plan in self.plans:
            guard.check()
            sae = runner.saes[plan.name]
            final = final_rows[plan.name] = last_row(self.folders[plan.name] / METRICS_FILE)
            calibration = calibrations.get(plan.name)
            self._complete_metadata(sae, final, calibration)
            sae.eval()
            exports[plan.name] = self._export(runner, plan.name, samples[plan.hook])
            details = cast("dict[str, dict[str, Any]]", record.content["saes"])[plan.name]
            details.update(
                final=final,
                calibration=calibration,
                tokens_per_second=speeds.get(plan.name),
                export=json_safe(exports[plan.name].to_dict()),
            )
        record.write("complete", tokens_per_second=speeds.get("overall"))
        self._store.finish()
        return RunResult(
            saes=runner.saes,
            folders=self.folders,
            hook_names={plan.name: plan.hook for plan in self.plans},
            heldout=text.heldout_texts(language_model.tokenizer),
            language_model=language_model,
            tokens_per_second=speeds,
            activation_samples=samples,
            exports=exports,
            final_rows=final_rows,
        )

    def _calibrate(self, runner: SharedPassRunner) -> dict[str, dict[str, float]]:
        count = self.config.training.calibrate_batches
        wanted = {name: sae for name, sae in runner.saes.items() if needs_calibration(sae)}
        if count == 0 or not wanted:
            return {}
        self._progress.message(f"setting the cuts on {count} fresh batches")
        batches = runner.fresh_batches(count)
        calibrations: dict[str, dict[str, float]] = {}
        for name, sae in wanted.items():
            hook = runner.trainer.hook_names[name]
            calibrations[name] = calibrate(
                sae, [runner.trainer.scaled(name, batch[hook]) for batch in batches]
            )
        return calibrations

    def _activation_samples(self, runner: SharedPassRunner) -> dict[str, torch.Tensor]:
        batch_size = self.config.training.batch_size_tokens
        batches = runner.fresh_batches(-(-ACTIVATION_SAMPLES // batch_size))
        return {
            hook: torch.cat([batch[hook] for batch in batches])[:ACTIVATION_SAMPLES].float()
            for hook in self.config.hooks
        }

    def _complete_metadata(
        self,
        sae: TrainingSAE[Any],
        final: Mapping[str, Any],
        calibration: Mapping[str, float] | None,
    ) -> None:
        metadata = sae.cfg.metadata
        metadata.training_steps = self.config.total_steps
        metadata.training_tokens = self.config.total_steps * self.config.tokens_per_step
        metadata.final_loss = final.get("loss")
        metadata.seed = self.config.training.seed
        if calibration is not None:
            # SAELens' own figure counts the training batches, before the cut was set.
            metadata.l0 = calibration["l0_after"]

    def _export(
        self, runner: SharedPassRunner, name: str, activations: torch.Tensor
    ) -> ExportReport:
        folder = self.folders[name]
        # Left by a run that was stopped between two exports; run.json does not say complete.
        (folder / REPORT_FILENAME).unlink(missing_ok=True)
        self._progress.message(f"exporting {name}")
        return export_sae(
            runner.saes[name],
            folder,
            activations,
            runner.trainer.step_trainers[name].log_feature_sparsity,
            # The run's rate is not that of an SAE with its own.
            {
                **runner.cfg.to_dict(),
                "lr": runner.trainer.step_trainers[name].cfg.lr,
                "accumulation_steps": self.config.training.accumulation_steps,
                "recipe": self.config.to_dict(),
            },
        )
