"""Findings on training logs written by hand, and the columns that they are found in."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msae_plugin.saes.health import (
    EARLY_CHECKS,
    L0_RATIO,
    LOW_EXPLAINED_VARIANCE,
    MOSTLY_DEAD,
    MOSTLY_DENSE,
    HealthWatch,
    assess,
    recorded_messages,
)
from msae_plugin.training.log import latent_statistics
from msae_plugin.training.runner import RunResult

STEPS = range(10, 101, 10)


def log(**columns: Callable[[int], float] | float | None) -> list[dict[str, Any]]:
    """Ten rows of a healthy run, with the given columns (of the step) in place of its own."""
    healthy: dict[str, Callable[[int], float] | float | None] = {
        "tokens": lambda step: 1000 * step,
        "loss": lambda step: 10 + 20 / step,
        "explained_variance": lambda step: 0.8 - 1 / step,
        "l0": 32.0,
        "lr": 1e-3,
        "dead_share": 0.01,
        "dense_share": 0.5,
        "log10_firing_rate_p50": -2.5,
    }
    chosen = healthy | columns
    return [
        {"step": step, **{k: v(step) if callable(v) else v for k, v in chosen.items()}}
        for step in STEPS
    ]


def kinds(rows: list[dict[str, Any]], **facts: Any) -> list[str]:
    findings = assess(rows, **{"d_sae": 2048, **facts})
    assert all("\n" not in finding.message for finding in findings)
    # The setting to change is named in the line as well.
    assert all(finding.setting.split(".")[-1] in finding.message for finding in findings)
    return [finding.kind for finding in findings]


def test_a_healthy_run_says_nothing() -> None:
    assert kinds(log(), l0_target=32, l0_exported=33.0, explained_variance=0.78) == []


def test_without_a_log_nothing_is_judged() -> None:
    assert assess([]) == []
    assert assess([{"step": 10, "tokens": 100}], d_sae=8) == []


@pytest.mark.parametrize("value", [-6.0, -1e-6])
def test_negative_explained_variance(value: float) -> None:
    assert kinds(log(explained_variance=value)) == ["negative_explained_variance"]
    # The export is what others get, so its number decides.
    assert kinds(log(), explained_variance=value) == ["negative_explained_variance"]
    assert f"{value:.3g}" in assess(log(explained_variance=value))[0].message


def test_low_explained_variance_that_rises_asks_for_tokens_and_flat_for_another_rate() -> None:
    rising = log(explained_variance=lambda step: step / 500)
    flat = log(explained_variance=0.2)
    assert kinds(rising) == kinds(flat) == ["low_explained_variance"]
    assert assess(rising)[0].setting == "training.tokens"
    assert assess(flat)[0].setting == "training.lr"
    assert kinds(log(explained_variance=LOW_EXPLAINED_VARIANCE)) == []


def test_one_cause_gives_one_line() -> None:
    """A short run is low and falls; told once."""
    short = log(explained_variance=lambda step: step / 500, loss=lambda step: 100 / step)
    assert kinds(short) == ["low_explained_variance"]


def test_a_loss_that_still_falls_is_told_with_the_fall() -> None:
    # Third quarter: steps 60, 70. Last: 80, 90, 100.
    rows = log(loss=lambda step: 200.0 - step)
    third, last = (140 + 130) / 2, (120 + 110 + 100) / 3
    assert kinds(rows) == ["loss_still_falling"]
    assert f"fell by {1 - last / third:.0%}" in assess(rows)[0].message
    assert kinds(log(loss=lambda step: 400.0 - step)) == []


def test_a_decaying_rate_lowers_the_loss_of_a_finished_run() -> None:
    def decays(step: int) -> float:
        return 1e-3 if step <= 75 else 1e-3 * (100 - step) / 25

    assert kinds(log(loss=lambda step: 200.0 - step, lr=decays)) == []
    assert kinds(log(loss=lambda step: 150.0 - step, lr=decays)) == ["loss_still_falling"]


def test_too_few_rows_say_nothing_of_a_trend() -> None:
    assert kinds(log(loss=lambda step: 1000 / step)[:1]) == []


def test_mostly_dead() -> None:
    assert kinds(log(dead_share=MOSTLY_DEAD)) == []
    assert kinds(log(dead_share=MOSTLY_DEAD + 0.01)) == ["mostly_dead"]


def test_silent_latents_that_do_not_count_as_dead_yet() -> None:
    rows = log(dead_share=0.0, log10_firing_rate_p50=-10.0)
    (finding,) = assess(rows, d_sae=2048)
    assert (finding.kind, finding.setting) == ("mostly_dead", "training.dead_feature_window")
    assert "last 10,000 tokens" in finding.message
    # An average latent of so wide an SAE fires 32 / 65536 * 10000 = 4.9 times in the window.
    assert assess(rows, d_sae=65536) == []
    # Without the width nothing can be expected of a window.
    assert assess(rows) == []


def test_mostly_dense_names_the_width_only_where_it_is_the_cause() -> None:
    rows = log(dense_share=MOSTLY_DENSE + 0.01)
    (finding,) = assess(rows, d_sae=2048)
    assert (finding.kind, finding.setting) == ("mostly_dense", "data.exclude_special_tokens")
    (finding,) = assess(rows, d_sae=319)
    assert (finding.kind, finding.setting) == ("mostly_dense", "sae.d_sae")
    assert assess(log(dense_share=MOSTLY_DENSE), d_sae=2048) == []


@pytest.mark.parametrize(
    ("exported", "target", "expected"),
    [
        (32 * L0_RATIO + 0.1, 32, ["l0_off_target"]),
        (32 / L0_RATIO - 0.1, 32, ["l0_off_target"]),
        (32 * L0_RATIO, 32, []),
        (160.0, None, []),
    ],
)
def test_l0_far_from_k(exported: float, target: float | None, expected: list[str]) -> None:
    assert kinds(log(), l0_exported=exported, l0_target=target) == expected


def test_a_wrong_threshold_is_not_taken_for_a_failure_to_learn() -> None:
    assert kinds(log(), l0_exported=160.0, l0_target=32, explained_variance=-30.0) == [
        "l0_off_target"
    ]


def test_findings_of_older_files_are_none() -> None:
    assert recorded_messages(None) == []
    assert recorded_messages([{"kind": "k", "message": "m", "setting": "s"}]) == ["m"]


def warnings(rows: list[dict[str, Any]]) -> list[str]:
    watch = HealthWatch(100, {"a": 2048})
    return [warning for row in rows for warning in watch.check("a", row)]


def test_a_healthy_run_is_not_disturbed() -> None:
    assert warnings(log()) == []
    # Every run begins below zero; this one is at 0 at a quarter.
    rows = log(explained_variance=lambda step: min(0.8, 0.05 * (step - 25)))
    assert rows[1]["explained_variance"] < 0
    assert warnings(rows) == []


def test_a_run_that_goes_nowhere_is_told_once_and_early() -> None:
    (warning,) = warnings(log(explained_variance=-6.0))
    # The first row has no pace; the check after it is the one at 25 %.
    assert warning.startswith("a, step 30 of 100: explained variance is -6")
    finer = [row | {"step": row["step"] // 2} for row in log(explained_variance=-6.0)]
    assert warnings(finer)[0].startswith("a, step 10 of 100: ")


def test_dead_and_dense_latents_get_time_first() -> None:
    (warning,) = warnings(log(dead_share=0.9))
    assert warning.startswith("a, step 30 of 100: 90% of the latents are dead")
    (warning,) = warnings(log(dense_share=0.9))
    assert warning.startswith("a, step 50 of 100: ")


def test_the_end_is_left_to_the_export() -> None:
    watch = HealthWatch(100, {"a": 8})
    assert watch.check("a", {"step": 100, "explained_variance": -1.0}) == []


def test_only_what_can_be_judged_early_is() -> None:
    early = {kind for found in EARLY_CHECKS.values() for kind in found}
    assert early.isdisjoint({"loss_still_falling", "low_explained_variance", "l0_off_target"})


def test_statistics_of_the_latents_of_a_window() -> None:
    sae = torch.nn.Module()
    # Directions of four latents: equal, opposite, at 60 degrees, and a dead one.
    sae.W_enc = torch.nn.Parameter(torch.tensor([[2.0, 0.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0]]))
    sae.W_dec = torch.nn.Parameter(
        torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.5, math.sqrt(0.75)], [0.0, 1.0]])
    )
    firings = torch.tensor([30.0, 10.0, 1.0, 0.0])
    dead = torch.tensor([False, False, False, True])
    row = latent_statistics(firings, 100, dead, sae)
    # Only the first fires on more than 10 % of the 100 tokens.
    assert row["dense_share"] == pytest.approx(30 / 41)
    assert row["dead_share"] == 0.25
    # Linear between .01 and .1.
    assert row["log10_firing_rate_p50"] == pytest.approx(math.log10(0.055), abs=1e-6)
    assert row["encoder_decoder_alignment"] == pytest.approx((1 - 1 + 0.5) / 3, abs=1e-6)


def test_an_sae_that_never_fired_has_numbers_too() -> None:
    row = latent_statistics(torch.zeros(4), 10, torch.ones(4, dtype=torch.bool), torch.nn.Module())
    assert row == {
        "dead_share": 1.0,
        "dense_share": 0.0,
        "log10_firing_rate_p05": -10.0,
        "log10_firing_rate_p50": -10.0,
        "log10_firing_rate_p95": -10.0,
    }


COLUMNS = ("dense_share", "log10_firing_rate_p05", "log10_firing_rate_p50", "l0")


def test_rates_are_of_the_log_window_whatever_saelens_forgets(
    train: Callable[..., RunResult], tmp_path: Path, read_rows: Callable[[Path], list[Any]]
) -> None:
    """SAELens forgets its counts every `feature_sampling_window` steps; here within a window."""
    kept = [
        [{key: row[key] for key in COLUMNS} for row in read_rows(tmp_path / name / "metrics.jsonl")]
        for name, window in (("a", 2000), ("b", 3))
        if train(tmp_path / name, f"training.feature_sampling_window={window}")
    ]
    assert kept[0] == kept[1]
    assert len({row["log10_firing_rate_p50"] for row in kept[0]}) > 1


@pytest.mark.parametrize(
    "architecture", ["multiscale, k: 8", "batchtopk, k: 8", "gated", "jumprelu"]
)
def test_every_architecture_logs_the_columns(
    architecture: str, train: Callable[..., RunResult], tmp_path: Path, read_rows: Any
) -> None:
    train(tmp_path / "out", f"sae={{architecture: {architecture}, d_sae: 96}}")
    for row in read_rows(tmp_path / "out" / "metrics.jsonl"):
        assert 0 <= row["dense_share"] <= 1
        assert row["dead_share"] == pytest.approx(row["dead_latents"] / 96)
        assert row["log10_firing_rate_p05"] <= row["log10_firing_rate_p50"]
        assert row["log10_firing_rate_p50"] <= row["log10_firing_rate_p95"] <= 0
        assert -1 <= row["encoder_decoder_alignment"] <= 1
