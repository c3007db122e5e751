from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from typer.testing import CliRunner

import msae_plugin
from msae_cli.app import app
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import human_bytes
from msae_plugin.reporting.info import describe_config, describe_folder
from msae_plugin.saes.export import export_sae
from msae_plugin.saes.find import mechanisms_on, read_folder

SIZES = {"d_in": 8, "d_sae": 20}


def shown(renderable) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.fixture
def sae() -> msae_plugin.MultiScaleTrainingSAE:
    torch.manual_seed(0)
    cfg = msae_plugin.preset("nested", **SIZES, k=3, training_steps=10)
    cfg.metadata.training_steps = 10
    cfg.metadata.model_name = "tiny/model"
    cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    return msae_plugin.MultiScaleTrainingSAE(cfg)


@pytest.fixture
def exported(sae, tmp_path) -> Path:
    export_sae(sae, tmp_path, torch.randn(64, 8), None, {})
    return tmp_path


def test_an_export_its_jumprelu_copy_and_a_training_checkpoint_are_told_apart(sae, exported):
    sae.save_model(exported / "training")
    found = {
        name: read_folder(exported / name)[1][name] for name in ("sae", "jumprelu", "training")
    }
    assert [info.kind for info in found.values()] == [
        "export",
        "jumprelu copy",
        "training checkpoint",
    ]
    assert [info.architecture for info in found.values()] == [
        "multiscale",
        "jumprelu",
        "multiscale",
    ]
    # W_enc, W_dec, b_enc, b_dec, threshold.
    assert found["jumprelu"].parameters == 2 * 8 * 20 + 20 + 8 + 20
    assert found["jumprelu"].weight_bytes == 4 * found["jumprelu"].parameters
    stored = json.loads((exported / "export.json").read_text())
    assert found["sae"].l0 == stored["l0_exported"]
    assert found["training"].l0 is None


def test_the_description_of_an_export_says_what_it_is(exported):
    text = shown(describe_folder(exported / "sae"))
    for expected in (
        "sae: export",
        "multiscale",
        "d_in 8, d_sae 20, float32",
        "tiny/model",
        "blocks.1.hook_resid_post",
        "10 steps",
        "[S] sparsity_scales = 2",
        "[S] prefix_fractions = 0.25, 0.5",
        "active latents per token, measured at export",
        "jumprelu copy  yes",
    ):
        assert expected in text


def test_a_checkpoint_of_saelens_and_one_never_trained_are_described_honestly(tmp_path):
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SIZES, k=3))
    sae.cfg.metadata.training_steps = 0
    sae.save_inference_model(tmp_path)
    text = shown(describe_folder(tmp_path))
    assert "jumprelu (trained as batchtopk)" in text
    assert "NEVER TRAINED" in text
    assert "not recorded" in text
    assert "mechanisms" not in text


def test_only_what_is_on_is_listed():
    cfg = msae_plugin.preset("source-run-9", **SIZES, k=3, training_steps=10)
    listed = mechanisms_on(vars(cfg))
    assert any(line.startswith("[Z] selection = zscore") for line in listed)
    assert any(line.startswith("[O] orthogonality_coefficient") for line in listed)
    assert not any("revival" in line for line in listed)


def test_a_run_folder_lists_its_saes_and_those_missing(exported):
    record = {
        "status": "interrupted",
        "steps": 10,
        "tokens": 2560,
        "wall_seconds": 12.5,
        "seed": 4,
        "model": {"name": "tiny/model"},
        "saes": {"sae": {"folder": "."}, "other": {"folder": "other"}},
    }
    (exported / "run.json").write_text(json.dumps(record))
    assert list(read_folder(exported)[1]) == ["sae"]
    text = shown(describe_folder(exported))
    assert "run, interrupted" in text
    assert "10 steps, 2,560 tokens" in text
    assert "not exported  other" in text


def test_folders_without_an_sae_and_broken_files_are_refused_in_one_line(exported, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, reason in ((tmp_path / "none", "not a folder"), (tmp_path / "empty", "no SAE")):
        with pytest.raises(InputError, match=reason) as error:
            read_folder(folder)
        assert "\n" not in str(error.value)
    weights = exported / "sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="no complete safetensors file"):
        read_folder(exported / "sae")
    (exported / "sae" / "cfg.json").write_text("{")
    with pytest.raises(InputError, match=r"cfg\.json"):
        read_folder(exported / "sae")


@pytest.fixture
def recipe(tmp_path, tiny_model_dir) -> Path:
    path = tmp_path / "recipe.yaml"
    content = {
        "model": {"name": str(tiny_model_dir)},
        "hooks": ["blocks.1.hook_resid_post"],
        "sae": {"d_sae": 128, "k": 8},
        "training": {"tokens": 100_000},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_recipe_is_priced_without_training_it(recipe):
    text = shown(describe_config(recipe))
    for expected in ("98,304 tokens in 48 steps", "d_in 64, d_sae 128, k 8", "peak", "estimate"):
        assert expected in text
    assert "d_sae 256" in shown(describe_config(recipe, ["sae.d_sae=256"]))
    with pytest.raises(InputError):
        describe_config(recipe, ["sae.k=1000"])


def test_the_command(recipe, exported):
    run = CliRunner().invoke
    assert "sae: export" in run(app, ["info", str(exported / "sae")]).stdout
    assert "48 steps" in run(app, ["info", "--config", str(recipe)]).stdout
    assert run(app, ["info"]).exit_code == 2
    assert run(app, ["info", str(exported / "sae"), "--set", "a=1"]).exit_code == 2


@pytest.mark.parametrize("name", ["sae", "jumprelu"])
def test_damaged_weights_are_said(exported: Path, name: str) -> None:
    weights = exported / name / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-20] ^= 1
    weights.write_bytes(content)
    told = "".join(shown(describe_folder(exported)).split())
    assert f"{name}/sae_weights.safetensors'wasdamagedorchanged" in told


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")]
)
def test_sizes_are_readable(size, text):
    assert human_bytes(size) == text
