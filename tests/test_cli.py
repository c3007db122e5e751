"""The command line: what it prints, where, and its exit status."""

import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from msae_cli import app as cli
from msae_cli import terminal
from msae_cli.train import resume_command
from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.recipes import SHIPPED
from msae_plugin.training import recipe


def msae(*words: str) -> Any:
    return CliRunner().invoke(cli.app, list(words))


ANSWERED_AT_ONCE = """
import sys
from msae_cli.app import main
sys.argv = ["msae", *sys.argv[1:]]
try:
    main()
finally:
    heavy = sorted({"torch", "sae_lens", "pandas"} & set(sys.modules))
    assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["--help"], 0, "train"),
        (["eval", "--help"], 0, "--skip-missing"),
        (["saebench", "--help"], 0, "msae saebench core --help"),
        (["train"], 2, "Missing option"),
        (["train", "--help"], 0, "--resume"),
        (["info"], 2, "error: give either a folder or --config"),
        (["info", "folder", "--set", "a=1"], 2, "error: --set changes a recipe"),
        (["info", "/nowhere/at/all"], 2, "error: '/nowhere/at/all' does not exist: / holds "),
        (["train", "-c", "here/fil.yaml", "-o", "out"], 2, "did you mean {here}/file.yaml?"),
        (["train", "-c", "here", "-o", "out"], 2, "error: recipe 'here' is a folder; shipped "),
        (["train", "-c", "smolm2", "-o", "out"], 2, "does not exist; did you mean smollm2?"),
        (["train", "-c", "offline", "-o", "out"], 2, "'offline' is a recipe for msae eval, and "),
        (["train", "-c", "here/bad.yaml", "-o", "out"], 2, "error: 'here/bad.yaml' is not valid "),
        (["compare", "-c", "smollm2", "-o", "o"], 2, "'smollm2' is a recipe for msae train, and "),
        (["init", "smolm2"], 2, "error: there is no recipe 'smolm2'; did you mean 'smollm2'?"),
        (["recipes"], 0, "compare_smollm2  "),
        (["--version"], 0, "msae 0."),
        (["train", "-h"], 0, "Example: msae train --config smollm2"),
        (["compare", "-c", "here/file.yaml", "-o", "here/file.yaml"], 2, "is a file: give a"),
        (["eval", "./no", "-c", "smoke", "-o", "out"], 2, "error: 'no' does not exist: "),
        (["publish", "here/file.yaml", "--repo", "a/b"], 2, "is a file: give the folder it is in"),
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(
    tmp_path: Path, words: list[str], status: int, line: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file.yaml").write_text("{l0: [3]}")
    (tmp_path / "here" / "bad.yaml").write_text("{l0: [3")
    done = subprocess.run(
        [sys.executable, "-c", ANSWERED_AT_ONCE, *words],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    said = done.stdout + done.stderr
    assert line.format(here=(tmp_path / "here").resolve()) in said
    if "error:" in line:
        assert said.count("\n") == 1


def test_train_prints_where_the_results_are(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = msae("train", "-c", str(recipe_file), "-o", str(out), "--set", "training.tokens=640")
    assert result.exit_code == 0, result.output
    assert (out / "sae" / "cfg.json").exists()
    for heading in ("SAE", "expl. var.", "export check", "tokens per second"):
        assert heading in " ".join(result.stdout.split())
    assert "loading" not in result.stdout
    assert "100 %" in result.stderr
    assert "explained variance" in result.stderr


def test_a_run_that_learns_nothing_says_so_while_it_runs_and_at_its_end(
    recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sae = "sae={d_sae: 96, k: 8, preset: null, input_normalization: none}"
    settings = (sae, "training.lr=1e-9", "logging.every_steps=1")
    words = [word for setting in settings for word in ("--set", setting)]
    result = msae("train", "-c", str(recipe_file), "-o", str(out), *words)
    assert result.exit_code == 0, result.output
    during = [line for line in result.stderr.splitlines() if line.startswith("warning: sae, step")]
    negative = "explained variance is -"
    assert [negative in line for line in during].count(True) == 1
    health = json.loads((out / "run.json").read_text())["saes"]["sae"]["health"]
    assert "negative_explained_variance" in [finding["kind"] for finding in health]
    assert health == json.loads((out / "export.json").read_text())["health"]
    lines = result.stdout.splitlines()
    assert all(f"warning: sae: {finding['message']}" in lines for finding in health)
    told = msae("info", str(out)).stdout
    assert "WARNING" in told
    assert negative in told
    refused = msae("publish", str(out), "--repo", "ada/x", "--dry-run", "-o", str(tmp_path / "r"))
    assert refused.exit_code == 2
    assert "--allow-negative-variance" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "sae.kk=3"], "error: unknown key 'kk' in 'sae': did you mean 'k'?"),
        (["--set", "training.tokens=3"], "error: training.tokens = 3 is less than one step"),
        (["--resume", "nowhere"], "error: 'nowhere' is not a checkpoint of msae train"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    recipe_file: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    result = msae("train", "-c", str(recipe_file), "-o", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("field x: wrong [red]"), 2, "error: field x: wrong [red]\n"),
        (RunFailure("step 3: diverged"), 1, "failed: step 3: diverged\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            MemoryError("no memory\nsecond line"),
            1,
            "failed: MemoryError: no memory (--debug shows where)\n",
        ),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "run/metrics.jsonl"),
            2,
            "error: 'run/metrics.jsonl' cannot be used (Is a directory): move it away, or give"
            " another path\n",
        ),
    ],
)
def test_every_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    recipe_file: Path,
    error: BaseException,
    status: int,
    line: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(recipe.RunConfig, "load", fail)
    result = msae("train", "-c", str(recipe_file), "-o", "out")
    assert result.exit_code == status
    assert result.stderr == line


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, recipe_file: Path) -> None:
    monkeypatch.setattr(cli, "_debug", False)
    result = msae("--debug", "train", "-c", str(recipe_file), "-o", "out", "--set", "x")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: --set 'x' is not of the form key.path=value" in result.stderr


def test_the_resume_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    command = resume_command("my recipe.yaml", ["sae.k=3", "hooks=[a, b]"], Path("o"), ["x"])
    assert command == (
        "msae train --config 'my recipe.yaml' --set sae.k=3 --set 'hooks=[a, b]' --only x "
        "--output o --resume auto"
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command("r.yaml", [], Path("o")) == (
        "torchrun --nproc-per-node 2 -m msae_plugin train --config r.yaml --output o --resume auto"
    )


def test_ctrl_c_prints_a_command_that_continues(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable,
            *("-m", "msae_plugin", "train", "--config", str(recipe_file), "--output", str(out)),
            *("--set", "training.tokens=12800", "--set", "training.n_checkpoints=50"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not any((out / "checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert re.search(r"stopped by SIGINT; everything so far is in \S+checkpoints/\d+", errors)
    continuation = re.search(r"continue with: msae (.*)", errors)
    assert continuation is not None
    result = msae(*continuation[1].split())
    assert result.exit_code == 0, result.output
    assert (out / "sae" / "cfg.json").exists()


@pytest.mark.parametrize("words", [["--help"], ["recipes"], ["train", "--help"], []])
def test_head_prints_no_error(words: list[str]) -> None:
    """However soon the reader goes: here it is gone before the first byte."""
    script = "import sys; from msae_cli.app import main; sys.argv = ['msae', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", script, *words]
    if not words:
        command = [sys.executable, "-m", "msae_cli.app", "publish", "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.stderr == ""
    assert words or done.returncode == 1


@pytest.mark.parametrize(("name", "example"), [(row[0], row[3]) for row in cli.COMMANDS])
def test_the_example_of_every_command_can_be_typed(name: str, example: str) -> None:
    words = shlex.split(example)
    assert words[0] == name
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, words[1:])
    config = words[words.index("--config") + 1] if "--config" in words else None
    assert config is None or (SHIPPED / f"{config}.yaml").is_file()


def test_init_writes_a_recipe_to_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert msae("init", "smollm2").exit_code == 0
    written = (tmp_path / "smollm2.yaml").read_text()
    assert written.partition("\n")[2] == (SHIPPED / "smollm2.yaml").read_text()
    again = msae("init", "smollm2")
    assert (again.exit_code, again.stderr) == (
        2,
        "error: smollm2.yaml exists: give another file behind the name\n",
    )
    made = msae("init", "offline", "mine.yaml")
    assert made.stdout == (
        "mine.yaml: edit it, then msae eval SAE --config mine.yaml --output runs/offline\n"
    )


def test_quiet_shows_results_alone(recipe_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(terminal, "_quiet", False)
    words = ("train", "-c", str(recipe_file), "-o", str(tmp_path / "out"), "--quiet")
    result = msae(*words, "--set", "training.tokens=640")
    assert result.exit_code == 0, result.output
    assert "tokens per second" in result.stdout
    assert "%" not in result.stderr
    assert "loading" not in result.stderr


def test_a_sign_of_life_while_the_libraries_load(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "errors", Console(file=stream, force_terminal=True))
    terminal.import_first("json")
    assert "loading SAELens and torch" in stream.getvalue()
    in_a_pipe = io.StringIO()
    monkeypatch.setattr(terminal, "errors", Console(file=in_a_pipe))
    terminal.import_first("json")
    assert in_a_pipe.getvalue() == ""


def test_saelens_own_command_line_knows_the_architecture() -> None:
    command = [sys.executable, "-m", "msae_plugin", "saelens", "--architecture", "multiscale", "-h"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--sparsity_scales" in done.stdout
