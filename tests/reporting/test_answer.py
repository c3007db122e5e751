"""The answer a report begins with: worked out by hand, and silent where nothing is shown."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from report_inputs import (
    DEFINITIONS,
    SEEDS,
    TARGETS,
    comparison,
    definition,
    ground_truth,
    row,
    write_comparison,
    write_evaluation,
    write_run,
    write_sae,
)

from msae_plugin.common.table import Table
from msae_plugin.reporting.document import Document
from msae_plugin.reporting.report import build
from msae_plugin.reporting.sources import read_sources, trained_saes

EV = "heldout/explained_variance"


def document_of(folder: Path, contents: dict[str, Any]) -> Document:
    return build(read_sources([write_comparison(folder, contents)]))[0]


def told(document: Document) -> str:
    return " ".join(
        sentence for answer in document.answers() for sentence in (*answer.sentences, *answer.basis)
    )


def table(document: Document, name: str) -> Table:
    return next(found for found in document.tables() if found.name == name)


def value(method: str, l0: float, seed: int) -> float:
    return row(method, l0, seed)["metrics"][EV]


def test_who_is_ahead_by_how_much_over_what_and_what_is_missing(tmp_path: Path) -> None:
    document = document_of(tmp_path, comparison())
    gains = [
        value("multiscale default", l0, seed) - value("batchtopk", l0, seed)
        for l0 in TARGETS
        for seed in SEEDS
    ]  # fmt: skip
    mean = statistics.fmean(gains)
    half = 2.5706 * statistics.stdev(gains) / math.sqrt(6)  # t(5, .975)
    text = told(document)
    interval = f"+{mean:.4f} [+{mean - half:.4f}, +{mean + half:.4f}]"
    assert (
        f"Use multiscale default for reconstructing activations (explained variance {interval} on "
        "batchtopk)."
    ) in text
    assert "Against batchtopk, multiscale default is worse in none of 2 metrics." in text
    assert "Paired over 3 training seeds and 2 target L0s" in text
    assert "Not measured: loss recovered and probing top-1; 1 listed at the end." in text
    assert document.sections[0].name == "answer"
    assert "Everything" not in repr(document)


def test_the_best_is_marked_only_where_its_lead_is_shown(tmp_path: Path) -> None:
    headline = table(document_of(tmp_path, comparison()), "language-model-headline")
    keys = [column.key for column in headline.columns]
    marked = {(headline.rows[y][0], headline.rows[y][1], keys[x]) for y, x in headline.best}
    # Dead latents are equal: nobody's are marked.
    assert marked == {("multiscale default", l0, EV) for l0 in TARGETS}
    assert "**" in headline.markdown()


def test_an_interval_with_zero_is_level_and_a_worse_method_is_named(tmp_path: Path) -> None:
    rows = [row(method, 8.0, seed) for method in ("batchtopk", "other", "topk") for seed in SEEDS]
    for item in rows:
        noise = {1: 0.02, 2: -0.03, 3: 0.02}[item["seed"]]
        base = 0.7 + {"other": noise, "topk": -0.2 + noise / 10}.get(item["method"], 0.0)
        item["metrics"] = {EV: base, "heldout/l0": 8.0}
    text = told(document_of(tmp_path, comparison(rows=rows, not_measured=[])))
    assert (
        "Level with batchtopk in reconstructing activations (explained variance, at best other "
        "+0.0033" in text
    )
    assert "; topk behind)." in text
    assert "Use " not in text


def test_one_pair_decides_nothing(tmp_path: Path) -> None:
    text = told(document_of(tmp_path, ground_truth()))
    assert (
        "One seed decides nothing. Ahead in this run: multiscale default in finding the true "
        "features (F1, +0.300 on" in text
    )
    assert "Paired over 1 training seed and 1 target L0; what another seed would give" in text


def test_with_one_seed_the_pairs_are_the_data_sets_of_an_evaluation(tmp_path: Path) -> None:
    metric = "sparse_probing/sae_top_1_test_accuracy"
    by_set = {"batchtopk": [0.5, 0.6, 0.7], "ours": [0.6, 0.71, 0.79]}
    rows, results = [], []
    for method, values in by_set.items():
        rows.append(row(method, 8.0, 1, metrics={metric: statistics.fmean(values)}))
        file = f"sparse_probing/{method}.json"
        details = [
            {"dataset_name": f"set{i}", "sae_top_1_test_accuracy": value}
            for i, value in enumerate(values)
        ]
        (tmp_path / "evaluation/sparse_probing").mkdir(parents=True, exist_ok=True)
        written = json.dumps({"eval_result_details": details})
        (tmp_path / "evaluation" / file).write_text(written)
        results.append({"sae": rows[-1]["name"], "evaluation": "sparse_probing", "files": [file]})
    summary = {"format": 1, "saes": {}, "results": results, "metrics": {}}
    (tmp_path / "evaluation/summary.json").write_text(json.dumps(summary))
    definitions = {**DEFINITIONS, metric: definition("share", True)}
    contents = comparison(rows=rows, definitions=definitions, not_measured=[])
    document = document_of(tmp_path, contents)
    half = 4.3027 * statistics.stdev([0.1, 0.11, 0.09]) / math.sqrt(3)
    interval = f"+0.100 [+{0.1 - half:.3f}, +{0.1 + half:.3f}]"
    text = told(document)
    assert f"Use ours for sparse probing (probing top-1 {interval} on batchtopk)." in text
    assert "1 target L0 and 3 data sets of an evaluation" in text
    (differences,) = table(document, "language-model-difference-table").rows
    assert 3 in differences


def test_an_evaluation_of_a_comparisons_saes_is_columns_of_its_table(tmp_path: Path) -> None:
    rows = [row(method, 8.0, 1, folder=f"saes/{method}") for method in ("batchtopk", "ours")]
    for seed, method in enumerate(("batchtopk", "ours")):
        write_sae(tmp_path / "cmp/saes" / method, seed=seed)
    folder = write_comparison(tmp_path / "cmp", comparison(rows=rows, not_measured=[]))
    trained = trained_saes(read_sources([folder]))
    hashes = {f"sae-{sae.method}": next(iter(sae.weight_hashes())) for sae in trained}
    document, _ = build(read_sources([folder, write_evaluation(tmp_path / "eval", hashes)]))
    names = [found.name for found in document.tables() if found.name.endswith("-headline")]
    assert names == ["language-model-headline"]
    headline = table(document, names[0])
    column = [c.key for c in headline.columns].index("core/ce_loss_score")
    assert [values[column].mean for values in headline.rows] == pytest.approx([0.91, 0.92])  # type: ignore[union-attr]
    # L0 was measured twice, and the page says which one it shows.
    assert "shown is core's L0; the other value" in headline.caption
    missing = [tuple(cells) for cells in table(document, "not-measured").rows]
    assert ("eval", "sparse_probing of sae-batchtopk", "failed", "the probe <diverged>") in missing


def test_a_runs_own_evaluation_is_read_with_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    hashes = {
        sae.name: next(iter(sae.weight_hashes())) for sae in trained_saes(read_sources([run]))
    }
    write_evaluation(run / "evaluation", hashes)
    document, _ = build(read_sources([run]))
    headline = table(document, "evaluation-run-evaluation-headline")
    assert {values[0] for values in headline.rows} == {"multiscale", "batchtopk"}
    assert "each trained once" in told(document)


def test_runs_alone_say_that_they_answer_nothing(tmp_path: Path) -> None:
    document, _ = build(read_sources([write_run(tmp_path / "run")]))
    assert told(document).startswith("Nothing here says which SAE to use")
