"""A comparison as jobs: submitit's local executor, failures with their logs, continuation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from msae_cli import app as cli
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.comparison import sweep as sweep_module
from msae_plugin.comparison.compare import compare
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.comparison.sweep import SweepJob, sweep
from msae_plugin.comparison.training_schedule import Shard

SAES = {"ours": {"preset": "nested"}, "batchtopk": {"architecture": "batchtopk"}}


@pytest.fixture
def recipe(ground_truth_recipe: dict[str, Any]) -> dict[str, Any]:
    return ground_truth_recipe | {"saes": SAES}


def rows(output: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((output / "comparison.json").read_text())["rows"]
    return {row["name"]: row for row in found}


def msae(*words: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


# Every job imports SAELens and torch: a quarter of a minute of a core.
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_jobs_of_the_local_executor_leave_the_comparison(
    recipe: dict[str, Any], tmp_path: Path, jobs: int
) -> None:
    config, out = tmp_path / "recipe.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(recipe))
    result = msae("sweep", "-c", config, "-o", out, "--jobs", jobs, "--job", "timeout_min=20")
    assert result.exit_code == 0, result.output
    assert f"comparison: {out / 'comparison.json'}" in result.stdout
    logs = sorted(path.name for path in (out / "jobs").iterdir())
    assert len([name for name in logs if name.endswith("_log.err")]) == (1 if jobs == 1 else 3)
    # The same numbers as of one process.
    compare(CompareConfig.from_dict(recipe), tmp_path / "alone")
    ours, alone = rows(out), rows(tmp_path / "alone")
    assert ours.keys() == alone.keys()
    for name, row in alone.items():
        for metric, value in row["metrics"].items():
            if metric != "training/step_ms":
                assert ours[name]["metrics"][metric] == pytest.approx(value, rel=1e-4), metric


class InThisProcess:
    """submitit's executor and job as far as a sweep uses them, without new processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def submit(self, job: Any) -> Any:
        error, result = None, None
        try:
            result = job()
        except Exception as raised:  # noqa: BLE001  as submitit keeps it
            # What submitit makes of a failure: the traceback's text, between rulers.
            error = RuntimeError(f"Job failed:\n----\nTraceback ...\n{raised}\n----\n")
        name = job.name.replace("/", "_of_")
        paths = SimpleNamespace(stderr=self.folder / f"{name}.err")
        return SimpleNamespace(
            job_id=name,
            paths=paths,
            done=lambda: True,
            exception=lambda: error,
            result=lambda: result,
        )


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_executor", lambda folder, *_: InThisProcess(folder))


@pytest.mark.usefixtures("in_this_process")
def test_a_failed_job_is_named_with_its_log_and_the_sweep_goes_on(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompareConfig.from_dict(recipe)
    run = SweepJob.__call__

    def second_fails(job: SweepJob) -> Any:
        if job.shard == Shard(2, 2):
            raise MemoryError("no room for part 2")
        return run(job)

    with monkeypatch.context() as patch:
        patch.setattr(SweepJob, "__call__", second_fails)
        with pytest.raises(RunFailure) as caught:
            sweep(config, tmp_path / "out", jobs=2)
    message = str(caught.value)
    assert re.match(r"part 2/2 \(log: .*out/jobs/part 2_of_2\.err\): no room for part 2;", message)
    assert "\n" not in message
    assert not (tmp_path / "out" / "comparison.json").exists()
    (trained,) = (tmp_path / "out" / "saes").iterdir()
    stamp = (trained / "run.json").stat().st_mtime_ns
    sweep(config, tmp_path / "out", jobs=2)
    assert len(rows(tmp_path / "out")) == 2
    assert (trained / "run.json").stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("in_this_process")
def test_an_sae_that_diverges_is_a_failure_of_its_part(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    saes = {**SAES, "wild": {"architecture": "topk", "lr": 1e30}}
    config = CompareConfig.from_dict(recipe | {"saes": saes})
    with pytest.raises(RunFailure, match=r"part \d/2 \(log: .*\): wild.*lower the learning rate"):
        sweep(config, tmp_path / "out", jobs=2)


def test_what_cannot_be_started_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = CompareConfig.from_dict(recipe)
    with pytest.raises(InputError, match=r"--executor local cannot start jobs: .*no_such"):
        sweep(config, tmp_path / "a", parameters={"no_such": 1})
    with pytest.raises(InputError, match=r"--jobs must be at least 1, not 0"):
        sweep(config, tmp_path / "a", jobs=0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds 'thesis.tex' and no comparison"):
        sweep(config, tmp_path / "b")


def test_a_malformed_parameter_is_refused(tmp_path: Path, recipe: dict[str, Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = msae("sweep", "-c", path, "-o", tmp_path / "out", "--job", "timeout_min")
    assert result.exit_code == 2
    assert "error: --job 'timeout_min' is not of the form KEY=VALUE" in result.output
