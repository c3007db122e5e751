"""The whole evaluation: what is written, taken up again, refused, skipped and failed."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_builders import HOOK, make_subject, random_multiscale, random_standard
from typer.testing import CliRunner

from msae_cli.app import app, joined_seeds
from msae_plugin.common.errors import InputError, Problem, RunFailure
from msae_plugin.evaluation import evaluate as evaluate_module
from msae_plugin.evaluation.evaluate import EvaluationResult, evaluate, model_for
from msae_plugin.evaluation.recipe import EvalConfig
from msae_plugin.evaluation.saebench import adapter
from msae_plugin.evaluation.saebench.adapter import run_evaluation
from msae_plugin.models.loading import LanguageModel
from msae_plugin.saes.load import EvaluatedSAE


def config(text_file: Path, tmp_path: Path, **changes: Any) -> EvalConfig:
    core = {
        "dataset": str(text_file),
        "context_size": 32,
        "batch_size_prompts": 4,
        "n_eval_reconstruction_batches": 1,
        "n_eval_sparsity_variance_batches": 2,
        "exclude_special_tokens_from_reconstruction": True,
    }
    return EvalConfig.from_dict(
        {
            "model": {"device": "cpu"},
            "seeds": [3, 1],
            "evaluations": {"core": {**core, **changes}},
            "cache": str(tmp_path / "cache"),
        }
    )


Evaluate = Callable[..., EvaluationResult]


@pytest.fixture
def protocol(text_file: Path, tmp_path: Path) -> EvalConfig:
    return config(text_file, tmp_path)


@pytest.fixture
def evaluated(
    protocol: EvalConfig,
    subjects: list[EvaluatedSAE],
    tiny_language_model: LanguageModel,
    tmp_path: Path,
) -> Evaluate:
    """Evaluate both SAEs into `out`, with the tiny model that is loaded already."""

    def run(
        saes: Any = subjects, output: str = "out", given: Any = protocol, **options: Any
    ) -> Any:
        return evaluate(
            given, saes, tmp_path / output, language_model=tiny_language_model, **options
        )

    return run


def test_it_leaves_saebenchs_json_and_a_summary(
    evaluated: Evaluate, subjects: list[EvaluatedSAE], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert evaluated().complete
    stored = json.loads((output / "summary.json").read_text())
    assert stored["saes"]["standard"]["weights_sha256"] == subjects[0].weights_sha256
    assert [(e["sae"], e["status"], e["seeds"]) for e in stored["results"]] == [
        ("standard", "measured", [1, 3]),
        ("multiscale", "measured", [1, 3]),
    ]
    for entry in stored["results"]:
        values = []
        for seed, file in zip(entry["seeds"], entry["files"], strict=True):
            theirs = json.loads((output / file).read_text())["eval_result_metrics"]
            values.append(theirs["sparsity"]["l0"])
            assert entry["metrics"]["l0"]["per_seed"][str(seed)] == values[-1]
        assert entry["metrics"]["l0"]["mean"] == pytest.approx(sum(values) / 2)
        for name in entry["metrics"]:
            assert stored["metrics"][f"core/{name}"]["definition"]


def test_what_was_measured_is_taken_up_and_never_overwritten(
    evaluated: Evaluate,
    subjects: list[EvaluatedSAE],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = evaluated(subjects[:1])
    asked: list[list[str]] = []

    def counting(run: Any, todo: Any) -> Any:
        asked.append([subject.name for subject in todo])
        return run_evaluation(run, todo)

    monkeypatch.setattr(adapter, "run_evaluation", counting)
    second = evaluated()
    assert asked == [["multiscale"], ["multiscale"]]
    assert second.summary["results"][0]["metrics"] == first.summary["results"][0]["metrics"]
    other = dataclasses.replace(subjects[0], weights_sha256="0" * 64)
    with pytest.raises(InputError, match="'standard' from other weights, settings or versions"):
        evaluated([other])
    changed = config(text_file, tmp_path, n_eval_sparsity_variance_batches=3)
    with pytest.raises(InputError, match="other weights, settings or versions"):
        evaluated(given=changed)


def test_changed_text_under_the_same_path_is_not_the_same_evaluation(
    evaluated: Evaluate, subjects: list[EvaluatedSAE], text_file: Path
) -> None:
    evaluated(subjects[:1])
    lines = text_file.read_text().splitlines(keepends=True)
    text_file.write_text("".join(reversed(lines)))
    with pytest.raises(InputError, match="other weights, settings or versions"):
        evaluated(subjects[:1])


@pytest.mark.promise("One SAE's failure does not end the evaluation of the others.")
def test_a_failed_sae_makes_the_evaluation_incomplete_and_keeps_the_others(
    evaluated: Evaluate, subjects: list[EvaluatedSAE]
) -> None:
    broken = make_subject(random_standard(9), "broken")
    broken.sae.b_dec.data[0] = math.inf
    result = evaluated([broken, *subjects])
    assert not result.complete
    statuses = {entry["sae"]: entry["status"] for entry in result.summary["results"]}
    assert statuses == {"broken": "failed", "standard": "measured", "multiscale": "measured"}


def test_a_broken_sae_stands_in_the_summary_as_failed(
    evaluated: Evaluate, subjects: list[EvaluatedSAE], protocol: EvalConfig, tmp_path: Path
) -> None:
    result = evaluated(subjects[:1], broken={"nan": "SAE 'nan': W_dec holds NaN"})
    assert not result.complete
    rows = [(e["sae"], e["status"], e["reason"]) for e in result.summary["results"]]
    assert rows == [("standard", "measured", None), ("nan", "failed", "SAE 'nan': W_dec holds NaN")]
    last = (tmp_path / "out" / "summary.csv").read_text().splitlines()[-1]
    assert last.startswith("nan,core,,failed,")
    assert last.endswith(",SAE 'nan': W_dec holds NaN")
    with pytest.raises(RunFailure, match="W_dec holds NaN"):
        evaluate(protocol, [], tmp_path / "none", broken={"nan": "SAE 'nan': W_dec holds NaN"})


@pytest.fixture
def no_moon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preflight that finds something missing."""
    lacking = [Problem("the moon is missing", "buy one", "core")]
    monkeypatch.setattr(evaluate_module, "preflight", lambda *_, **__: lacking)


@pytest.mark.usefixtures("no_moon")
def test_what_is_missing_is_listed_or_skipped_by_name(evaluated: Evaluate, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"core: the moon is missing - buy one\); --skip-missing"):
        evaluated(output="a")
    assert not (tmp_path / "a").exists()
    result = evaluated(output="b", skip_missing=True)
    assert result.complete
    assert {entry["status"] for entry in result.summary["results"]} == {"skipped"}
    assert result.summary["results"][0]["reason"] == "the moon is missing - buy one"


def test_one_model_for_all(subjects: list[EvaluatedSAE]) -> None:
    other = dataclasses.replace(subjects[0], model_name="another")
    nameless = dataclasses.replace(subjects[0], model_name=None)
    assert model_for("asked", [other, nameless]) == "asked"
    assert model_for(None, subjects) == "tiny-model"
    with pytest.raises(InputError, match=r"different models \(another, tiny-model\)"):
        model_for(None, [other, *subjects])
    with pytest.raises(InputError, match="does not say which model"):
        model_for(None, [nameless])
    packaged = dataclasses.replace(subjects[0], model_name="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert model_for(None, [packaged]) == "packaged:smollm2-135m"


def test_a_folder_with_something_else_is_refused(evaluated: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds 'thesis.tex' and no evaluation"):
        evaluated()


@pytest.fixture
def exported(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., str]:
    """Write an SAE of the tiny model into a folder of its name."""

    def save(name: str = "exported", seed: int = 4, hook: str = HOOK) -> str:
        subject = make_subject(random_multiscale(seed), name)
        subject.sae.cfg.metadata.hook_name = hook
        subject.sae.cfg.metadata.model_name = str(tiny_model_dir)
        subject.sae.save_model(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def protocol_file(protocol: EvalConfig, tmp_path: Path) -> Path:
    path = tmp_path / "protocol.yaml"
    path.write_text(json.dumps(protocol.to_dict()))
    return path


def test_from_the_command_line(
    exported: Callable[..., str], protocol_file: Path, tmp_path: Path
) -> None:
    words = ["eval", exported(), "--config", str(protocol_file)]
    words += ["--output", str(tmp_path / "out"), "--seeds", "7,8"]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    stored = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert stored["seeds"] == [7, 8]
    assert "exported" in ran.output
    missing = CliRunner().invoke(app, ["eval", str(tmp_path / "exportd"), *words[2:]])
    assert missing.exit_code == 2
    assert "exportd" in missing.output

    # What the preflight misses has a line each.
    lacking = json.loads(protocol_file.read_text())
    lacking["evaluations"] |= {"core": {"dataset": str(tmp_path / "no.txt")}, "autointerp": {}}
    protocol_file.write_text(json.dumps(lacking))
    refused = CliRunner().invoke(app, [*words[:4], "--output", str(tmp_path / "other")])
    assert refused.exit_code == 2
    lines = [line for line in refused.output.splitlines() if line.startswith("missing: ")]
    assert any(line.startswith("missing: core: ") and "no.txt" in line for line in lines)
    assert any(line.startswith("missing: autointerp: ") for line in lines)
    count = len(lines)
    assert f"error: {count} things are missing; --skip-missing runs the rest" in refused.output


def test_seeds_are_written_as_people_write_them() -> None:
    words = ["msae", "eval", "run", "--seeds", "0", "1", "2", "--output", "9"]
    assert joined_seeds(words) == ["msae", "eval", "run", "--seeds", "0,1,2", "--output", "9"]
    assert joined_seeds(["msae", "info", "3"]) == ["msae", "info", "3"]


@pytest.mark.promise("One SAE's failure does not end the evaluation of the others.")
def test_an_sae_that_does_not_fit_is_left_out_and_the_others_are_measured(
    exported: Callable[..., str], protocol_file: Path, tmp_path: Path
) -> None:
    folders = [
        exported(f"layer_{layer}", number, f"blocks.{layer}.hook_resid_post")
        for number, layer in enumerate((1, 7))
    ]
    words = ["--config", str(protocol_file), "--skip-missing", "--output"]
    ran = CliRunner().invoke(app, ["eval", *folders, *words, str(tmp_path / "both")])
    assert ran.exit_code == 0, ran.output
    stored = json.loads((tmp_path / "both" / "summary.json").read_text())
    rows = {row["sae"]: row for row in stored["results"]}
    assert rows["layer_1"]["status"] == "measured"
    assert rows["layer_7"]["status"] == "skipped"
    assert "does not fit model" in rows["layer_7"]["reason"]
    alone = CliRunner().invoke(app, ["eval", folders[1], *words, str(tmp_path / "alone")])
    assert alone.exit_code == 2
    assert "does not fit model" in alone.output


@pytest.mark.usefixtures("no_moon")
def test_nothing_measured_is_no_success(
    exported: Callable[..., str], protocol_file: Path, tmp_path: Path
) -> None:
    words = ["eval", exported(), "--config", str(protocol_file), "--skip-missing"]
    ran = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out")])
    assert ran.exit_code == 1
    assert "nothing was measured" in ran.output
