"""`msae tune`: what is tried, what is chosen, and the recipe that comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from msae_cli import app as cli
from msae_plugin import InputError
from msae_plugin.comparison.compare import Comparison
from msae_plugin.comparison.learning_rates import (
    TuningPlan,
    rates_config,
    rates_contents,
    tune,
    with_rates,
)
from msae_plugin.comparison.recipe import CompareConfig

SAES: dict[str, Any] = {
    "batchtopk": {"architecture": "batchtopk"},
    "ours": {"preset": "default", "lr": 9e-3},
    "frozen": {"control": "frozen_decoder"},
    "permuted": {"control": "permuted_decoder of batchtopk"},
}


@pytest.fixture
def config(ground_truth_recipe: dict[str, Any]) -> CompareConfig:
    return CompareConfig.from_dict(
        {**ground_truth_recipe, "saes": SAES, "l0": [2, 3, 5], "seeds": [0, 4]}
    )


class Trained:
    """Comparisons whose scores are a function of method and rate."""

    def __init__(self, score: Mapping[str, Any], missed: Mapping[str, float] | None = None) -> None:
        self.score, self.missed = score, missed or {}
        self.configs: list[CompareConfig] = []

    def __call__(self, config: CompareConfig) -> Comparison:
        self.configs.append(config)
        rows = []
        for name in config.saes:
            method, rate = name.rsplit("_lr", 1)
            value = self.score[method](float(rate))
            if value is not None:
                rows.append(
                    {
                        "name": name,
                        "method": name,
                        "training_tokens": 100,
                        "search_tokens": 7,
                        "l0_matched": name not in self.missed,
                        "l0_measured": self.missed.get(name, 3.0),
                        "metrics": {"ground_truth/f1": value, "ground_truth/mcc": value / 2},
                    }
                )
        return Comparison(Path("nowhere"), {"rows": rows}, {}, complete=True)


def peak_at(best: float) -> Any:
    return lambda rate: 1 - abs(math.log(rate / best))


def test_the_plan_fits_the_comparison(config: CompareConfig) -> None:
    plan = TuningPlan.of(config, [4e-3, 2e-3])
    assert list(plan.rates) == [2e-3, 4e-3]
    assert plan.l0 == 3
    assert plan.seed == 104
    assert plan.metrics == ("ground_truth/f1", "ground_truth/mcc")
    for message, wrong in {
        "at least two": {"rates": [1e-3, 1e-3]},
        "must be positive": {"rates": [1e-3, -1e-3]},
        "--seed 4 is a seed that the comparison reports": {"seed": 4},
        "--only 'topk' is none of batchtopk, ours, frozen": {"methods": ["topk"]},
    }.items():
        with pytest.raises(InputError, match=message):
            TuningPlan.of(config, **{"rates": [1e-3, 2e-3], **wrong})


def test_trials_are_the_methods_at_rates_and_nothing_else(config: CompareConfig) -> None:
    plan = TuningPlan.of(config, [2e-3, 4e-3], l0=5, seed=9)
    trials = rates_config(config, plan, {"ours": [4e-3, 2e-3], "frozen": [2e-3]})
    assert trials.saes == {
        "ours_lr0.002": {"preset": "default", "lr": 2e-3},
        "ours_lr0.004": {"preset": "default", "lr": 4e-3},
        "frozen_lr0.002": {"control": "frozen_decoder", "lr": 2e-3},
    }
    assert (trials.l0, trials.seeds) == ([5], [9])
    assert trials.training == config.training
    assert trials.synthetic == config.synthetic


def test_rates_are_extended_until_the_best_lies_inside(config: CompareConfig) -> None:
    run = Trained({"batchtopk": peak_at(4e-3), "ours": peak_at(3e-2), "frozen": peak_at(1e-3)})
    choices = tune(config, TuningPlan.of(config, [2e-3, 4e-3, 8e-3]), run)
    assert choices["batchtopk"].lr == 4e-3
    assert list(choices["batchtopk"].tried) == [2e-3, 4e-3, 8e-3]
    assert choices["ours"].lr == pytest.approx(3.2e-2)
    assert list(choices["ours"].tried) == pytest.approx([2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2])
    assert choices["frozen"].lr == pytest.approx(1e-3)
    assert not any(choice.at_end for choice in choices.values())
    assert choices["ours"].tokens == 6 * 107
    assert len(run.configs) == 4
    few = tune(config, TuningPlan.of(config, [2e-3, 4e-3, 8e-3], extend=1, methods=["ours"]), run)
    assert set(few) == {"ours"}
    assert few["ours"].at_end


def test_failed_collapsed_and_missed_trials(config: CompareConfig) -> None:
    scores = {
        "batchtopk": lambda rate: None if rate > 4e-3 else peak_at(4e-3)(rate),
        "ours": lambda rate: math.nan if rate > 4e-3 else peak_at(3e-3)(rate),
        "frozen": lambda _: None,
    }
    run = Trained(scores, missed={"ours_lr0.004": 9.0})
    choices = tune(config, TuningPlan.of(config, [1e-3, 2e-3, 4e-3, 8e-3]), run)
    # A rate that failed bounds the search as well as one that is worse.
    assert choices["batchtopk"].lr == 4e-3
    assert choices["batchtopk"].tried[8e-3] is None
    assert choices["ours"].lr == 2e-3
    assert choices["ours"].tried[8e-3] is None
    assert list(choices["ours"].missed) == [4e-3]
    assert choices["frozen"].lr is None
    assert not choices["frozen"].at_end
    assert len(run.configs) == 1
    with pytest.raises(InputError, match=r"--metric 'x/y' is none of .*: ground_truth/f1"):
        TuningPlan.of(config, [1e-3, 2e-3], metrics=["x/y"])


def test_where_every_l0_missed_the_nearest_counts(config: CompareConfig) -> None:
    missed = {"ours_lr0.001": 0.0, "ours_lr0.002": 6.0, "ours_lr0.004": 2.0}
    run = Trained({"ours": peak_at(2e-3)}, missed)
    choices = tune(config, TuningPlan.of(config, [1e-3, 2e-3, 4e-3], methods=["ours"]), run)
    assert choices["ours"].lr == 4e-3
    # Nor is it a reason to go on: scores at other L0s say nothing.
    assert not choices["ours"].at_end
    assert len(run.configs) == 1


def test_the_recipe_gets_the_rates(config: CompareConfig) -> None:
    run = Trained({"batchtopk": peak_at(2e-3), "ours": peak_at(2e-3), "frozen": lambda _: None})
    plan = TuningPlan.of(config, [1e-3, 2e-3, 4e-3])
    choices = tune(config, plan, run)
    recipe = {"saes": SAES, "quick": {"l0": [3]}}
    tuned = with_rates(recipe, choices)
    assert tuned["saes"]["ours"] == {"preset": "default", "lr": 2e-3}
    assert tuned["saes"]["frozen"] == SAES["frozen"]
    assert SAES["ours"]["lr"] == 9e-3
    contents = json.loads(json.dumps(rates_contents(plan, choices)))
    assert contents["methods"]["ours"]["tried"]["0.002"] == pytest.approx(0.75)
    assert contents["tokens"] == sum(item["tokens"] for item in contents["methods"].values())


def test_a_recipe_is_tuned_on_the_command_line(
    ground_truth_recipe: dict[str, Any], tmp_path: Path
) -> None:
    saes = {name: SAES[name] for name in ("batchtopk", "permuted")}
    recipe = {**ground_truth_recipe, "saes": saes, "seeds": [0], "reference": "batchtopk"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"

    def msae(*words: str | Path) -> Any:
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    wanted = ("tune", "-c", path, "-o", out, "--rates", "1e-3,4e-3", "--extend", "0")
    result = msae(*wanted)
    assert result.exit_code == 0, result.output
    rates = json.loads((out / "rates.json").read_text())["methods"]["batchtopk"]
    assert list(rates["tried"]) == ["0.001", "0.004"]
    assert rates["tried"]["0.004"] > rates["tried"]["0.001"]
    assert rates["lr"] == 4e-3
    assert "batchtopk: the best rate is the last one that was tried" in " ".join(
        result.output.split()
    )
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    f1, mcc = (rows[1]["metrics"][f"ground_truth/{name}"] for name in ("f1", "mcc"))
    assert rates["tried"]["0.004"] == pytest.approx((f1 + mcc) / 2)
    assert {row["seed"] for row in rows} == {100}
    tuned = yaml.safe_load((out / "tuned.yaml").read_text())
    assert tuned["saes"]["batchtopk"] == {"architecture": "batchtopk", "lr": 4e-3}
    assert {key: value for key, value in tuned.items() if key != "saes"} == {
        key: value for key, value in recipe.items() if key != "saes"
    }
    # What is there is not trained again.
    before = (out / "saes" / "batchtopk_lr0.004_l0-3_seed100" / "run.json").stat().st_mtime_ns
    assert msae(*wanted).exit_code == 0
    after = (out / "saes" / "batchtopk_lr0.004_l0-3_seed100" / "run.json").stat().st_mtime_ns
    assert after == before
    wrong = msae("tune", "-c", path, "-o", out, "--rates", "fast,slow")
    assert wrong.exit_code == 2
