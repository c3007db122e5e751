"""`msae compare` and `msae report` as commands: what they print, leave and return."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from msae_cli import app as cli
from msae_plugin.common.errors import InputError
from msae_plugin.reporting import report as report_module


def msae(*words: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def recipe_file(ground_truth_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    saes = {"ours": {"preset": "default"}, "batchtopk": {"architecture": "batchtopk"}}
    path.write_text(yaml.safe_dump(ground_truth_recipe | {"saes": saes, "reference": "batchtopk"}))
    return path


def test_one_command_leaves_a_table_and_a_page(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = msae("compare", "--config", recipe_file, "--output", out, "--set", "seeds=[0, 1]")
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    f1 = [row["metrics"]["ground_truth/f1"] for row in rows if row["method"] == "ours"]
    assert len(f1) == 2
    assert f"{sum(f1) / 2:.3f}".removeprefix("0") in result.stdout
    assert re.search(r"ours\s.*\b3\b", result.stdout)
    assert f"comparison: {out / 'comparison.json'}" in result.stdout
    assert f"page: {out / 'report' / 'report.html'}" in result.stdout
    assert "<h1>Sparse autoencoders compared" in (out / "report" / "report.html").read_text()
    # The report of the same folder again, and next to a comparison that goes on.
    again = msae("report", out, "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again/report.html").read_bytes() == (
        out / "report/report.html"
    ).read_bytes()
    added = msae("compare", "--config", recipe_file, "--output", out, "--set", "seeds=[0, 1, 2]")
    assert added.exit_code == 0, added.output
    assert len(json.loads((out / "comparison.json").read_text())["rows"]) == 6


def test_parts_are_trained_by_several_processes(recipe_file: Path, tmp_path: Path) -> None:
    common = ("compare", "--config", recipe_file, "--output", tmp_path / "out", "--no-page")
    first = msae(*common, "--part", "1/2")
    assert first.exit_code == 0, first.output
    assert "part 1/2 is trained and measured: run without --part" in first.stdout
    assert not (tmp_path / "out/comparison.json").exists()
    (measured,) = (tmp_path / "out/ground_truth").iterdir()
    kept = measured.read_bytes()
    assert msae(*common, "--part", "2/2").exit_code == 0
    assert msae(*common).exit_code == 0
    rows = json.loads((tmp_path / "out/comparison.json").read_text())["rows"]
    assert len(rows) == 2
    assert measured.read_bytes() == kept
    (row,) = [row for row in rows if row["name"] == measured.stem]
    assert json.loads(kept)["metrics"].items() <= row["metrics"].items()
    assert not (tmp_path / "out/report").exists()
    wrong = msae(*common, "--part", "2")
    assert wrong.exit_code == 2
    assert "NUMBER/OF" in wrong.output


def test_what_failed_is_named_and_the_page_is_made_of_the_rest(
    recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wrong = "saes.bad={architecture: batchtopk, lr: 1.0e+30}"
    result = msae("compare", "--config", recipe_file, "--output", out, "--set", wrong)
    assert result.exit_code == 1
    assert "bad_l0-3_seed0: " in result.output
    assert "failed: not everything was trained" in result.output
    page = (out / "report/report.html").read_text()
    assert "bad_l0-3_seed0" in page
    assert "What was to be measured and was not" in page
    share = msae("compare", "--config", recipe_file, "--output", out, "--set", wrong, "--part=1/1")
    assert share.exit_code == 1


def test_without_a_page_what_was_measured_is_there(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise InputError("figures need matplotlib")

    monkeypatch.setattr(report_module, "pyplot", missing)
    result = msae("compare", "--config", recipe_file, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "no page was made: figures need matplotlib" in result.output
    assert (tmp_path / "out/comparison.json").is_file()
