"""The answer and the table at the end of a comparison."""

import io
import json
from pathlib import Path

from rich.console import Console

from msae_plugin.reporting.terminal import comparison_for_terminal


def shown(contents: dict[str, object], folder: Path) -> str:
    (folder / "comparison.json").write_text(json.dumps(contents))
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(comparison_for_terminal(folder))
    return captured.get()


def test_means_spread_misses_and_what_is_missing_are_shown(tmp_path: Path) -> None:
    def row(seed: int, f1: float, matched: bool) -> dict[str, object]:
        return {
            "name": f"a[b]-seed{seed}",
            "method": "a[b]",
            "l0_target": 5.0,
            "seed": seed,
            "l0_matched": matched,
            "l0_measured": 9.5,
            "metrics": {"ground_truth/f1": f1, "training/step_ms": 2.0},
        }

    health = [{"kind": "mostly_dead", "message": "90% are dead", "setting": "lr"}]
    contents: dict[str, object] = {
        "format": 1,
        "kind": "ground_truth",
        "rows": [row(0, 0.5, True), {**row(1, 0.7, False), "health": health}],
        "definitions": {"ground_truth/f1": {"unit": "share", "higher_is_better": True}},
        "not_measured": [{"what": "c", "status": "failed", "reason": "it diverged"}],
    }
    text = shown(contents, tmp_path)
    first = text.splitlines()[0]
    assert first.startswith("Failed to learn, see the warnings: 1 of 2 SAEs of a[b].")
    assert "a[b] alone: nothing to choose between" in first
    assert "a[b] (missed its L0)" in text
    assert ".600±.141" in text
    assert "failed: c: it diverged" in text
    assert "missed: a[b]-seed1 at its target L0: L0 9.5 where 5 was asked for" in text
    assert "warning: a[b]-seed1: 90% are dead" in text
    assert "2.000±.000" in text
