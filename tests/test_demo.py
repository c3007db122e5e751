from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console
from sae_lens import SAE
from typer.testing import CliRunner

from msae_cli.app import app
from msae_plugin.common.errors import InputError
from msae_plugin.common.progress import warnings_alone
from msae_plugin.comparison import group_training
from msae_plugin.data.text import load_text
from msae_plugin.demo import demo_for_terminal, demo_recipe, run_demo
from msae_plugin.evaluation.heldout import evaluate_many
from msae_plugin.models.loading import load_language_model
from msae_plugin.reporting.report import build
from msae_plugin.reporting.sources import read_sources

HOOK = "blocks.1.hook_resid_post"
SAES = {"multiscale": "multiscale_l0-8_seed42", "batchtopk": "batchtopk_l0-8_seed42"}
SMALL = [
    "training.batch_size_tokens=256", "data.context_size=32", "training.lr=1e-2",
    "training.n_batches_in_buffer=64", "model.autocast=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_model_dir, tiny_texts) -> dict[str, object]:
    path = tmp_path_factory.mktemp("corpus") / "notes.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in tiny_texts))
    return {
        "model": str(tiny_model_dir), "text": str(path), "hook": HOOK, "tokens": 12_800,
        "d_sae": 128, "k": 8.0, "heldout_tokens": 1_600, "loss_tokens": 320,
    }  # fmt: skip


@pytest.fixture(scope="module")
def recipe(options):
    # Texts of sae-probes are longer than the tiny model's context.
    core = json.dumps({"dataset": options["text"], "context_size": 32})
    return demo_recipe(options, [*SMALL, f'evaluation.evaluations={{"core": {core}}}'])


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    pytest.importorskip("sae_bench")
    output = tmp_path_factory.mktemp("demo") / "out"
    return run_demo(recipe, output, warnings_alone)


def test_it_leaves_a_page_a_short_page_the_numbers_and_both_saes(finished):
    assert finished.complete
    assert finished.page.page.is_file()
    rows = json.loads((finished.output / "comparison.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(SAES)
    for row in rows:
        assert SAE.load_from_disk(finished.output / row["folder"] / "sae").cfg.d_sae == 128
        assert row["metrics"]["heldout/l0"] == pytest.approx(8, rel=0.2)
        assert row["metrics"]["heldout/explained_variance"] > 0.2
        assert row["metrics"]["training/step_ms"] > 0
    assert (finished.output / "saes" / SAES["multiscale"] / "jumprelu").is_dir()
    page = (finished.output / "demo.md").read_text()
    lines = [line for line in page.splitlines() if line]
    assert lines[2] == "## The answer"
    assert lines[3].startswith("One seed decides nothing. Ahead in this run: ")
    assert "1 training seed" in lines[4]
    assert "| multiscale | 8 | 1 |" in page
    assert "(report/figures/language-model-glance.png)" in page
    assert (finished.output / "report/figures/language-model-glance.png").is_file()
    assert page.count("fires on") == 20  # ten latents of either
    assert "Where things are" in page


def test_its_page_holds_saebenchs_own_core(finished):
    stored = json.loads((finished.output / "evaluation" / "summary.json").read_text())
    document, _ = build(read_sources([finished.output]))
    (table,) = [t for t in document.tables() if t.name == "language-model-headline"]
    column = [c.key for c in table.columns].index("core/ce_loss_score")
    for entry, row in zip(stored["results"], table.rows, strict=True):
        theirs = json.loads((finished.output / "evaluation" / entry["files"][0]).read_text())
        score = theirs["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"]
        assert row[column].mean == pytest.approx(score)


def test_the_numbers_are_what_the_exported_saes_measure(finished, recipe, options):
    language_model = load_language_model(str(options["model"]), [HOOK])
    folder = finished.output / "saes"
    again = evaluate_many(
        {method: SAE.load_from_disk(folder / name / "sae") for method, name in SAES.items()},
        language_model, HOOK, load_text(str(options["text"])).heldout,
        context_size=32, max_tokens=1_600, max_loss_tokens=320,
    )  # fmt: skip
    for row in json.loads((finished.output / "comparison.json").read_text())["rows"]:
        measured, found = row["metrics"], again[row["method"]].to_dict()
        for key in ("explained_variance", "l0", "dead_latents", "loss_recovered"):
            assert measured[f"heldout/{key}"] == pytest.approx(found[key], rel=1e-5), key


def test_the_terminal_gets_the_answer_the_table_and_the_contexts(finished):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(demo_for_terminal(finished))
    shown = capture.get()
    assert shown.index("what another seed would give") < shown.index("expl.var")
    assert shown.count("fires on") == 10
    assert str(finished.output / "demo.md") in shown.replace("\n", "")
    assert "core" in shown


def test_contexts_are_from_the_held_out_documents(finished, options):
    heldout = load_text(str(options["text"])).heldout
    contexts = finished.output / "saes" / SAES["multiscale"] / "contexts.json"
    latents = json.loads(contexts.read_text())["latents"]
    assert len(latents) == 10
    for context in (context for latent in latents for context in latent["contexts"]):
        sentence = context["before"] + context["token"] + context["after"]
        assert sentence in heldout[context["document"]]


def test_a_finished_folder_is_kept_and_never_mixed_with_other_settings(finished, recipe, options):
    weights = finished.output / "saes" / SAES["multiscale"] / "sae" / "sae_weights.safetensors"
    before = weights.stat().st_mtime_ns
    rows = json.loads((finished.output / "comparison.json").read_text())["rows"]
    run_demo(recipe, finished.output, warnings_alone)
    assert weights.stat().st_mtime_ns == before
    assert json.loads((finished.output / "comparison.json").read_text())["rows"] == rows
    with pytest.raises(InputError, match="other settings"):
        run_demo(demo_recipe({**options, "k": 9.0}, SMALL), finished.output, warnings_alone)


def test_the_command_refuses_bad_input_with_status_2(tmp_path, options):
    (tmp_path / "mine.txt").write_text("keep me")
    arguments = ["--model", options["model"], "--text", options["text"], "--hook", HOOK]
    outcome = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), *arguments])
    assert outcome.exit_code == 2
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    command = ["demo", "--output", str(tmp_path / "new"), *arguments, "--tokens", "10"]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 2
    assert not (tmp_path / "new" / "saes").exists()


def test_a_stopped_demo_continues_with_the_same_command(tmp_path: Path, options, monkeypatch):
    output = tmp_path / "out"
    command = ["demo", "--output", str(output), "--model", options["model"], "--hook", HOOK]
    command += ["--text", options["text"], "--tokens", "20480", "--d-sae", "96", "--k", "8"]
    command += ["--heldout-tokens", "1600", "--loss-tokens", "320", "--no-saebench"]
    command += [word for change in SMALL for word in ("--set", change)]
    with monkeypatch.context() as patch:
        finish = group_training.train_group

        def stop_at_the_start(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return finish(*args, **kwargs)

        patch.setattr("msae_plugin.comparison.training_schedule.train_group", stop_at_the_start)
        assert CliRunner().invoke(app, command).exit_code == 128 + signal.SIGTERM
    assert not (output / "comparison.json").exists()
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    assert "expl.var" in outcome.stdout
    assert (output / "demo.md").exists()
