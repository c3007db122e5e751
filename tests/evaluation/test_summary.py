"""summary.json and summary.csv: means, spreads, and what was not measured."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from msae_plugin.common.errors import InputError
from msae_plugin.evaluation.evaluate import read_outcomes, write_outcomes
from msae_plugin.evaluation.outcomes import MetricDefinition, ScoreResult
from msae_plugin.evaluation.summary import (
    interpolated,
    result_entry,
    standings,
    summary,
    summary_csv,
    write_summary,
)
from msae_plugin.reporting.report import build
from msae_plugin.reporting.sources import Source, Sources
from msae_plugin.reporting.terminal import summary_for_terminal, unmeasured_lines

L0 = MetricDefinition("latents that are not 0", "latents per token", "all", "saebench", None)


def measured(value: float, tmp_path: Path, seed: int, **facts: str) -> ScoreResult:
    file = tmp_path / "core" / f"seed_{seed}" / "a.json"
    return ScoreResult("measured", {"l0": value}, file, facts=facts)


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    outcomes = {seed: measured(value, tmp_path, seed) for seed, value in ((2, 30.0), (0, 34.0))}
    entry = result_entry("a", "core", outcomes, tmp_path)
    assert entry["metrics"]["l0"] == {
        "mean": 32.0,
        "std": pytest.approx(8**0.5),
        "per_seed": {"0": 34.0, "2": 30.0},
    }
    assert entry["files"] == ["core/seed_0/a.json", "core/seed_2/a.json"]
    assert entry["seeds"] == [0, 2]


def test_seeds_with_the_same_text_have_no_spread_and_say_so(tmp_path: Path) -> None:
    outcomes = {seed: measured(30.0, tmp_path, seed, text="same") for seed in (0, 1)}
    entry = result_entry("a", "core", outcomes, tmp_path)
    assert entry["metrics"]["l0"]["std"] is None
    assert "same text" in entry["note"]
    entry = result_entry("a", "core", {7: measured(30.0, tmp_path, 7)}, tmp_path)
    assert entry["metrics"]["l0"]["std"] is None


def test_a_failed_seed_is_a_failed_evaluation(tmp_path: Path) -> None:
    outcomes = {0: measured(30.0, tmp_path, 0), 1: ScoreResult("failed", reason="l0 is nan")}
    entry = result_entry("a", "core", outcomes, tmp_path)
    assert (entry["status"], entry["reason"]) == ("failed", "seed 1: l0 is nan")
    assert entry["metrics"] == {}


def contents(entries: list[dict]) -> dict:
    return summary(
        model={"name": "m"},
        seeds=[0],
        config={},
        saes={"a": {}},
        results=entries,
        definitions={"core": {"l0": L0}},
    )


def test_a_metric_that_nobody_defined_is_not_reported(tmp_path: Path) -> None:
    strange = ScoreResult("measured", {"vibes": 1.0}, tmp_path / "x.json")
    with pytest.raises(KeyError, match="vibes"):
        contents([result_entry("a", "core", {0: strange}, tmp_path)])


def test_files_hold_the_numbers_their_meaning_and_the_reasons(tmp_path: Path) -> None:
    entries = [
        result_entry("a", "core", {0: measured(30.0, tmp_path, 0)}, tmp_path),
        result_entry("a", "unlearning", {0: ScoreResult("skipped", reason="no corpus")}, tmp_path),
    ]
    write_summary(contents(entries), tmp_path)
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored["metrics"]["core/l0"]["unit"] == "latents per token"
    assert stored["results"][1]["reason"] == "no corpus"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert [(r["evaluation"], r["metric"], r["mean"], r["status"]) for r in rows] == [
        ("core", "l0", "30.0", "measured"),
        ("unlearning", "", "", "skipped"),
    ]
    assert rows == list(csv.DictReader(io.StringIO(summary_csv(stored))))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_for_terminal(stored))
    assert "unlearning skipped for all SAEs: no corpus" in console.export_text()


def test_names_that_tell_two_saes_apart_lead_back_to_what_was_given() -> None:
    saes = {
        "x": {"reference": "runs/x", "weights_sha256": "0" * 64},
        "sae-1a2b3c4d": {"reference": "first/sae", "weights_sha256": "1a2b3c4d" * 8},
        "sae-5e6f7a8b": {"reference": "second/sae", "weights_sha256": "5e6f7a8b" * 8},
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_for_terminal({**contents([]), "saes": saes}))
    lines = [line.strip() for line in console.export_text().splitlines() if line.strip()]
    assert lines == ["sae-1a2b3c4d is first/sae", "sae-5e6f7a8b is second/sae"]


def test_the_same_reason_is_said_once() -> None:
    entries = [
        {"evaluation": "core", "sae": name, "status": "failed", "reason": reason}
        for name, reason in (("a", "x"), ("b", "x"), ("c", "y"))
    ]
    assert unmeasured_lines(entries) == ["core failed for a, b: x", "core failed for c: y"]


def test_outcomes_are_taken_up_again_only_under_the_same_key(tmp_path: Path) -> None:
    folder = tmp_path / "core" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    good, bad = measured(30.0, tmp_path, 0, text="t"), ScoreResult("failed", reason="once")
    write_outcomes(folder, {"a": "key", "b": "key"}, {"a": good, "b": bad})
    assert read_outcomes(folder, {"a": "key", "b": "key"}) == {"a": good}
    assert read_outcomes(folder, {"c": "key"}) == {}
    with pytest.raises(InputError, match="other weights, settings or versions"):
        read_outcomes(folder, {"a": "another"})
    (folder / "a.json").unlink()
    assert read_outcomes(folder, {"a": "key"}) == {}


def test_the_terminal_shows_numbers_shorter_but_not_other_numbers(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    outcomes = {seed: measured(value, tmp_path, seed) for seed, value in ((0, 10.5), (1, 20.25))}
    console.print(summary_for_terminal(contents([result_entry("a", "core", outcomes, tmp_path)])))
    assert "15.4±6.9" in console.export_text()
    one = {0: measured(0.0625, tmp_path, 0)}
    console.print(summary_for_terminal(contents([result_entry("a", "core", one, tmp_path)])))
    assert " .062" in console.export_text()


def summary_of_gemma(**changes: Any) -> dict[str, Any]:
    """An evaluation of one SAE of Gemma-2-2B, layer 12, at an L0 between BatchTopK's 42 and 84."""
    record = {
        "model_name": "google/gemma-2-2b",
        "hook_name": "blocks.12.hook_resid_post",
        "d_sae": 16384,
        "architecture": "jumprelu",
        "reference": "runs/mine",
        "weights_sha256": "0" * 64,
    }
    metrics = {"l0": (42 * 84) ** 0.5, "ce_loss_score": 0.985}
    values = {
        name: {"mean": value, "std": None, "per_seed": {"0": value}}
        for name, value in metrics.items()
    }
    entry = {"sae": "mine", "evaluation": "core", "status": "measured", "reason": None}
    defined = {
        "definition": "a thing", "unit": "share", "tokens": "all", "source": "SAEBench",
        "higher_is_better": True,
    }  # fmt: skip
    return {
        "format": 1,
        "model": {"name": "gemma-2-2b"},
        "saes": {"mine": record | changes},
        "results": [{**entry, "seeds": [0], "files": [], "metrics": values}],
        "metrics": {f"core/{name}": defined for name in metrics},
        "seeds": [0],
        "config": {},
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
    }


def test_scores_between_l0s_are_linear_in_the_logarithm_and_none_outside() -> None:
    assert interpolated({40: 0.9, 160: 0.98}, 80) == pytest.approx(0.94)
    assert interpolated({40: 0.9, 160: 0.98}, 160) == pytest.approx(0.98)
    assert interpolated({40: 0.9, 160: 0.98}, 39.9) is None


def test_an_sae_of_that_model_and_layer_is_told_where_it_stands(tmp_path: Any) -> None:
    [found] = standings(summary_of_gemma())
    [line] = found.lines()
    # Half-way between .9813 and .9884; Standard begins at 58 and ends above.
    assert "BatchTopK 0.9848" in line
    assert "loss recovered 0.9850 at L0 59.4, ahead of 7 of 7" in line
    assert "arXiv 2503.09532, from the authors' results" in line
    console = Console(width=500)
    with console.capture() as shown:
        console.print(summary_for_terminal(summary_of_gemma()))
    assert line in shown.get()
    source = Source("eval", tmp_path, summary_of_gemma())
    document, _ = build(Sources([], [source], []))
    [section] = [section for section in document.sections if section.name == "published"]
    told, figure = section.blocks
    assert told.items == [line]
    # A mark of ours and seven published lines.
    own, *published = sorted(figure.points, key=lambda point: "published" in point[3])
    assert own[3].startswith("mine\n")
    assert len({point[0] for point in published}) == 7
    assert "BatchTopK, published" in "".join(point[3] for point in published)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name": "gemma-2-2b-it"},
        {"model_name": "EleutherAI/pythia-160m"},
        {"hook_name": "blocks.19.hook_resid_post"},
        {"d_sae": 4096},
    ],
)
def test_nothing_is_said_of_others(changes: dict[str, Any]) -> None:
    assert standings(summary_of_gemma(**changes)) == []
