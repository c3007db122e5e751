from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from msae_plugin.common.errors import InputError
from msae_plugin.evaluation.heldout import HeldoutMetrics
from msae_plugin.reporting.demo_output import (
    COLUMNS,
    ComparisonRow,
    FigureSAE,
    comparison_json,
    comparison_markdown,
    comparison_table,
    demo_figure,
    training_curve,
)
from msae_plugin.reporting.figures import pyplot as require_matplotlib


def metrics(loss_recovered: float | None = 0.9612) -> HeldoutMetrics:
    return HeldoutMetrics(
        explained_variance=0.81234,
        l0=32.04,
        loss_recovered=loss_recovered,
        ce_clean=3.9,
        ce_sae=4.1,
        ce_zero=9.0,
        kl=0.2,
        dead_latents=3,
        d_sae=200,
        mean_max_decoder_cosine=0.21987,
        dense_share=0.3,
        log10_median_firing_rate=-2.0,
        encoder_decoder_alignment=0.7,
        single_word_share=0.2,
        n_tokens=1000,
        n_loss_tokens=500,
        firing_frequency=torch.logspace(-3, -0.5, 200),
    )


ROWS = [
    ComparisonRow("multiscale", metrics(), 1234.5),
    ComparisonRow("batchtopk", metrics(None), None),
]


def test_the_markdown_table_has_a_row_per_sae_and_a_definition_per_column():
    lines = comparison_markdown(ROWS).splitlines()
    cells = "| multiscale | 32.0 | 0.8123 | 0.9612 | 3 (1.5%) | 0.220 | 1,234 |"
    assert cells in lines
    assert "| batchtopk | 32.0 | 0.8123 | n/a | 3 (1.5%) | 0.220 | n/a |" in lines
    assert lines[0].count("|") == lines[1].count("|") == cells.count("|")
    for column in COLUMNS:
        assert f"- {column.title}: {column.definition}." in lines


def test_the_json_keeps_all_digits_and_says_what_is_undefined():
    data = json.loads(json.dumps(comparison_json(ROWS)))
    assert data["saes"][0]["explained_variance"] == 0.81234
    assert data["saes"][1]["loss_recovered"] is None
    assert data["saes"][1]["tokens_per_second"] is None
    assert set(data["definitions"]) <= set(data["saes"][0])


def test_the_terminal_table_shows_every_number_at_80_columns():
    console = Console(width=80)
    with console.capture() as capture:
        console.print(comparison_table(ROWS, "Title"))
    shown = capture.get()
    for cell in ("32.0", "0.8123", "0.9612", "0.220", "1,234", "n/a"):
        assert cell in shown


def test_the_figure_is_a_png_of_a_useful_size(tmp_path):
    saes = [
        FigureSAE(name, metrics(None), [100, 200, 300], [-2.0, 0.5, 0.8], [96.0, 64.0, 32.0])
        for name in ("multiscale", "batchtopk")
    ]
    demo_figure(saes, tmp_path / "demo.png", "title")
    data = (tmp_path / "demo.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width > 1200
    assert height > 400
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_too_many_saes_for_the_palette_are_refused(tmp_path):
    saes = [FigureSAE(str(i), metrics(), [1], [0.5], [32.0]) for i in range(5)]
    with pytest.raises(InputError, match="not 5"):
        demo_figure(saes, tmp_path / "demo.png", "title")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"msae-plugin\[report\]"):
        require_matplotlib()


def test_the_training_curve_comes_from_the_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "tokens": 100, "explained_variance": 0.1, "l0": 96.0},
        {"step": 2, "tokens": 200, "explained_variance": None, "l0": 64.0},
        {"step": 3, "tokens": 300, "explained_variance": 0.3, "l0": 32.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_curve(path) == ([100, 300], [0.1, 0.3], [96.0, 32.0])
    with pytest.raises(InputError, match="cannot be read"):
        training_curve(Path(tmp_path / "none.jsonl"))


def test_curves_at_another_l0_say_so():
    annealed = FigureSAE("a", metrics(), [1, 2], [0.1, 0.2], [95.6, 32.1])
    constant = FigureSAE("b", metrics(), [1, 2], [0.1, 0.2], [32.0, 32.0])
    assert annealed.training_label == "a (training L0 96 falling to 32)"
    assert constant.training_label == "b (training L0 32)"
