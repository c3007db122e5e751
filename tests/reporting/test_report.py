"""The whole report: numbers equal to the inputs, honest words, the same bytes twice."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from report_inputs import (
    CONTEXTS,
    DEFINITIONS,
    METHODS,
    SEEDS,
    TARGETS,
    comparison,
    events,
    ground_truth,
    ladder_rows,
    row,
    write_comparison,
    write_evaluation,
    write_run,
    write_sae,
)

from msae_plugin.common.table import Table
from msae_plugin.reporting.document import Document
from msae_plugin.reporting.report import build, report
from msae_plugin.reporting.sources import read_sources


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """A report of everything at once, with the ladder, revival, a run and an evaluation."""
    folder = tmp_path_factory.mktemp("full")
    contents = comparison()
    contents["rows"] += ladder_rows()
    contents["rows"] += [
        row("revived", 8.0, seed, folder=f"saes/on{seed}", l0_matched=False, l0_measured=9.5)
        for seed in SEEDS
    ]
    for item in contents["rows"]:
        if (item["method"], item["l0_target"]) == ("multiscale default", 8.0):
            item["folder"] = f"saes/off{item['seed']}"
    contents["rows"][-1]["metrics"]["heldout/loss_recovered"] = None
    for seed in SEEDS:
        write_sae(folder / f"cmp/saes/off{seed}", seed=seed)
        write_sae(
            folder / f"cmp/saes/on{seed}",
            seed=10 + seed,
            training={"revival_every": 50},
            revived=events(),
        )
    run = write_run(folder / "run")
    (run / "multiscale/contexts.json").write_text(json.dumps({"latents": CONTEXTS}))
    sources = read_sources(
        [
            write_comparison(folder / "cmp", contents),
            write_comparison(folder / "gt", ground_truth()),
            run,
            write_evaluation(folder / "eval"),
        ]
    )
    return build(sources)[0]


def table(document: Document, name: str) -> Table:
    (found,) = [t for t in [*document.tables(), *document.files_only] if t.name == name]
    return found


def by_first(found: Table, *columns: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    keys = [column.key for column in found.columns]
    rows = [dict(zip(keys, values, strict=True)) for values in found.rows]
    return {tuple(values[key] for key in columns): values for values in rows}


def text(document: Document) -> str:
    return repr(document)


def test_the_headline_is_mean_and_spread_over_seeds(full):
    rows = by_first(table(full, "language-model-cmp-headline"), "method", "l0_target")
    for method in METHODS:
        for l0 in TARGETS:
            values = [
                row(method, l0, seed)["metrics"]["heldout/explained_variance"] for seed in SEEDS
            ]
            cell = rows[method, l0]["heldout/explained_variance"]
            assert cell.mean == pytest.approx(statistics.fmean(values), abs=1e-15)
            assert cell.std == pytest.approx(statistics.stdev(values), abs=1e-15)
            assert cell.n == 3
    assert ("frozen decoder (control)", 8.0) in rows
    # Rungs of the ladder are in their own table.
    assert ("source-run-1", 8.0) not in rows
    assert ("baseline", 8.0) in rows


def test_every_number_of_every_row_is_in_the_files(full):
    rows = by_first(table(full, "language-model-cmp-all-metrics"), "name", "metric")
    contents = comparison()["rows"] + ladder_rows()
    for item in contents:
        for metric, value in item["metrics"].items():
            assert rows[item["name"], metric]["value"] == value
    extra = len(SEEDS) * len(DEFINITIONS)  # the SAEs with revival
    assert len(rows) == sum(len(item["metrics"]) for item in contents) + extra


def test_differences_within_the_interval_are_no_wins(full):
    words = by_first(table(full, "language-model-cmp-scorecard"), "method", "against")
    assert {against for _, against in words} == {"batchtopk"}
    assert words["multiscale default", "batchtopk"]["heldout/explained_variance"] == "better"
    assert words["topk <b>&", "batchtopk"]["heldout/explained_variance"] == "worse"
    same = words["multiscale default", "batchtopk"]["heldout/dead_latents"]
    assert same == "no difference shown"
    assert words["frozen decoder", "batchtopk"]["heldout/explained_variance"] == "one pair"


def test_who_missed_the_l0_leads_nowhere(full):
    leaders = table(full, "language-model-cmp-leaders").rows
    assert leaders
    assert not any("revived" in cells for cells in leaders)


def test_a_single_seed_claims_nothing(full):
    assert not [t for t in full.tables() if t.name.startswith("ground-truth-gt-differ")]
    (lead,) = table(full, "ground-truth-gt-leaders").rows
    assert lead[-1] == "one pair, hence no interval (+0.300)"


def test_evaluation_seeds_claim_nothing_about_methods(full):
    names = [t.name for t in full.tables()]
    assert "evaluation-eval-headline" in names
    assert "evaluation-eval-leaders" not in names
    assert "evaluation-eval-scorecard" not in names
    assert "Each SAE was trained once" in text(full)


def test_the_ladder_says_what_was_measured_and_judges_only_what_is_matched(full):
    rows = by_first(table(full, "language-model-cmp-ladder-cumulative-verdicts"), "method")
    assert rows["baseline",]["verdict"] == "reference"
    first = rows["source-run-1",]
    assert first["verdict"].startswith("helps: better in explained variance +0.0220")
    assert first["against"] == "baseline"
    assert first["cost"] == "2.00 ×"
    second = rows["source-run-2",]["verdict"]
    assert second.startswith("not judged, L0 16.0 against 8.1: not matched")
    measured = by_first(table(full, "language-model-cmp-ladder-cumulative"), "method")
    assert measured["source-run-1",]["training_steps"] == 200
    assert measured["source-run-1",]["training/final_loss"].mean == 33.5
    combined = [f for f in full.figures() if f.name.endswith("ladder-cumulative-combined")]
    assert "explained variance: base 0.8020, 1 0.8240, 2 0.8060" in combined[0].alt


def test_revival_in_numbers(full):
    (totals,) = table(full, "cmp-revival-totals").rows
    values = dict(
        zip((c.key for c in table(full, "cmp-revival-totals").columns), totals, strict=True)
    )
    assert values["method"] == "revived"
    assert values["frequency"].mean == 20
    assert values["survival"].mean == pytest.approx(1 / 3)
    assert values["re_death"].mean == pytest.approx(2 / 3)
    assert "12 revivals, 20.0 per 1000 steps; of 9 with a known fate 33 % lived" in text(full)
    effects = by_first(table(full, "cmp-effect-of-revival"), "on", "off", "quantity")
    key = ("revived, L0 8", "multiscale default, L0 8", "dead latents at the end ↓")
    assert effects[key]["difference"].startswith("no difference shown")


def test_what_was_not_measured_is_listed_with_its_reason(full):
    rows = [tuple(cells) for cells in table(full, "not-measured").rows]
    assert ("cmp", "sparse_probing of all", "skipped", "no labels & data") in rows
    assert ("eval", "sparse_probing of alpha", "failed", "the probe <diverged>") in rows
    assert ("cmp", "revived_l0-8_seed1 at its target L0", "missed",
            "L0 9.5 where 8 was asked for") in rows  # fmt: skip
    assert any(row[1] == "heldout/loss_recovered of revived_l0-8_seed3" for row in rows)


def test_every_metric_is_defined(full):
    defined = {row[0] for row in table(full, "definitions").rows}
    measured = {
        value
        for found in full.files_only
        for value in (dict(zip((c.key for c in found.columns), r, strict=True))["metric"]
                      for r in found.rows)
    }  # fmt: skip
    assert measured == defined
    assert "core/ce_loss_score" in defined


def test_features_and_contexts_are_there(full):
    assert table(full, "cmp-decoders").rows
    assert table(full, "cmp-clusters").rows
    bins = by_first(table(full, "cmp-coactivation-table"), "method", "cosine")
    assert sum(v["pairs"] for k, v in bins.items() if k[0] == "revived") > 0
    names = {figure.name for figure in full.figures()}
    for drawn in ("firing-density", "firing-by-scale", "max-cosines", "coactivation"):
        assert f"cmp-{drawn}" in names
    assert "latent 7, fires on 1.00% of the tokens" in text(full)


def test_every_figure_has_words_for_those_who_do_not_see_it(full):
    for figure in full.figures():
        assert figure.png.startswith(b"\x89PNG")
        assert figure.caption
        assert len(figure.alt) > 20, figure.name
        width, height = figure.size
        if figure.is_wide:
            continue
        assert 900 <= width <= 1000
        assert height > 300


def test_two_reports_of_the_same_data_are_the_same_bytes(tmp_path):
    folders = [
        write_comparison(tmp_path / "cmp", ground_truth()),
        write_evaluation(tmp_path / "eval"),
    ]
    first = report(folders, tmp_path / "one")
    second = report(folders, tmp_path / "deep/two")
    again = report(folders, tmp_path / "one")  # replaces the first
    files = {path.relative_to(first.output) for path in first.output.rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(second.output) for path in second.output.rglob("*") if path.is_file()
    }
    for path in files:
        assert (first.output / path).read_bytes() == (second.output / path).read_bytes(), path
    assert first == again
    assert {"report.html", "report.md", "report.json"} <= {str(path) for path in files}
    assert len(first.tables) == len(set(first.tables)) > 5
    assert all(path.is_file() for path in [*first.tables, *first.figures, first.page])
    assert json.loads((first.output / "report.json").read_text())["sources"] == ["cmp", "eval"]
    check_files(first.output)


def check_files(output: Path) -> None:
    names = {path.name for path in output.rglob("*")}
    assert all(c.isalnum() or c in "-." for name in names for c in name)
    rows = read_csv(output / "tables/ground-truth-headline.csv")
    assert rows[1]["method"] == "multiscale default"
    assert float(rows[1]["ground_truth/f1"]) == 0.8
    assert rows[1]["ground_truth/f1 std"] == ""
    assert rows[1]["ground_truth/f1 n"] == "1"
    written = (output / "report.md").read_text()
    assert "| multiscale default | 5 | 1 | 5 | 0.8000 |" in written
    for path in (output / "figures").iterdir():
        assert f"(figures/{path.name})" in written


def read_csv(path: Path) -> list[Mapping[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_saes_that_failed_to_learn_come_first_and_healthy_ones_say_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    assert "Read this first" not in "".join(s.title for s in build(read_sources([run]))[0].sections)
    record = json.loads((run / "run.json").read_text())
    finding = {"kind": "mostly_dead", "message": "90% are dead", "setting": "training.lr"}
    record["saes"]["batchtopk"]["health"] = [finding]
    (run / "run.json").write_text(json.dumps(record))
    contents = comparison()
    contents["rows"][0]["health"] = [finding]
    sources = read_sources([run, write_comparison(tmp_path / "cmp", contents)])
    document, _ = build(sources)
    name = contents["rows"][0]["name"]
    rows = [tuple(cells) for cells in table(document, "health").rows]
    assert rows == [
        ("batchtopk", "run", "90% are dead", "training.lr"),
        (name, "cmp", "90% are dead", "training.lr"),
    ]
    assert [section.name for section in document.sections[:2]] == ["answer", "health-section"]
    told = " ".join(document.answers()[0].sentences)
    assert "Failed to learn, see the warnings: 1 of 6 SAEs of batchtopk." in told


def test_a_run_alone_says_what_it_did_not_measure(tmp_path):
    document, count = build(read_sources([write_run(tmp_path / "run", status="interrupted")]))
    rows = [tuple(cells) for cells in table(document, "not-measured").rows]
    assert ("run", "the whole run", "interrupted", "the run did not reach its end") in rows
    assert any(cells[1] == "held-out metrics" for cells in rows)
    assert count == len(rows)
    runs = by_first(table(document, "training-runs"), "name")
    assert runs["multiscale",]["l0_exported"] == 8.1
    assert "No data was given for: revival, sample features." in text(document)


def test_an_sae_without_training_and_a_number_that_is_none_are_named(tmp_path):
    rows = [
        row("a", 8.0, 1, training_steps=0),
        row("b", 8.0, 1, metrics={"heldout/l0": float("nan")}, reason="diverged"),
        row("c", 8.0, 1, metrics={"heldout/l0": 8.0, "heldout/explained_variance": None}),
    ]
    sources = read_sources([write_comparison(tmp_path, comparison(rows=rows, not_measured=[]))])
    document, _ = build(sources)
    missing = [tuple(cells)[1:] for cells in table(document, "not-measured").rows]
    assert missing == [
        ("a_l0-8_seed1", "never trained", "0 training steps: its numbers are of noise"),
        ("b_l0-8_seed1", "not measured", "diverged"),
        ("heldout/explained_variance of c_l0-8_seed1", "not measured",
         "no finite value recorded"),
    ]  # fmt: skip
    shown = [cells for cells in table(document, "language-model-headline").shown()]
    assert [cells[0] for cells in shown] == ["a", "c"]
    assert "not measured" in shown[1]


def test_the_page_links_to_the_latent_browser_of_a_run(tmp_path):
    run = write_run(tmp_path / "the runs" / "run")
    chunks = run / "latents" / "chunks"
    chunks.mkdir(parents=True)
    (run / "latents" / "index.html").write_text("")
    without = report([run], tmp_path / "without").page.read_text()
    assert "Every latent" not in without
    (chunks / "catalogue.js").write_text("")
    made = report([run], run / "report")
    assert '<a href="../latents/index.html">Every latent of run</a>' in made.page.read_text()
    assert "(../latents/index.html)" in (made.output / "report.md").read_text()
    elsewhere = report([run], tmp_path / "elsewhere").page.read_text()
    assert '<a href="../the%20runs/run/latents/index.html">' in elsewhere
