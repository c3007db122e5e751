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
from msae_plugin.common.progress import ConsoleProgress
from msae_plugin.data.text import load_text
from msae_plugin.demo import DemoSettings, demo_for_terminal, run_demo
from msae_plugin.evaluation.heldout import evaluate_many
from msae_plugin.models.loading import load_language_model

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tiny_texts) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "notes.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in tiny_texts))
    return path


@pytest.fixture(scope="module")
def settings(tiny_model_dir, corpus) -> DemoSettings:
    return DemoSettings(
        model=str(tiny_model_dir),
        text=str(corpus),
        hook=HOOK,
        tokens=12_800,
        d_sae=128,
        k=8,
        lr=1e-2,
        batch_size_tokens=256,
        context_size=32,
        heldout_tokens=1_600,
        loss_tokens=320,
        probes=(),  # texts of sae-probes are longer than the tiny model's context
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    console = Console(record=True, width=100, quiet=True)
    return run_demo(settings, output, console), output


def test_it_leaves_a_report_a_figure_the_numbers_and_both_saes(finished):
    result, output = finished
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((output / "demo.json").read_text())
    assert [row["name"] for row in numbers["comparison"]["saes"]] == ["multiscale", "batchtopk"]
    assert len(numbers["strongest_latents"]) == 10
    for row in result.rows:
        assert SAE.load_from_disk(output / row.name / "sae").cfg.d_sae == 128
        assert row.metrics.l0 == pytest.approx(8, rel=0.2)
        assert row.metrics.explained_variance > 0.2
        assert row.tokens_per_second is not None
        assert row.tokens_per_second > 0
    assert (output / "multiscale" / "jumprelu").is_dir()
    report = (output / "demo.md").read_text()
    assert "| multiscale |" in report
    assert "(demo.png)" in report
    assert report.count("fires on") == 10


def test_it_ends_with_saebenchs_own_core(finished):
    pytest.importorskip("sae_bench")
    result, output = finished
    assert result.saebench is not None
    stored = json.loads((output / "evaluation" / "summary.json").read_text())
    assert [entry["status"] for entry in stored["results"]] == ["measured", "measured"]
    for entry in stored["results"]:
        theirs = json.loads((output / "evaluation" / entry["files"][0]).read_text())
        score = theirs["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"]
        assert entry["metrics"]["ce_loss_score"]["mean"] == pytest.approx(score)
    report = (output / "demo.md").read_text()
    assert "## By SAEBench" in report
    assert "| L0 | expl. var. |" in report


def test_the_table_holds_what_the_exported_saes_measure(finished, settings):
    result, output = finished
    language_model = load_language_model(settings.model, [HOOK])
    saes = {row.name: SAE.load_from_disk(output / row.name / "sae") for row in result.rows}
    again = evaluate_many(
        saes,
        language_model,
        HOOK,
        load_text(settings.text).heldout,
        context_size=32,
        max_tokens=1_600,
        max_loss_tokens=320,
        autocast=json.loads((output / "demo.json").read_text())["settings"]["autocast"],
    )
    for row in result.rows:
        assert row.metrics.to_dict() == pytest.approx(again[row.name].to_dict(), rel=1e-5)


def test_the_terminal_gets_the_table_and_the_contexts(finished):
    result, output = finished
    console = Console(width=120)
    with console.capture() as capture:
        console.print(demo_for_terminal(result))
    shown = capture.get()
    assert "loss recovered" in shown
    assert shown.count("fires on") == 10
    assert str(output / "demo.png") in shown.replace("\n", "")


def test_contexts_are_from_the_held_out_documents(finished, settings):
    result, _ = finished
    heldout = load_text(settings.text).heldout
    for profile in result.profiles:
        assert profile.contexts
        for context in profile.contexts:
            sentence = context.before + context.token + context.after
            assert sentence in heldout[context.document]


def test_a_finished_folder_is_evaluated_again_but_never_with_other_settings(finished, settings):
    result, output = finished
    weights = output / "multiscale" / "sae" / "sae_weights.safetensors"
    before = weights.stat().st_mtime_ns
    console = Console(width=100)
    with console.capture() as capture:
        again = run_demo(settings, output, console)
    assert "evaluating it again" in capture.get()
    assert weights.stat().st_mtime_ns == before
    assert [row.to_dict() for row in again.rows] == [row.to_dict() for row in result.rows]
    changed = DemoSettings(**{**vars(settings), "k": 9})
    with pytest.raises(InputError, match="other settings"):
        run_demo(changed, output, Console(quiet=True))


def test_the_command_refuses_bad_input_with_status_2(tmp_path, settings):
    (tmp_path / "mine.txt").write_text("keep me")
    arguments = ["--model", settings.model, "--text", settings.text, "--hook", HOOK]
    outcome = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), *arguments])
    assert outcome.exit_code == 2
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    outcome = CliRunner().invoke(
        app, ["demo", "--output", str(tmp_path / "new"), *arguments, "--tokens", "10"]
    )
    assert outcome.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_a_stopped_demo_continues_with_the_same_command(tmp_path, settings, monkeypatch):
    output = tmp_path / "out"
    command = ["demo", "--output", str(output), "--model", settings.model, "--hook", HOOK]
    command += ["--text", settings.text, "--tokens", "20480", "--d-sae", "96", "--k", "8"]
    command += ["--heldout-tokens", "1600", "--loss-tokens", "320", "--no-saebench"]
    with monkeypatch.context() as patch:

        def stop_half_way(self: ConsoleProgress, done_tokens: int) -> None:
            if done_tokens >= 10_240:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(ConsoleProgress, "advance", stop_half_way)
        assert CliRunner().invoke(app, command).exit_code == 128 + signal.SIGTERM
    assert not (output / "demo.json").exists()
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0
    assert "explained" in outcome.stdout
    assert json.loads((output / "run.json").read_text())["resumed_at_steps"] == [20]
    assert (output / "demo.json").exists()
