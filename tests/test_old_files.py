"""What earlier versions left on the disk loads, resumes, is described, reported and published."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file
from typer.testing import CliRunner

import msae_plugin  # noqa: F401 - registers the architecture
from msae_cli import app as cli
from msae_plugin.common.errors import InputError
from msae_plugin.comparison.activations import activations_key
from msae_plugin.comparison.methods import expand
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.comparison.training_schedule import entry_keys, finished_record
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.runner import check_same_run

OLD = Path(__file__).parent / "fixtures" / "v0_1"
CHECKPOINTS = {"finished": "10240", "interrupted": "2560"}
# Fields of training configurations that later versions may drop.
DROPPED = {"decode_kernel", "cuda_graphs", "b_dec_init", "topk_threshold_lr"}


def msae(*words: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tiny_texts: list[str]
) -> Path:
    """A copy of the folders, beside the model and the text that their recipes name."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    (folder / "tiny-model").symlink_to(tiny_model_dir)
    lines = [json.dumps({"text": text}) + "\n" for text in tiny_texts]
    (folder / "notes.jsonl").write_text("".join(lines))
    monkeypatch.chdir(folder)
    return folder


def test_the_fixtures_hold_the_fields_that_may_be_dropped() -> None:
    for run, checkpoint in CHECKPOINTS.items():
        config = json.loads((OLD / run / "checkpoints" / checkpoint / "sae/cfg.json").read_text())
        assert config.keys() >= DROPPED
    recipe = json.loads((OLD / "explicit/run.json").read_text())["config"]
    assert recipe["sae"].keys() >= DROPPED


@pytest.mark.promise("Files of earlier versions still load, resume, report and get published.")
@pytest.mark.parametrize("run", ["finished", "explicit"])
def test_an_old_export_and_its_jumprelu_copy_give_the_same_latents(run: str) -> None:
    sae, jumprelu = (SAE.load_from_disk(OLD / run / name) for name in ("sae", "jumprelu"))
    x = load_file(OLD / "finished/check_activations.safetensors")["activations"]
    assert (sae.cfg.architecture(), jumprelu.cfg.architecture()) == ("multiscale", "jumprelu")
    latents = sae.encode(x)
    assert 1 < float((latents > 0).sum(-1).float().mean()) < 24
    torch.testing.assert_close(latents, jumprelu.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), jumprelu(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("run", "checkpoint"), CHECKPOINTS.items())
def test_an_old_checkpoint_loads_as_a_training_sae(run: str, checkpoint: str) -> None:
    folder = OLD / run / "checkpoints" / checkpoint / "sae"
    sae = TrainingSAE.load_from_disk(folder)
    assert sae.cfg.architecture() == "multiscale"
    stored = load_file(folder / "sae_weights.safetensors")
    torch.testing.assert_close(sae.W_dec.detach(), stored["W_dec"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("finished", "multiscale"),
        ("finished/sae", "multiscale"),
        ("finished/jumprelu", "jumprelu"),
        ("finished/checkpoints/10240", "multiscale"),
        ("explicit", "multiscale"),
        ("interrupted/checkpoints/2560", "multiscale"),
        ("comparison/saes/default_l0-3_seed0", "multiscale"),
        ("comparison/saes/batchtopk_l0-3_seed1", "jumprelu"),
    ],
)
def test_old_folders_are_described(folder: str, said: str) -> None:
    result = msae("info", OLD / folder)
    assert result.exit_code == 0, result.output
    assert said in result.output


@pytest.mark.promise("Files of earlier versions still load, resume, report and get published.")
def test_an_old_run_goes_on(old: Path) -> None:
    command = ("train", "-c", "interrupted.yaml", "-o", "interrupted", "--resume", "auto")
    result = msae(*command)
    assert result.exit_code == 0, result.output
    record = json.loads((old / "interrupted/run.json").read_text())
    assert (record["status"], record["resumed_at_steps"]) == ("complete", [20])
    rows = (old / "interrupted/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(5, 201, 5))
    start = load_file(OLD / "interrupted/checkpoints/2560/sae/sae_weights.safetensors")["W_dec"]
    end = SAE.load_from_disk(old / "interrupted/sae").W_dec
    assert end.isfinite().all()
    # 180 steps of at most about the learning rate, 1e-2, in each entry.
    assert 1e-2 < float((end - start).abs().max()) < 2.0


@pytest.mark.promise("Files of earlier versions still load, resume, report and get published.")
def test_an_old_run_goes_on_with_the_settings_that_it_began_with(old: Path) -> None:
    """The recipe names a preset, which annealed k and penalised cosines when the run began."""
    began = json.loads((OLD / "interrupted/checkpoints/2560/sae/cfg.json").read_text())
    result = msae("train", "-c", "interrupted.yaml", "-o", "interrupted", "--resume", "auto")
    assert result.exit_code == 0, result.output
    assert "k_anneal_steps 80 (now 0)" in " ".join(result.output.split())
    ended = json.loads((old / "interrupted/sae/cfg.json").read_text())
    details = ended["metadata"]["training_architecture_details"]
    shared = details.keys() & began.keys()
    assert {name: details[name] for name in shared} == {name: began[name] for name in shared}
    assert {"k_anneal_steps", "prefix_fractions", "orthogonality_coefficient"} <= shared
    # Neither was there when the run began.
    assert (details["input_normalization"], details["dense_share_limit"]) == ("none", 1.0)


def test_a_method_is_not_trained_with_two_meanings_of_its_preset(old: Path) -> None:
    command = ("compare", "-c", "comparison.yaml", "-o", "comparison", "--no-page")
    shutil.rmtree(old / "comparison/saes/default_l0-3_seed1")
    kept = (old / "comparison/comparison.json").read_bytes()
    result = msae(*command)
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert "'saes.default' would be trained with other settings" in said
    assert "k_anneal_steps 8 (now 0)" in said
    assert (old / "comparison/comparison.json").read_bytes() == kept
    # What BatchTopK stands for has not changed.
    shutil.rmtree(old / "comparison/saes/batchtopk_l0-3_seed1")
    result = msae(*command, "--set", "saes.default=null")
    assert result.exit_code == 0, result.output
    assert (old / "comparison/saes/batchtopk_l0-3_seed1/sae/cfg.json").is_file()


@pytest.mark.promise("Files of earlier versions still load, resume, report and get published.")
def test_an_old_comparison_is_taken_up(old: Path) -> None:
    before = json.loads((old / "comparison/comparison.json").read_text())["rows"]
    weights = "comparison/saes/default_l0-3_seed0/sae/sae_weights.safetensors"
    kept = (old / weights).read_bytes()
    result = msae("compare", "-c", "comparison.yaml", "-o", "comparison", "--no-page")
    assert result.exit_code == 0, result.output
    assert (old / weights).read_bytes() == kept
    after = json.loads((old / "comparison/comparison.json").read_text())["rows"]
    assert [row["name"] for row in after] == [row["name"] for row in before]
    for mine, theirs in zip(after, before, strict=True):
        assert mine["metrics"]["ground_truth/f1"] == theirs["metrics"]["ground_truth/f1"]


def test_saes_of_earlier_versions_are_recognised(tmp_path: Path) -> None:
    """Digests that commits ff7a867, before there was model.loader, and 9469956 gave.

    A setting that is added must not change them: see `_YOUNGER`.
    """
    hook = "blocks.1.hook_resid_post"
    values: dict[str, Any] = {
        "model": {"name": "tiny"},
        "data": {"source": "notes.jsonl"},
        "hooks": [hook],
        "common": {"d_sae": 96},
        "l0": [8],
        "saes": {"default": {"preset": "default"}},
    }
    keys = {}
    for loader in ("auto", "TransformerBridge"):
        config = CompareConfig.from_dict(values, [f"model.loader={loader}"])
        (entry,) = expand(config, {hook: 64}).entries
        keys[loader] = entry_keys(entry, config)
        if loader == "auto":
            assert activations_key(config) == "c5794935c57911b06b602f78"
    assert keys["auto"] == ["4fe13222dd188362b508cac1", "2ab15484e5c885b5fa86ce6b"]
    assert len(keys["TransformerBridge"]) == 1
    assert not set(keys["TransformerBridge"]) & set(keys["auto"])
    record = {"status": "complete", "comparison": {"key": keys["auto"][1]}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert finished_record(tmp_path, keys["auto"]) is not None
    with pytest.raises(InputError, match="other settings, or by an earlier version"):
        finished_record(tmp_path, keys["TransformerBridge"])


def test_a_run_of_before_a_setting_goes_on() -> None:
    config = RunConfig.from_dict({"hooks": ["blocks.1.hook_resid_post"], "sae": {"d_sae": 8}})
    before = config.to_dict()
    del before["model"]["loader"], before["training"]["adam_beta2"], before["logging"]["trackio"]
    check_same_run(Path("run"), before, config)
    other = RunConfig.from_dict(config.to_dict(), ["training.adam_beta2=0.9"])
    with pytest.raises(InputError, match=r"'training\.adam_beta2' was 0\.999 and is now 0\.9"):
        check_same_run(Path("run"), before, other)


def test_old_folders_are_reported_together(old: Path) -> None:
    folders = ("finished", "explicit", "comparison", "evaluation")
    result = msae("report", *folders, "-o", "report")
    assert result.exit_code == 0, result.output
    page = (old / "report/report.md").read_text()
    rows = json.loads((old / "comparison/comparison.json").read_text())["rows"]
    f1 = [row["metrics"]["ground_truth/f1"] for row in rows if row["method"] == "batchtopk"]
    assert f"{sum(f1) / 2:.3f}" in page
    summary = json.loads((old / "evaluation/summary.json").read_text())
    (measured,) = summary["results"]
    assert f"{measured['metrics']['l0']['mean']:.1f}" in page


def test_an_old_run_is_published_with_its_evaluation(old: Path) -> None:
    result = msae("publish", "finished", "--repo", "ada/old", "--evaluation", "evaluation",
                  "--dry-run", "--output", "rendered")  # fmt: skip
    assert result.exit_code == 0, result.output
    (config,) = (old / "rendered").rglob("[0-9]*/cfg.json")
    assert SAE.load_from_disk(config.parent).cfg.architecture() == "multiscale"
    assert (config.parent / "summary.json").is_file()
