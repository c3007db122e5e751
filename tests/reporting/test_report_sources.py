from __future__ import annotations

import json

import pytest
import torch
from report_inputs import (
    comparison,
    ground_truth,
    row,
    write_comparison,
    write_evaluation,
    write_run,
    write_sae,
)
from safetensors.torch import save_file

from msae_plugin.common.errors import InputError
from msae_plugin.reporting.report import build, report
from msae_plugin.reporting.rows import results_of
from msae_plugin.reporting.sources import read_sources, trained_saes
from msae_plugin.saes.run_record import read_rows


def refused(folders, match):
    with pytest.raises(InputError, match=match) as caught:
        read_sources(folders)
    assert len(str(caught.value).splitlines()) == 1


def test_every_kind_is_recognised_and_one_folder_may_hold_several(tmp_path):
    folder = write_comparison(tmp_path / "all", comparison())
    write_evaluation(folder)
    write_run(folder)
    found = read_sources([folder, tmp_path / "all/../all"])
    assert [len(part) for part in (found.comparisons, found.evaluations, found.runs)] == [1, 1, 1]
    assert {source.label for source in found.all} == {"all"}


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    folders = [write_evaluation(tmp_path / name / "eval") for name in ("one", "two")]
    other = write_evaluation(tmp_path / "third")
    labels = [source.label for source in read_sources([*folders, other]).evaluations]
    assert labels == ["one/eval", "two/eval", "third"]


def test_what_is_no_source_is_refused_in_one_line(tmp_path):
    refused([], "give at least one folder")
    refused([tmp_path / "none"], "is not a folder")
    refused([tmp_path], r"holds none of comparison\.json, summary\.json, run\.json")
    (tmp_path / "summary.json").write_text('{"format": 1, ')
    refused([tmp_path], "cannot be read")
    (tmp_path / "summary.json").write_text("[]")
    refused([tmp_path], "does not hold a JSON object")
    (tmp_path / "summary.json").write_text('{"format": 1, "saes": {}}')
    refused([tmp_path], "it has no 'results'")
    (tmp_path / "summary.json").unlink()
    (tmp_path / "run.json").write_text("{}")
    refused([tmp_path], "is no record of msae train")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2}, r"is of format 2 and this version reads 1"),
        ({"format": None}, r"is of format None"),
        ({"kind": "images"}, "kind must be one of language_model, ground_truth; got 'images'"),
        ({"rows": {}}, "'rows' must be a list"),
        ({"rows": [{"name": "a", "metrics": {}}]}, r"'rows\[0\]' has no 'method'"),
        ({"rows": [3]}, r"'rows\[0\]' must be a mapping"),
        ({"rows": [row("a", 1.0, 1, metrics=[])]}, r"'rows\[0\]\.metrics' must be a mapping"),
    ],
)
def test_a_comparison_of_another_shape_is_refused(tmp_path, changes, match):
    refused([write_comparison(tmp_path, comparison(**changes))], match)


def test_a_last_line_cut_by_a_kill_is_left_out_and_any_other_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_rows(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 1}\n')
    with pytest.raises(InputError, match="line 1, cannot be read"):
        read_rows(path)
    path.write_text("3\n")
    with pytest.raises(InputError, match="line 1, does not hold a JSON object"):
        read_rows(path)
    assert read_rows(tmp_path / "none") == []


def test_two_rows_that_cannot_be_told_apart_are_refused(tmp_path):
    rows = [row("a", 8.0, 1), {**row("a", 8.0, 1), "name": "again"}]
    sources = read_sources([write_comparison(tmp_path, comparison(rows=rows))])
    with pytest.raises(InputError, match="'a_l0-8_seed1' and 'again' may be the same method"):
        build(sources)


def test_rows_of_several_rates_and_hooks_are_kept_apart(tmp_path):
    rows = [row("a", 8.0, 1, lr=0.1), row("a", 8.0, 1, lr=0.2), row("a", 8.0, 1, hook="other")]
    sources = read_sources([write_comparison(tmp_path, comparison(rows=rows))])
    first, second = results_of(sources, [])
    assert [group.method for group in first.groups] == ["a (lr 0.1)", "a (lr 0.2)"]
    assert (second.title, len(second.saes)) == ("Language model (other)", 1)
    assert len(first.missing) == 1
    assert not second.missing


def test_weights_that_cannot_be_read_are_named(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "batchtopk/sae/sae_weights.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"batchtopk.*holds no decoder that can be read"):
        build(read_sources([folder]))
    save_file({"W_enc": torch.ones(2)}, folder / "batchtopk/sae/x.safetensors")
    (folder / "batchtopk/sae/x.safetensors").rename(
        folder / "batchtopk/sae/sae_weights.safetensors"
    )
    with pytest.raises(InputError, match="W_dec"):
        build(read_sources([folder]))


def test_an_event_without_its_fields_is_named(tmp_path):
    write_sae(tmp_path / "cmp/a", revived=[{"event": "revival", "step": 3}])
    rows = [row("a", 8.0, 1, folder="a")]
    sources = read_sources([write_comparison(tmp_path / "cmp", comparison(rows=rows))])
    with pytest.raises(InputError, match=r"revivals\.jsonl lacks 'latent'"):
        build(sources)


def test_saes_of_several_training_seeds_are_told_by_their_weights(tmp_path):
    runs = []
    for seed in (1, 2):
        run = write_run(tmp_path / f"run{seed}")
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**record, "seed": seed}))
        for name in ("multiscale", "batchtopk"):  # other weights than those of the other seed
            path = run / name / "sae/sae_weights.safetensors"
            save_file({"W_dec": torch.full((4, 3), float(seed))}, path)
        runs.append(run)
    trained = trained_saes(read_sources(runs))
    hashes = {sae.name.replace("/", "-"): next(iter(sae.weight_hashes())) for sae in trained}
    # Both SAEs of a run have the same weights here: keep one.
    hashes = {name: digest for name, digest in hashes.items() if "batchtopk" in name}
    evaluation = write_evaluation(tmp_path / "eval", hashes)
    sources = read_sources([*runs, evaluation])
    (results,) = results_of(sources, trained_saes(sources))
    assert results.seeds_are == "training seeds"
    assert set(zip(*(results.saes[f] for f in ("method", "seed", "l0_target")), strict=True)) == {
        ("batchtopk", 1, 8.0),
        ("batchtopk", 2, 8.0),
    }
    # The mean over evaluation seeds of each.
    scores = results.frame[results.frame.metric == "core/ce_loss_score"].value.tolist()
    assert scores == pytest.approx([0.91, 0.92])


def test_an_evaluation_alone_has_evaluation_seeds(tmp_path):
    (results,) = results_of(read_sources([write_evaluation(tmp_path)]), [])
    assert results.seeds_are == "evaluation seeds"
    assert list(zip(results.saes.method, results.saes.seed, strict=True)) == [
        ("alpha", 0), ("alpha", 1), ("beta", 0), ("beta", 1),
    ]  # fmt: skip


def test_the_output_is_never_somebody_elses(tmp_path):
    source = write_comparison(tmp_path / "cmp", ground_truth())
    with pytest.raises(InputError, match="the report's own data"):
        report([source], source)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no report"):
        report([source], full)
    with pytest.raises(InputError, match="is a file"):
        report([source], full / "thesis.txt")
    (full / "report.json").write_text('{"page": "report.html"}')
    with pytest.raises(InputError, match=r"holds 'thesis\.txt' beside a report"):
        report([source], full)
    assert (full / "thesis.txt").read_text() == "mine"
