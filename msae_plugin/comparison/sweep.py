"""A comparison as jobs of a cluster: `msae sweep`, over submitit.

First one job for the language model's pass, then one per shard (`msae compare --part i/N`), then
one that evaluates and writes comparison.json. Every job goes on where an earlier one stopped, so
the same command continues a sweep.

OUTPUT/jobs/   submitit's files: what each job was and printed
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msae_plugin.common.claims import claimed_output
from msae_plugin.common.errors import InputError, RunFailure, first_line
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.progress import Report, warnings_alone
from msae_plugin.comparison.compare import check_comparison_folder, compare
from msae_plugin.comparison.language_model import LanguageModelTestbed
from msae_plugin.comparison.methods import expand
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.comparison.training_schedule import Shard, missing_entries

if TYPE_CHECKING:
    import submitit

JOBS_FOLDER = "jobs"
_POLL_SECONDS = 1.0
# submitit's own default kills a job after five minutes.
_DEFAULT_MINUTES = 24 * 60


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep."""

    # The model's pass over the text, the training of a shard, or the evaluation of all
    task: Literal["activations", "training", "evaluation"]
    recipe: Mapping[str, Any]  # The comparison, as `CompareConfig.to_dict` gives it
    output: Path
    shard: Shard | None = None  # Which SAEs are trained; of training alone
    skip_missing: bool = True  # Leave evaluations out whose data or packages are missing

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.task if self.shard is None else f"part {self.shard.number}/{self.shard.of}"

    def __call__(self) -> list[str]:
        """Do what is missing of the task; a line each of what was not trained or measured."""
        config = CompareConfig.from_dict(self.recipe)
        if self.task == "activations":
            testbed = LanguageModelTestbed(
                config, self.output, warnings_alone, None, skip_missing=True
            )
            if missing_entries(expand(config, testbed.widths()).entries, config, self.output):
                with claimed_output(self.output), InterruptionGuard() as guard:
                    testbed.source(guard)
            return []
        comparison = compare(config, self.output, shard=self.shard, skip_missing=self.skip_missing)
        problems = [f"{name}: {reason}" for name, reason in comparison.failures.items()]
        if self.task == "evaluation" and not comparison.complete and not problems:
            problems = ["not everything was measured: comparison.json names it"]
        return problems

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before a preempted job ends: it is submitted again."""
        # Optional, and installed where this is called: inside a job.
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def sweep(
    config: CompareConfig,
    output: Path,
    *,
    executor: Literal["local", "slurm"] = "local",
    jobs: int = 1,
    parameters: Mapping[str, Any] | None = None,
    skip_missing: bool = False,
    report: Report = warnings_alone,
) -> None:
    """Run a comparison as jobs, and wait for them; the same command continues one that was stopped.

    The folder is on a disk that all jobs see. The training is shared in as many shards as there are
    jobs. Parameters are submitit's: timeout_min, gpus_per_node, slurm_partition and the like.
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, not {jobs}")
    check_comparison_folder(output)
    submitter = _executor(output / JOBS_FOLDER, executor, parameters or {})
    recipe, where = config.to_dict(), output.resolve()
    # Of the jobs' folder: the comparison's own is claimed by the jobs.
    with claimed_output(output / JOBS_FOLDER):
        if config.synthetic is None:
            _run(submitter, [SweepJob("activations", recipe, where)], report)
        if jobs > 1:
            shards = [Shard(number, jobs) for number in range(1, jobs + 1)]
            _run(submitter, [SweepJob("training", recipe, where, s) for s in shards], report)
        evaluation = SweepJob("evaluation", recipe, where, skip_missing=skip_missing)
        _run(submitter, [evaluation], report)


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
        raise InputError(f"--executor {executor} cannot start jobs: {first_line(error)}") from error
    return made


def _run(submitter: submitit.AutoExecutor, jobs: Sequence[SweepJob], report: Report) -> None:
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


def _problems(job: submitit.Job[list[str]]) -> list[str]:
    error = job.exception()
    if error is None:
        return job.result()
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -=")]
    return [lines[-1] if lines else type(error).__name__]
