"""Training of SAEs that share their batches, and its end: threshold, export and record of each."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainingSAE
from typing_extensions import Self, override

from msae_plugin.architecture.calibration import calibrate, needs_calibration
from msae_plugin.common.errors import RunFailure
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay, Report
from msae_plugin.comparison.activations import StoredActivations
from msae_plugin.comparison.ground_truth import SyntheticSource
from msae_plugin.comparison.methods import (
    SAES_FOLDER,
    Entry,
    entry_training,
    mean_l0,
    plan_entry,
    sae_folder,
    scale_thresholds,
)
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.saes.run_record import RunRecord, describe_device, software_versions
from msae_plugin.training.checkpoints import Checkpoint, CheckpointStore
from msae_plugin.training.log import JsonLinesSink, MetricsLog
from msae_plugin.training.plans import SAEPlan, build_sae, plans_as_begun, require_memory
from msae_plugin.training.session import SessionSettings, TrainingSession, sae_record

# An L0 of zero has no logarithm.
_SMALLEST_L0 = 0.05

ActivationSource: TypeAlias = StoredActivations | SyntheticSource
"""Batches of one comparison by hook, seed and number, and fresh ones that no SAE is trained on."""


@dataclass(frozen=True)
class ComparisonRun:
    """A comparison under way: everything that its trainings share."""

    config: CompareConfig
    source: ActivationSource
    output: Path
    device: str
    guard: InterruptionGuard
    report: Report

    def folder(self, name: str) -> Path:
        """Folder of an SAE."""
        return sae_folder(self.output, name)


@dataclass(frozen=True)
class Group:
    """SAEs to train together, of one seed and one number of mini-batches per step."""

    entries: Sequence[Entry]
    coefficients: Mapping[str, float]  # Value of each searched setting by the SAE's name
    tokens: int
    search_tokens: Mapping[str, int]  # What finding the coefficients cost, by the same names

    @property
    def seed(self) -> int:
        """The seed that all share."""
        return self.entries[0].seed


def log_error(l0: float, target: float) -> float:
    """log(l0 / target): zero at the target, positive where too many latents fire."""
    return math.log(max(l0, _SMALLEST_L0) / target)


def is_matched(l0: float, target: float, tolerance: float) -> bool:
    """Whether an L0 is within a relative tolerance of its target, either way."""
    return abs(log_error(l0, target)) <= math.log1p(tolerance) + 1e-9


@dataclass(frozen=True)
class L0Match:
    """A trained SAE at its inference threshold."""

    l0: float  # Active latents per token on fresh activations
    # What was changed for it; None for an architecture without a threshold
    calibration: Mapping[str, float] | None


class _SeededBatches:
    """The mini-batches of a group, as SAELens' trainers take them."""

    def __init__(self, source: ActivationSource, group: Group) -> None:
        self._source, self._seed = source, group.seed
        self._hooks = list(dict.fromkeys(entry.hook for entry in group.entries))
        self.position = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next mini-batch by hook; never ends."""
        number, self.position = self.position, self.position + 1
        return {hook: self._source.batch(hook, self._seed, number) for hook in self._hooks}


class _ReportedProgress(ProgressDisplay):
    """Tells a comparison's reporter how far a training is."""

    def __init__(self, report: Report, title: str) -> None:
        self._report, self._title, self._total = report, title, 0

    @override
    def start(self, total_tokens: int, done_tokens: int, names: list[str]) -> None:
        self._total = total_tokens

    @override
    def message(self, text: str) -> None:
        self._report(text)

    @override
    def advance(self, done_tokens: int) -> None:
        self._report(self._title, done_tokens, self._total)


class GroupSession(TrainingSession):
    """Trains a group of a comparison, and ends it: threshold, export and record of each SAE.

    Keys are what each SAE depends on, kept in checkpoints; `earlier` the seconds of each SAE's own
    steps in earlier sessions.
    """

    def __init__(
        self,
        run: ComparisonRun,
        group: Group,
        settings: SessionSettings,
        saes: dict[str, TrainingSAE[Any]],
        keys: Mapping[str, str],
        earlier: Mapping[str, float],
    ) -> None:
        self._batches = _SeededBatches(run.source, group)
        super().__init__(settings, saes, self._batches)
        self._run = run
        self._group = group
        self._plans: dict[str, SAEPlan] = {plan.name: plan for plan in settings.plans}
        self._keys = keys
        self._earlier = earlier

    @property
    def seconds(self) -> dict[str, float]:
        """Of each SAE's own steps, in all sessions."""
        return {
            name: self._earlier.get(name, 0.0) + step_trainer.seconds
            for name, step_trainer in self.trainer.step_trainers.items()
        }

    @override
    def described(self) -> dict[str, Any]:
        return {"entries": dict(self._keys), "seconds": self.seconds}

    @override
    def prepare(self) -> None:
        # SAELens counts the batches with a bar of its own.
        with contextlib.redirect_stderr(io.StringIO()):
            self.trainer.prepare_scaling()
        # The batches that the scaling was estimated on are trained on as well.
        accumulation = self.settings.training.accumulation_steps
        self._batches.position = self.trainer.n_training_steps * accumulation

    def match_l0(self, entry: Entry) -> L0Match:
        """Set the threshold of an SAE that has one to its target L0, and measure the L0."""
        run, sae = self._run, self.saes[entry.name]
        sae.eval()
        count = run.config.training.calibrate_batches
        batches = self.scaled(entry.name, run.source.fresh(entry.hook, entry.seed, count))
        if needs_calibration(sae):
            found = calibrate(sae, batches)
        elif isinstance(sae, JumpReLUTrainingSAE) and not entry.method.sparsity.searched:
            found = scale_thresholds(sae, batches, entry.l0)
        else:
            return L0Match(mean_l0(sae, batches), None)
        return L0Match(found["l0_after"], found)

    def finish(self, matches: Mapping[str, L0Match]) -> None:
        """Fold, export and record every SAE of the group."""
        self.trainer.fold_scaling()
        for entry in self._group.entries:
            self._finish_one(entry, matches[entry.name])

    def _finish_one(self, entry: Entry, match: L0Match) -> None:
        run, training, plan = self._run, self.settings.training, self._plans[entry.name]
        lr, seconds = training.lr if plan.lr is None else plan.lr, self.seconds[entry.name]
        run.source.describe(self.saes[entry.name].cfg.metadata, entry.hook)
        try:
            finished = self.export(
                entry.name,
                run.source.samples(entry.hook, entry.seed),
                # SAELens' names for what readers of a runner_cfg.json look for first.
                lambda: {
                    "sae": plan.config.to_dict(),
                    "lr": lr,
                    "train_batch_size_tokens": training.batch_size_tokens,
                    "accumulation_steps": training.accumulation_steps,
                    "comparison": run.config.to_dict(),
                },
                calibration=match.calibration,
                l0=match.l0,
            )
        except RunFailure as failure:
            raise RunFailure(f"SAE {entry.name!r}: {failure}") from failure
        RunRecord(
            run.folder(entry.name),
            {
                "versions": software_versions(),
                "seed": entry.seed,
                "device": describe_device(run.device),
                **run.source.record(),
                "steps": self.steps,
                "tokens": self.tokens,
                "saes": {
                    entry.name: {
                        **sae_record(plan, "."),
                        **finished.record(self.tokens / max(seconds, 1e-9)),
                    }
                },
                "config": run.config.to_dict(),
                "comparison": {
                    "key": self._keys[entry.name],
                    "row": self._row(entry, match, lr, seconds),
                },
            },
            seconds,
        ).write("complete")

    def _row(self, entry: Entry, match: L0Match, lr: float, seconds: float) -> dict[str, Any]:
        """The SAE's row of comparison.json, without metrics."""
        config, method, sparsity = self._run.config, entry.method, entry.method.sparsity
        sae_config = self._plans[entry.name].config
        found = (
            {sparsity.name: float(getattr(sae_config, sparsity.name))}
            if sparsity.searched
            else None
        )
        row = {
            "name": entry.name,
            "method": method.name,
            "architecture": sae_config.architecture(),
            "preset": method.section.get("preset"),
            "hook": None if config.synthetic is not None else entry.hook,
            "l0_target": entry.l0,
            "l0_measured": match.l0,
            "l0_matched": is_matched(match.l0, entry.l0, config.search.tolerance),
            "seed": entry.seed,
            "lr": lr,
            "coefficient": found,
            "folder": f"{SAES_FOLDER}/{entry.name}",
            "training_steps": self.steps,
            "training_tokens": self.tokens,
            "search_tokens": self._group.search_tokens.get(entry.name, 0),
            "seconds": seconds,
            "control": "frozen random decoder" if method.frozen_decoder else None,
        }
        if (variant := method.variant) is not None:
            for key in ("group", "mechanism", "claim", "against"):
                row[key] = getattr(variant, key)
        return row


def train_group(
    run: ComparisonRun,
    group: Group,
    *,
    keys: Mapping[str, str] | None = None,
    store: CheckpointStore | None = None,
    checkpoint: Checkpoint | None = None,
    title: str,
) -> GroupSession:
    """Train to the end, from a checkpoint if given; nothing is folded and no threshold set yet.

    Without keys no logs are kept, without a store no checkpoints: a trial of a search.
    """
    config, tokens = run.config, group.tokens
    training = entry_training(group.entries[0], config, tokens)
    plans = {
        entry.name: plan_entry(
            entry,
            config,
            run.source.d_in(entry.hook),
            coefficient=group.coefficients.get(entry.name),
            tokens=tokens,
        )
        for entry in group.entries
    }
    if checkpoint is not None:
        plans = {plan.name: plan for plan in plans_as_begun(list(plans.values()), checkpoint.path)}
    require_memory(list(plans.values()), run.device)
    saes = {
        entry.name: build_sae(plans[entry.name], entry.seed, run.device) for entry in group.entries
    }
    for entry in group.entries:
        if entry.method.frozen_decoder:
            saes[entry.name].W_dec.requires_grad_(False)
    folders = {} if keys is None else {name: run.folder(name) for name in plans}
    step = 0 if checkpoint is None else checkpoint.step
    metrics = MetricsLog([JsonLinesSink(folders, step, config.log_every_steps)])
    session = GroupSession(
        run,
        group,
        SessionSettings(
            plans=list(plans.values()),
            training=training,
            device=run.device,
            seed=group.seed,
            log_every=config.log_every_steps,
            guard=run.guard,
            progress=_ReportedProgress(run.report, title),
            folders=folders,
            store=store,
            metrics=metrics,
        ),
        saes,
        keys or {},
        {} if checkpoint is None else checkpoint.config.get("seconds", {}),
    )
    if checkpoint is not None:
        session.resume(checkpoint)
    try:
        session.run()
    finally:
        metrics.close()
    return session
