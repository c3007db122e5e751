"""A comparison as jobs of a cluster: `msae sweep`, over submitit.

First one job for the language model's pass, then one per part (`msae compare --part i/N`), then one
that evaluates and writes comparison.json. Every job goes on where an earlier one stopped, so the
same command continues a sweep.

OUTPUT/jobs/   submitit's files: what each job was and printed
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.comparison.compare import check_comparison_folder, compare
from msae_plugin.comparison.finished_saes import missing_entries
from msae_plugin.comparison.language_model import LanguageModelBench
from msae_plugin.comparison.methods import expand
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.comparison.training_schedule import Part
from msae_plugin.evaluation.outcomes import Reporter, no_report

if TYPE_CHECKING:
    import submitit

JOBS_FOLDER = "jobs"
_POLL_SECONDS = 1.0
# submitit's own default kills a job after five minutes.
_DEFAULT_MINUTES = 24 * 60


@dataclass(frozen=True)
class Outcome:
    """What a job gives back.

    Attributes:
        problems: One line each: SAEs that could not be trained, what was not measured.
    """

    problems: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class ActivationsJob:
    """The model's pass over the text.

    Attributes:
        recipe: The comparison, as `CompareConfig.to_dict` gives it.
        output: Its folder.
    """

    recipe: Mapping[str, Any]
    output: Path

    @property
    def name(self) -> str:
        """What the job is called."""
        return "activations"

    def __call__(self) -> Outcome:
        """Make the pass, unless it is complete or everything is trained."""
        config = CompareConfig.from_dict(self.recipe)
        bench = LanguageModelBench(config, self.output, no_report, None, skip_missing=True)
        if not missing_entries(expand(config, bench.widths()).entries, config, self.output):
            return Outcome()
        with InterruptionGuard() as guard:
            bench.source(guard)
        return Outcome()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before a preempted job ends: it is submitted again."""
        return _again(self)


@dataclass(frozen=True)
class PartJob:
    """Training of a share.

    Attributes:
        recipe: The comparison.
        output: Its folder.
        part: Which share.
    """

    recipe: Mapping[str, Any]
    output: Path
    part: Part

    @property
    def name(self) -> str:
        """What the job is called."""
        return f"part {self.part.number}/{self.part.of}"

    def __call__(self) -> Outcome:
        """Train what is missing of the share."""
        config = CompareConfig.from_dict(self.recipe)
        comparison = compare(config, self.output, part=self.part, skip_missing=True)
        return Outcome([f"{name}: {reason}" for name, reason in comparison.failures.items()])

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """As for the other jobs."""
        return _again(self)


@dataclass(frozen=True)
class EvaluationJob:
    """Evaluation of everything.

    Attributes:
        recipe: The comparison.
        output: Its folder.
        skip_missing: Leave evaluations out whose data or packages are missing.
    """

    recipe: Mapping[str, Any]
    output: Path
    skip_missing: bool

    @property
    def name(self) -> str:
        """What the job is called."""
        return "evaluation"

    def __call__(self) -> Outcome:
        """Measure and write comparison.json."""
        config = CompareConfig.from_dict(self.recipe)
        comparison = compare(config, self.output, skip_missing=self.skip_missing)
        problems = [f"{name}: {reason}" for name, reason in comparison.failures.items()]
        if not comparison.complete and not problems:
            problems = ["not everything was measured: comparison.json names it"]
        return Outcome(problems)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """As for the other jobs."""
        return _again(self)


SweepJob = ActivationsJob | PartJob | EvaluationJob


def _again(job: SweepJob) -> submitit.helpers.DelayedSubmission:
    # Optional, and installed where this is called: inside a job.
    import submitit

    return submitit.helpers.DelayedSubmission(job)


def sweep(
    config: CompareConfig,
    output: Path,
    *,
    executor: Literal["local", "slurm"] = "local",
    jobs: int = 1,
    parameters: Mapping[str, Any] | None = None,
    skip_missing: bool = False,
    report: Reporter = no_report,
) -> None:
    """Run a comparison as jobs, and wait for them.

    Args:
        config: The recipe.
        output: The comparison's folder, on a disk that all jobs see.
        executor: Where jobs run: as processes of this machine, or on a Slurm cluster.
        jobs: In how many parts the training is shared.
        parameters: submitit's: timeout_min, gpus_per_node, slurm_partition and the like.
        skip_missing: Leave evaluations out whose data or packages are missing.
        report: Shows progress.

    Raises:
        InputError: The recipe, the folder or a parameter cannot work, or submitit is missing.
        RunFailure: A job failed; the message names it and its log.
        InterruptedBySignalError: The jobs were cancelled; the same command continues.
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, not {jobs}")
    check_comparison_folder(output)
    submitter = _executor(output / JOBS_FOLDER, executor, parameters or {})
    recipe, where = config.to_dict(), output.resolve()
    if config.synthetic is None:
        _run(submitter, [ActivationsJob(recipe, where)], report)
    parts = [PartJob(recipe, where, Part(number, jobs)) for number in range(1, jobs + 1)]
    if jobs > 1:
        _run(submitter, parts, report)
    _run(submitter, [EvaluationJob(recipe, where, skip_missing)], report)


def _executor(folder: Path, executor: str, parameters: Mapping[str, Any]) -> submitit.AutoExecutor:
    try:
        # Optional: only sweeps need it.
        import submitit
    except ImportError as error:
        raise InputError("msae sweep needs submitit: pip install 'msae-plugin[cluster]'") from error
    try:
        made = submitit.AutoExecutor(folder=folder, cluster=executor)
        made.update_parameters(**{"timeout_min": _DEFAULT_MINUTES, "name": "msae", **parameters})
    # submitit raises any of these for an unknown parameter, a wrong type, or a missing Slurm.
    except (NameError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--executor {executor} cannot start jobs: {reason}") from error
    return made


def _run(submitter: submitit.AutoExecutor, jobs: Sequence[SweepJob], report: Reporter) -> None:
    """Submit jobs, wait for all, and say what failed."""
    title = jobs[0].name if len(jobs) == 1 else f"{len(jobs)} parts"
    submitted = [submitter.submit(job) for job in jobs]
    try:
        with InterruptionGuard() as guard:
            while (done := sum(job.done() for job in submitted)) < len(submitted):
                guard.check()
                report(f"{title} ({submitted[0].job_id} ...)", done, len(submitted))
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        for job in submitted:
            job.cancel()
        raise
    problems = [
        f"{job.name} (log: {handle.paths.stderr}): {problem}"
        for job, handle in zip(jobs, submitted, strict=True)
        for problem in _problems(handle)
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise RunFailure(f"{problems[0]}{more}; the same command continues once that is mended")


def _problems(job: submitit.Job[Outcome]) -> list[str]:
    error = job.exception()
    if error is None:
        return job.result().problems
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -=")]
    return [lines[-1] if lines else type(error).__name__]
