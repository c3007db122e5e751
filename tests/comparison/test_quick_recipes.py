"""The shipped comparisons in small, as a user runs them: trained, measured, and on one page."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from msae_cli import app as cli
from msae_plugin.comparison.ladder import ladder_variants

pytestmark = pytest.mark.slow

HELDOUT = [
    f"heldout/{name}"
    for name in (
        "l0",
        "explained_variance",
        "loss_recovered",
        "kl",
        "dead_latents",
        "mean_max_decoder_cosine",
    )
]
PROBING = ["sparse_probing/sae_top_1_test_accuracy", "sparse_probing/sae_top_5_test_accuracy"]
GROUND_TRUTH = [
    f"ground_truth/{name}"
    for name in (
        "l0",
        "f1",
        "precision",
        "recall",
        "mcc",
        "uniqueness",
        "explained_variance",
        "shrinkage",
        "dead_latents",
        "mean_max_decoder_cosine",
    )
]
MEASURED = {
    "compare_ground_truth": GROUND_TRUTH,
    "compare_ladder_ground_truth": GROUND_TRUTH,
    "compare_smollm2": [*HELDOUT, *PROBING],
    "compare_ladder_language_model": [*HELDOUT, *PROBING],
}


def msae(*words: str | Path) -> None:
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per recipe; about a quarter of an hour on two slow cores in all."""
    folder = tmp_path_factory.mktemp("quick")
    for name in MEASURED:
        msae("compare", "--config", name, "--quick", "--output", folder / name)
    return {name: folder / name for name in MEASURED}


def rows_of(output: Path) -> Sequence[dict[str, Any]]:
    return json.loads((output / "comparison.json").read_text())["rows"]


@pytest.mark.parametrize("name", MEASURED)
def test_every_row_is_trained_and_has_every_number(outputs: dict[str, Path], name: str) -> None:
    rows = rows_of(outputs[name])
    contents = json.loads((outputs[name] / "comparison.json").read_text())
    assert [item for item in contents["not_measured"] if item["status"] == "failed"] == []
    for row in rows:
        missing = set(MEASURED[name]) - row["metrics"].keys()
        assert not missing, (row["name"], missing)
        if row["folder"] is None:
            assert row["control"]
            continue
        assert row["training_steps"] > 0
        assert "training/final_loss" in row["metrics"]
    # An L0 that is set, not searched, is the target.
    cut = [row for row in rows if row["folder"] is not None and row["coefficient"] is None]
    assert len(cut) > 10
    assert [row["name"] for row in cut if not row["l0_matched"]] == []


@pytest.mark.parametrize("name", [name for name in MEASURED if "ladder" in name])
def test_the_ladder_is_whole(outputs: dict[str, Path], name: str) -> None:
    methods = [row["method"] for row in rows_of(outputs[name])]
    assert methods == [variant.name for variant in ladder_variants()]
    page = (outputs[name] / "report" / "report.html").read_text()
    for variant in ladder_variants():
        assert escape(variant.mechanism) in page, variant.name


def test_latents_in_context_are_those_of_the_ladders_references(outputs: dict[str, Path]) -> None:
    output = outputs["compare_ladder_language_model"]
    stored = {path.parent.name.split("_l0")[0] for path in output.glob("saes/*/contexts.json")}
    assert stored == {v.name for v in ladder_variants() if v.against is None}


def test_one_page_tells_all_of_it(outputs: dict[str, Path], tmp_path: Path) -> None:
    msae("report", *outputs.values(), "--output", tmp_path / "report")
    page = (tmp_path / "report/report.html").read_text()
    for name in MEASURED:
        assert name in page
    for section in ("What revival does", "Feature statistics", "Sample features in context"):
        assert section in page
