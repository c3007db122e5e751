"""SAEBench's published numbers beside one's own, at one's own L0."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from msae_plugin.evaluation.published import interpolated, standing
from msae_plugin.reporting.report import build
from msae_plugin.reporting.sources import Source, Sources
from msae_plugin.reporting.terminal import summary_for_terminal


def summary(**changes: Any) -> dict[str, Any]:
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
    [line] = standing(summary())
    # Half-way between .9813 and .9884; Standard begins at 58 and ends above.
    assert "BatchTopK 0.9848" in line
    assert "loss recovered 0.9850 at L0 59.4, ahead of 7 of 7" in line
    assert "arXiv 2503.09532, from the authors' results" in line
    console = Console(width=500)
    with console.capture() as shown:
        console.print(summary_for_terminal(summary()))
    assert line in shown.get()
    source = Source("eval", tmp_path, summary())
    document, _ = build(Sources([], [source], []))
    [section] = [section for section in document.sections if section.name == "published"]
    assert section.blocks[0].items == [line]


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
    assert standing(summary(**changes)) == []
