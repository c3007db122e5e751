"""`msae cache`, and `msae train` under torchrun, as commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from msae_cli import app as cli


def msae(*words: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_a_cache_is_made_and_trained_from(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    made = msae("cache", "-c", recipe_file, "-o", folder)
    assert made.exit_code == 0, made.output
    assert "5,888 activations at blocks.1.hook_resid_post (float32, 0.00 GiB)" in made.stdout
    change = f"cached_activations={folder}"
    trained = msae("train", "-c", recipe_file, "-o", tmp_path / "out", "--set", change)
    assert trained.exit_code == 0, trained.output
    again = msae("cache", "-c", recipe_file, "-o", folder)
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "error: --output" in again.stderr
    other = ("--set", change, "--set", "data.context_size=16")
    refused = msae("train", "-c", recipe_file, "-o", tmp_path / "out2", *other)
    assert refused.exit_code == 2
    assert "data.context_size was 32 and the recipe has 16" in refused.stderr


def torchrun(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "msae_plugin"]
    return subprocess.run(
        [*command, *(str(word) for word in words)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_of_torchrun_train_what_one_trains(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert msae("cache", "-c", recipe_file, "-o", folder).exit_code == 0
    common = ("train", "-c", recipe_file, "--set", f"cached_activations={folder}", "-o")
    assert msae(*common, tmp_path / "one").exit_code == 0
    two = torchrun(*common, tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("export check: largest relative difference") == 1
    ours, theirs = (
        load_file(tmp_path / name / "sae" / "sae_weights.safetensors") for name in ("two", "one")
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_wrong_recipe_under_torchrun_is_one_line_per_process(
    recipe_file: Path, tmp_path: Path
) -> None:
    change = ("--set", "training.batch_size_tokens=127")
    failed = torchrun("train", "-c", recipe_file, "-o", tmp_path / "out", *change)
    assert failed.returncode == 1
    message = "error: training.batch_size_tokens = 127 cannot be shared by 2 processes"
    assert message in failed.stderr
    assert not (tmp_path / "out").exists()
