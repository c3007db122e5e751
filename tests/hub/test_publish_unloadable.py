"""What nobody could load, or is no file of the run, never reaches the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_process import REPO, refused
from safetensors.torch import load_file, save_file

from msae_plugin.common.errors import InputError
from msae_plugin.hub.plan import PublishOptions, build_folders
from msae_plugin.hub.verification import check_build

WEIGHTS = "sae_weights.safetensors"


def damage(export: Path, how: str) -> None:
    weights, config = load_file(export / WEIGHTS), json.loads((export / "cfg.json").read_text())
    if how == "no W_dec":
        del weights["W_dec"]
    elif how == "transposed":
        weights["W_enc"] = weights["W_enc"].T.contiguous()
    elif how == "another decoder":
        weights["W_dec"] = weights["W_dec"].flip(0).contiguous()
    elif how == "silent":
        weights["threshold"] = weights["threshold"] + 1e30
    else:
        config |= json.loads(how)
    save_file(weights, export / WEIGHTS)
    (export / "cfg.json").write_text(json.dumps(config))
    # As if it had been exported so: its record has no hash to find it by.
    record = json.loads((export.parent / "export.json").read_text())
    (export.parent / "export.json").write_text(json.dumps({**record, "weights_sha256": {}}))


def check(run: Path) -> None:
    for folder in build_folders(run, REPO, PublishOptions()):
        check_build(folder)


def refusal(run: Path) -> str:
    with pytest.raises(InputError) as error:
        check(run)
    assert "\n" not in str(error.value)
    assert "Error:" not in str(error.value), "a library's own words"
    return str(error.value)


@pytest.mark.promise(
    "Nothing that cannot be loaded gets published, and no file from outside of the run."
)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no W_dec", "W_dec"),
        ("transposed", "W_enc"),
        ("silent", "no latent is on"),
        ('{"architecture": "evil"}', "knows no architecture 'evil'"),
        ('{"d_sae": 1000000000}', "1,000,000,000 latents"),
        ('{"d_sae": "many"}', "d_sae is 'many', which is no width"),
        ('{"dtype": "banana"}', "dtype is 'banana'"),
        ('{"d_sae": 95}', "must belong together"),
        ('{"metadata": ["x"]}', "'metadata' must be a mapping"),
    ],
)
def test_an_export_that_cannot_be_loaded_is_refused(run, how, words):
    damage(run / "batchtopk" / "sae", how)
    assert words in refusal(run / "batchtopk")


@pytest.mark.promise(
    "Nothing that cannot be loaded gets published, and no file from outside of the run."
)
@pytest.mark.parametrize(
    ("how", "words"), [("no W_dec", "W_dec"), ("another decoder", "computes something else")]
)
def test_a_jumprelu_copy_that_is_another_sae_is_refused(run, how, words):
    damage(run / "multiscale" / "jumprelu", how)
    assert words in refusal(run / "multiscale")


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_hub_is_not_asked(hub, worker, run, dry_run):
    damage(run / "multiscale" / "sae", "no W_dec")
    outcome = worker.run("publish", run=run / "multiscale", repo=REPO, dry_run=dry_run)
    refused(outcome, "InputError", "W_dec", "nothing was published")
    assert hub.repos == {}


@pytest.mark.promise(
    "Nothing that cannot be loaded gets published, and no file from outside of the run."
)
@pytest.mark.parametrize(
    "name",
    [
        "sae/cfg.json",
        "sae/sae_weights.safetensors",
        "sae/runner_cfg.json",
        "jumprelu/cfg.json",
        "export.json",
        "metrics.jsonl",
        "notes.png",
        "figures/notes.png",
        "sae",
        "jumprelu",
        ".",
    ],
)
def test_a_link_that_leads_out_of_the_run_is_refused(run, tmp_path, name):
    link = run / "multiscale" / name
    elsewhere = tmp_path / "elsewhere"
    if link.exists():
        link.rename(elsewhere)
    else:
        link.parent.mkdir(exist_ok=True)
        elsewhere.write_text("anything of this machine")
    (run / "multiscale" if name == "." else link).symlink_to(elsewhere)
    message = refusal(run)
    assert "leads out of" in message
    assert str(elsewhere) in message


def test_a_link_inside_the_run_is_followed(run):
    weights = run / "batchtopk" / "sae" / WEIGHTS
    weights.rename(run / "batchtopk" / "weights")
    weights.symlink_to("../weights")
    check(run / "batchtopk")
    (run.parent / "link").symlink_to(run)  # the user's own word for the run
    check(run.parent / "link" / "batchtopk")


@pytest.mark.parametrize("name", ["summary.json", "core/seed_42/batchtopk_eval_results.json"])
def test_a_link_that_leads_out_of_an_evaluation_is_refused(run, evaluate, tmp_path, name):
    evaluation = evaluate(run / "batchtopk" / "sae")
    (evaluation / name).rename(tmp_path / "elsewhere")
    (evaluation / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of"):
        build_folders(run / "batchtopk", REPO, PublishOptions(evaluation=evaluation))
