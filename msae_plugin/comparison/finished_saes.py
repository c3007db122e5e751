"""The end of an SAE's training in a comparison: sparsity, export, record.

L0 falls as the coefficient rises. Steps are taken in log coefficient and log L0, where sparsity
penalties are close to straight lines; once one trial was too dense and another too sparse, every
further one lies between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE

from msae_plugin.architecture.calibration import calibrate, needs_calibration
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import json_safe, key_digest
from msae_plugin.comparison.group_training import ComparisonRun, GroupSession
from msae_plugin.comparison.methods import SAES_FOLDER, Entry, mean_l0, sae_folder, scale_thresholds
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.saes.run_record import (
    RunRecord,
    describe_device,
    read_run_record,
    software_versions,
)
from msae_plugin.training.session import sae_record

# No step changes the coefficient by more than this factor; the first one has no slope to go by.
_LARGEST_STEP = math.log(8.0)
_FIRST_SLOPE = -1.0
# An L0 of zero has no logarithm.
_SMALLEST_L0 = 0.05
# Share of a bracket that a trial keeps away from its ends.
_MARGIN = 0.1


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Args:
        coefficient: What was tried.
        l0: What it gave, active latents per token.
        tokens: What the run cost.
        whole: Whether it was as long as the runs that are reported.
    """

    coefficient: float
    l0: float
    tokens: int
    whole: bool = False


def log_error(l0: float, target: float) -> float:
    """log(l0 / target): zero at the target, positive where too many latents fire."""
    return math.log(max(l0, _SMALLEST_L0) / target)


def is_matched(l0: float, target: float, tolerance: float) -> bool:
    """Whether an L0 is within a relative tolerance of its target, either way."""
    return abs(log_error(l0, target)) <= math.log1p(tolerance) + 1e-9


def best_trial(trials: Sequence[Trial], target: float) -> Trial:
    """The one whose L0 is closest to the target, in ratio.

    Raises:
        ValueError: There is no trial.
    """
    if not trials:
        raise ValueError("a search needs at least one trial")
    return min(trials, key=lambda trial: abs(log_error(trial.l0, target)))


def next_coefficient(trials: Sequence[Trial], target: float, start: float) -> float:
    """The next coefficient to try.

    Args:
        trials: So far, in their order, all of one length.
        target: The L0 to reach.
        start: The first to try.
    """
    if not trials:
        return start
    points = [(math.log(t.coefficient), log_error(t.l0, target)) for t in trials]
    low = max((p for p in points if p[1] > 0), default=None)  # too dense: a larger one is needed
    high = min((p for p in points if p[1] <= 0), default=None)
    if low is not None and high is not None and low[0] < high[0]:
        # Two trials on one side: the other end of the bracket is too far off to be trusted.
        same_side = len(points) > 1 and (points[-1][1] > 0) == (points[-2][1] > 0)
        return math.exp((low[0] + high[0]) / 2 if same_side else _between(low, high))
    x, y = points[-1]
    step = -y / slope(trials, target)
    return math.exp(x + max(-_LARGEST_STEP, min(_LARGEST_STEP, step)))


def corrected_coefficient(
    coefficient: float, l0: float, target: float, trials: Sequence[Trial]
) -> float:
    """A coefficient corrected by what a whole run gave, along the slope of the short trials."""
    step = -log_error(l0, target) / slope(trials, target)
    return coefficient * math.exp(max(-_LARGEST_STEP, min(_LARGEST_STEP, step)))


def slope(trials: Sequence[Trial], target: float) -> float:
    """Slope d log L0 / d log coefficient between the two trials closest to the target; negative."""
    ordered = sorted(trials, key=lambda trial: abs(log_error(trial.l0, target)))
    for second in ordered[1:]:
        run = math.log(second.coefficient) - math.log(ordered[0].coefficient)
        rise = log_error(second.l0, target) - log_error(ordered[0].l0, target)
        if run and rise / run < -0.05:
            return rise / run
    return _FIRST_SLOPE


def _between(low: tuple[float, float], high: tuple[float, float]) -> float:
    width = high[0] - low[0]
    share = low[1] / (low[1] - high[1])
    return low[0] + width * max(_MARGIN, min(1 - _MARGIN, share))


# Changing these trains the same SAE.
_NOT_OF_AN_SAE = (
    "l0", "seeds", "saes", "ladder", "heldout", "evaluation", "reference", "quick",
    "log_every_steps", "keep_activations", "common",
)  # fmt: skip
# Raised when the same settings train another SAE.
_FORMAT = 2
_NOT_OF_TRAINING = (
    "n_checkpoints", "checkpoint_minutes", "keep_checkpoints", "store_batch_size_prompts",
    "decode_kernel", "cuda_graphs",
)  # fmt: skip


def entry_key(entry: Entry, config: CompareConfig) -> str:
    """A digest of everything that an SAE depends on."""
    values = config.to_dict()
    shared = {key: value for key, value in values.items() if key not in _NOT_OF_AN_SAE}
    training = cast("dict[str, Any]", dict(shared["training"]))
    for key in _NOT_OF_TRAINING:
        training.pop(key)
    shared["training"] = training
    shared.get("model", {}).pop("device", None)
    if "synthetic" in shared and shared["synthetic"] is not None:
        for key in ("eval_samples", "eval_batch_size", "saes_at_once", "device"):
            shared["synthetic"].pop(key)
    if not entry.method.knob.searched:
        shared.pop("search")
    method = entry.method
    own = [
        json_safe(dict(method.section)), method.accumulation_steps, method.frozen_decoder,
        entry.hook, entry.l0, entry.seed,
    ]  # fmt: skip
    return key_digest({"format": _FORMAT, "shared": json_safe(shared), "own": own})


def search_key(entry: Entry, config: CompareConfig) -> str:
    """The same for a search, which all seeds of a method at an L0 share."""
    return entry_key(replace(entry, seed=0), config)


def finished_record(folder: Path, key: str) -> Mapping[str, Any] | None:
    """The `run.json` of an SAE that is complete; None for one to train.

    Raises:
        InputError: The folder holds an SAE of this name that was trained otherwise.
    """
    record = read_run_record(folder)
    if record is None or record.get("status") != "complete":
        return None
    stored = cast("Mapping[str, Any]", record.get("comparison") or {})
    if stored.get("key") != key:
        raise InputError(
            f"{folder} holds an SAE that was trained with other settings: give another --output, "
            "rename the method, or delete the folder to train it again"
        )
    return record


def missing_entries(entries: Sequence[Entry], config: CompareConfig, output: Path) -> list[Entry]:
    """The entries that are still to be trained.

    Raises:
        InputError: One was trained with other settings.
    """
    return [
        entry
        for entry in entries
        if finished_record(sae_folder(output, entry.name), entry_key(entry, config)) is None
    ]


@dataclass(frozen=True)
class Cut:
    """The inference cut of a trained SAE.

    Args:
        l0: Active latents per token on fresh activations.
        calibration: What was changed for it; None for an architecture without a cut.
    """

    l0: float
    calibration: Mapping[str, float] | None


def set_cut(run: ComparisonRun, trained: GroupSession, entry: Entry) -> Cut:
    """Set the cut of an SAE that has one to its target L0, and measure the L0."""
    sae = trained.saes[entry.name]
    sae.eval()
    count = run.config.training.calibrate_batches
    batches = trained.scaled(entry.name, run.source.fresh(entry.hook, entry.seed, count))
    if needs_calibration(sae):
        found = calibrate(sae, batches)
        return Cut(found["l0_after"], found)
    if isinstance(sae, JumpReLUTrainingSAE) and not entry.method.knob.searched:
        found = scale_thresholds(sae, batches, entry.l0)
        return Cut(found["l0_after"], found)
    return Cut(mean_l0(sae, batches), None)


def finish(
    run: ComparisonRun,
    trained: GroupSession,
    cuts: Mapping[str, Cut],
    keys: Mapping[str, str],
    search_tokens: Mapping[str, int],
) -> None:
    """Fold, export and record every SAE of a group.

    Raises:
        RunFailure: An export does not agree with what was trained, or is silent.
    """
    trained.trainer.fold_scaling()
    for entry in trained.group.entries:
        name = entry.name
        _finish_one(run, trained, entry, cuts[name], keys[name], search_tokens.get(name, 0))


def _finish_one(
    run: ComparisonRun, trained: GroupSession, entry: Entry, cut: Cut, key: str, search_tokens: int
) -> None:
    config, training, plan = run.config, trained.settings.training, trained.plans[entry.name]
    lr, seconds = training.lr if plan.lr is None else plan.lr, trained.seconds[entry.name]
    run.source.describe(trained.saes[entry.name].cfg.metadata, entry.hook)
    try:
        finished = trained.export(
            entry.name,
            run.source.samples(entry.hook, entry.seed),
            # SAELens' names for what readers of a runner_cfg.json look for first.
            lambda: {
                "sae": plan.config.to_dict(),
                "lr": lr,
                "train_batch_size_tokens": training.batch_size_tokens,
                "accumulation_steps": training.accumulation_steps,
                "comparison": config.to_dict(),
            },
            calibration=cut.calibration,
            l0=cut.l0,
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
            "steps": trained.steps,
            "tokens": trained.tokens,
            "saes": {
                entry.name: {
                    **sae_record(plan, "."),
                    **finished.record(trained.tokens / max(seconds, 1e-9)),
                }
            },
            "config": config.to_dict(),
            "comparison": {"key": key, "row": _row(trained, entry, config, cut, lr, search_tokens)},
        },
        seconds,
    ).write("complete")


def _row(
    trained: GroupSession,
    entry: Entry,
    config: CompareConfig,
    cut: Cut,
    lr: float,
    search_tokens: int,
) -> dict[str, Any]:
    """The SAE's row of comparison.json, without metrics."""
    method, knob = entry.method, entry.method.knob
    sae_config = trained.plans[entry.name].config
    found = {knob.name: float(getattr(sae_config, knob.name))} if knob.searched else None
    row = {
        "name": entry.name,
        "method": method.name,
        "architecture": sae_config.architecture(),
        "preset": method.section.get("preset"),
        "hook": None if config.synthetic is not None else entry.hook,
        "l0_target": entry.l0,
        "l0_measured": cut.l0,
        "l0_matched": is_matched(cut.l0, entry.l0, config.search.tolerance),
        "seed": entry.seed,
        "lr": lr,
        "coefficient": found,
        "folder": f"{SAES_FOLDER}/{entry.name}",
        "training_steps": trained.steps,
        "training_tokens": trained.tokens,
        "search_tokens": search_tokens,
        "seconds": trained.seconds[entry.name],
        "control": "frozen random decoder" if method.frozen_decoder else None,
    }
    if method.variant is not None:
        variant = method.variant
        row |= {
            "group": variant.group,
            "mechanism": variant.mechanism,
            "claim": variant.claim,
            "against": variant.against,
        }
    return row
