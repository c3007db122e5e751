"""SAEs of different comparisons stay apart, and the ladder's variants do not crowd others out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from report_inputs import (
    CONTEXTS,
    comparison,
    definition,
    ladder_rows,
    row,
    write_comparison,
    write_sae,
)
from sae_lens import SAE

from msae_plugin.common.table import Table
from msae_plugin.reporting.document import Document, Subheading
from msae_plugin.reporting.report import build
from msae_plugin.reporting.sources import read_sources

UNIQUENESS = "ground_truth/uniqueness"


def table(document: Document, name: str) -> list[dict[str, object]]:
    (found,) = [t for t in document.tables() if t.name == name]
    assert isinstance(found, Table)
    keys = [column.key for column in found.columns]
    return [dict(zip(keys, values, strict=True)) for values in found.rows]


@pytest.fixture
def document(tmp_path: Path) -> Document:
    """Two comparisons that share a method and its L0, one of them with revival on and off."""
    text = comparison(rows=[row("batchtopk", 8.0, seed, folder=f"saes/b{seed}") for seed in (1, 2)])
    truth_rows = [
        row(
            method, 8.0, seed, hook=None, folder=f"saes/{method}{seed}",
            metrics={UNIQUENESS: base + 0.01 * seed},
        )
        for method, base in (("batchtopk", 0.5), ("revived", 0.75))
        for seed in (1, 2)
    ]  # fmt: skip
    truth = comparison(
        kind="ground_truth",
        rows=truth_rows,
        definitions={UNIQUENESS: definition("share", True)},
        not_measured=[],
    )
    for seed in (1, 2):
        write_sae(tmp_path / f"text/saes/b{seed}", seed=10 + seed)
        write_sae(tmp_path / f"truth/saes/batchtopk{seed}", seed=20 + seed)
        write_sae(
            tmp_path / f"truth/saes/revived{seed}", seed=30 + seed, training={"revival_every": 50}
        )
    folders = [
        write_comparison(tmp_path / "text", text),
        write_comparison(tmp_path / "truth", truth),
    ]
    return build(read_sources(folders))[0]


def mean_max_cosine(folder: Path) -> float:
    rows = SAE.load_from_disk(folder / "sae").W_dec.detach().double()
    cosines = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows).T
    return cosines.fill_diagonal_(-1).max(dim=1).values.mean().item()


def test_a_method_of_two_comparisons_is_two_rows(document: Document, tmp_path: Path) -> None:
    for name, folders in (
        ("text", [f"text/saes/b{seed}" for seed in (1, 2)]),
        ("truth", [f"truth/saes/batchtopk{seed}" for seed in (1, 2)]),
    ):
        (found,) = [r for r in table(document, f"{name}-decoders") if r["method"] == "batchtopk"]
        expected = [mean_max_cosine(tmp_path / folder) for folder in folders]
        assert found["seeds"] == 2
        assert found["mean_max_cosine"].mean == pytest.approx(sum(expected) / 2, rel=1e-5)
    titles = [section.title for section in document.sections]
    assert "Feature statistics (text)" in titles
    assert "Feature statistics (truth)" in titles
    assert "What revival does (truth)" in titles
    assert "What revival does (text)" not in titles


def test_what_revival_changes_in_diversity_is_told(document: Document) -> None:
    rows = {str(r["quantity"]): r for r in table(document, "truth-effect-of-revival")}
    assert {q.split(" (")[0] for q in rows} >= {
        "dead latents at the end ↓",
        "uniqueness",
        "effective rank of the decoder",
        "mean max decoder cosine ↓",
        "largest cluster at cos > 0.2",
        "largest cluster at cos > 0.5",
    }
    uniqueness = rows["uniqueness (share) ↑"]
    assert str(uniqueness["mean_on"]).startswith("0.765")
    assert str(uniqueness["mean_off"]).startswith("0.515")
    assert "+0.250" in str(uniqueness["difference"])
    told = repr(document)
    assert "Revival, batchtopk, L0 8 against revived, L0 8: dead latents at the end 3" in told
    assert "uniqueness (share) 0.5150 without and 0.7650 with it" in told
    (figure,) = [f for f in document.figures() if f.name == "truth-effect-of-revival-figure"]
    assert "uniqueness (share): batchtopk 0.5150, revived 0.7650" in figure.alt


def test_variants_of_the_ladder_are_in_no_curve_and_no_context(tmp_path: Path) -> None:
    rows = [item for item in ladder_rows() if item["seed"] == 1]
    for item in rows:
        item["folder"] = f"saes/{item['method']}"
        write_sae(tmp_path / "ladder" / item["folder"])
        contexts = {"latents": CONTEXTS}
        (tmp_path / "ladder" / item["folder"] / "contexts.json").write_text(json.dumps(contexts))
    folder = write_comparison(tmp_path / "ladder", comparison(rows=rows))
    document = build(read_sources([folder]))[0]
    headings = [block.text for block in document.blocks() if isinstance(block, Subheading)]
    assert "baseline_l0-8_seed1" in headings
    assert "source-run-1_l0-8_seed1" not in headings
    (curve,) = [f for f in document.figures() if f.name.startswith("training-explained-variance")]
    assert "baseline ends at" in curve.alt
    assert "source-run-1" not in curve.alt
    assert "Variants of the ladder are left out" in repr(document)
    # Their numbers are all there.
    assert {r["method"] for r in table(document, "decoders")} == {r["method"] for r in rows}
