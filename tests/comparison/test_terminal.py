"""The table at the end of a comparison."""

import io

from rich.console import Console

from msae_plugin.comparison.results import comparison_for_terminal


def shown(contents: dict[str, object]) -> str:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(comparison_for_terminal(contents))
    return captured.get()


def test_means_spread_misses_and_what_is_missing_are_shown() -> None:
    def row(seed: int, f1: float, matched: bool) -> dict[str, object]:
        return {
            "method": "a[b]",
            "l0_target": 5.0,
            "seed": seed,
            "l0_matched": matched,
            "metrics": {"ground_truth/f1": f1, "training/step_ms": 2.0},
        }

    failed_to_learn = {
        **row(1, 0.7, False),
        "name": "a[b]-seed1",
        "health": [{"kind": "mostly_dead", "message": "90% are dead", "setting": "lr"}],
    }
    contents: dict[str, object] = {
        "kind": "ground_truth",
        "rows": [row(0, 0.5, True), failed_to_learn],
        "not_measured": [{"what": "c", "status": "failed", "reason": "it diverged"}],
    }
    text = shown(contents)
    assert "a[b]" in text
    assert "0.600 ± 0.141" in text
    assert "5 (missed)" in text
    assert "failed: c: it diverged" in text
    assert "warning: a[b]-seed1: 90% are dead" in text
    assert "2.0 ± 0.0" in text
