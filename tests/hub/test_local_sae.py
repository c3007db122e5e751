"""What must not be published is refused before the Hub is asked anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from safetensors.torch import load_file, save_file

import msae_plugin
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import file_sha256
from msae_plugin.hub.card_data import measured_of, read_evaluation
from msae_plugin.hub.plan import build_folder, default_path, private_content
from msae_plugin.saes.find import find_saes


def export(folder: Path, **metadata) -> Path:
    """An export as SAELens writes it."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=16))
    recorded = {
        "model_name": "google/gemma-2-2b",
        "hook_name": "blocks.12.hook_resid_post",
        "training_steps": 5,
        "seed": 3,
        "l0": 4.4,
        **metadata,
    }
    for name, value in recorded.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(folder)
    return folder


def change_weights(folder: Path, **changed: torch.Tensor) -> None:
    weights = load_file(folder / "sae_weights.safetensors")
    save_file({**weights, **changed}, folder / "sae_weights.safetensors")


def refusal(run: Path) -> str:
    with pytest.raises(InputError) as error:
        find_saes(run)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_export_is_found_and_named(tmp_path):
    (sae,) = find_saes(export(tmp_path / "x"))
    assert default_path(sae) == "gemma-2-2b/blocks.12.hook_resid_post/16_l0-4_seed3"
    assert sae.weights_sha256 == file_sha256(tmp_path / "x" / "sae_weights.safetensors")
    assert sae.jumprelu_export is None
    (bare,) = find_saes(export(tmp_path / "y", seed=None, l0=None, model_name="/a b/my model"))
    assert default_path(bare) == "my-model/blocks.12.hook_resid_post/16"


def test_an_untrained_sae(tmp_path):
    assert "never trained (0 steps)" in refusal(export(tmp_path / "x", training_steps=0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(tmp_path, bad):
    folder = export(tmp_path / "x")
    change_weights(folder, b_enc=torch.full((16,), bad))
    assert "b_enc holds NaN or infinite values" in refusal(folder)


def test_a_latent_that_is_switched_off_is_no_fault(tmp_path):
    folder = export(tmp_path / "x")
    change_weights(folder, threshold=torch.full((16,), torch.inf))
    assert find_saes(folder)
    change_weights(folder, threshold=torch.full((16,), torch.nan))
    assert "threshold" in refusal(folder)


def test_a_training_checkpoint(tmp_path, run):
    StandardTrainingSAE(StandardTrainingSAEConfig(d_in=8, d_sae=16)).save_model(tmp_path / "x")
    assert "is a training checkpoint" in refusal(tmp_path / "x")
    # The same by its trainer's state, as `msae train` leaves it.
    folder = export(tmp_path / "y")
    (folder / "trainer_state.pt").write_bytes(b"")
    assert "is a training checkpoint" in refusal(folder)


def test_weights_that_were_cut_off(tmp_path):
    folder = export(tmp_path / "x")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "no complete safetensors file" in refusal(folder)


def test_a_run_that_has_not_exported_everything(run):
    assert [sae.name for sae in find_saes(run)] == ["multiscale", "batchtopk"]
    (run / "batchtopk" / "export.json").unlink()
    message = refusal(run)
    assert "has not exported batchtopk" in message
    assert "--resume auto" in message
    assert "was not finished" in refusal(run / "batchtopk")
    (only,) = find_saes(run / "multiscale")
    assert only.jumprelu_export == run / "multiscale" / "jumprelu"


def test_a_folder_without_any_sae(tmp_path):
    assert "holds no exported SAE" in refusal(tmp_path)
    assert "is not a folder" in refusal(tmp_path / "nowhere")


def test_the_export_folder_of_a_run_is_the_same_sae(run):
    (by_folder,) = find_saes(run / "multiscale")
    (by_export,) = find_saes(run / "multiscale" / "sae")
    assert by_export == by_folder


def test_an_evaluation_of_other_weights(run, evaluate):
    folder = evaluate(run / "multiscale" / "sae")
    (sae,) = find_saes(run / "batchtopk")
    with pytest.raises(InputError, match="is of other weights") as error:
        measured_of(sae, read_evaluation(folder), folder, "ada/x:y")
    assert sae.weights_sha256[:12] in str(error.value)
    # One weight later, nothing measured before counts any more.
    (sae,) = find_saes(run / "multiscale")
    assert measured_of(sae, read_evaluation(folder), folder, "ada/x:y").summary["results"]
    copied = Path(shutil.copytree(run / "multiscale" / "sae", run.parent / "copied"))
    weights = load_file(copied / "sae_weights.safetensors")
    change_weights(copied, b_dec=weights["b_dec"] + 1e-6)
    (changed,) = find_saes(copied)
    with pytest.raises(InputError, match="is of other weights"):
        measured_of(changed, read_evaluation(folder), folder, "ada/x:y")


def test_an_evaluation_of_the_jumprelu_copy_is_one_of_the_sae(run, evaluate):
    jumprelu = run / "multiscale" / "jumprelu"
    folder = evaluate(jumprelu)
    (sae,) = find_saes(run / "multiscale")
    measured = measured_of(sae, read_evaluation(folder), folder, "ada/x:y")
    assert measured.summary["saes"]["multiscale"]["reference"] == "ada/x:y/jumprelu"


def test_an_evaluation_that_lacks_a_file(run, evaluate):
    folder = evaluate(run / "multiscale" / "sae")
    summary = read_evaluation(folder)
    (sae,) = find_saes(run / "multiscale")
    summary["results"][0]["files"] = ["../secret.json"]
    with pytest.raises(InputError, match="outside of it"):
        measured_of(sae, summary, folder, "ada/x:y")
    summary["results"][0]["files"] = ["core/seed_1/gone.json"]
    with pytest.raises(InputError, match="which is missing"):
        measured_of(sae, summary, folder, "ada/x:y")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 2, "saes": {}}'])
def test_what_is_no_evaluation(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InputError, match="summary"):
        read_evaluation(tmp_path)


def test_files_published_as_they_are_are_searched_for_local_paths(run):
    sae = run / "multiscale"
    (found,) = find_saes(sae)
    assert private_content(build_folder("a/b", found, None)) == []
    (sae / "metrics.jsonl").write_text(json.dumps({"note": "see /home/jane/notes"}))
    assert private_content(build_folder("a/b", found, None)) == [
        "a/b/metrics.jsonl names /home/jane/notes"
    ]


def test_a_folder_in_the_repository_can_be_named(run, tmp_path):
    made = msae_plugin.publish(
        run / "batchtopk", "ada/x", dry_run=True, output=tmp_path / "out", folder="mine/here"
    )
    assert made.details.folders == ("mine/here",)
