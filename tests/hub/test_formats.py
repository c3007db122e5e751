"""Files for other tools, held against the schema that each module names."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from msae_plugin.common.errors import InputError
from msae_plugin.hub.formats import FORMATS, ExportRequest, export_for
from msae_plugin.hub.formats.lm_eval import COLUMNS
from msae_plugin.models.forward_pass import activations_at
from msae_plugin.saes.load import load_saes

MODULE = "layers.1"


def test_steering_vectors_are_unit_decoder_rows(trained_run: Path, tmp_path: Path) -> None:
    request = ExportRequest(trained_run, repo="ada/saes", latents=(3, 17), coefficient=4.0)
    [line, _] = export_for("lm-eval", request, tmp_path / "out")
    assert line.endswith("steer_path=multiscale/latent_3.pt --tasks TASK")
    [evaluated] = load_saes([str(trained_run / "multiscale")])
    stored = torch.load(tmp_path / "out/multiscale/latent_17.pt", weights_only=True)
    assert stored.keys() == {MODULE}
    vector = stored[MODULE]
    assert (vector["action"], vector["steering_coefficient"]) == ("add", 4.0)
    # `add` asserts that there is none.
    assert vector["bias"] is None
    torch.testing.assert_close(vector["steering_vector"], evaluated.sae.W_dec[17].detach())
    assert vector["steering_vector"].norm() == pytest.approx(1, abs=1e-5)
    # The header in the docstring of lm-eval 0.4.13.
    documented = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,"
    assert ",".join(COLUMNS) == documented + "head_index,sae_id,description"
    with (tmp_path / "out/multiscale/latent_3.csv").open() as file:
        [row] = csv.DictReader(file)
    assert row["sae_id"].endswith("/jumprelu")
    assert (row["loader"], row["action"], row["sparse_model"]) == ("sae_lens", "clamp", "ada/saes")
    assert (row["hookpoint"], row["feature_index"], row["head_index"]) == (MODULE, "3", "")
    batchtopk = (tmp_path / "out/batchtopk/latent_3.csv").read_text()
    assert "/jumprelu" not in batchtopk


def test_delphi_reads_back_the_latents_that_were_active(
    trained_run: Path, tiny_language_model: Any, tmp_path: Path
) -> None:
    export_for("delphi", ExportRequest(trained_run / "multiscale", windows=5), tmp_path / "out")
    place = tmp_path / "out/multiscale/latents" / MODULE
    config = json.loads((place / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_splits"]) == (32, 5)
    [evaluated] = load_saes([str(trained_run / "multiscale")])
    found = torch.zeros(5, 32, 96)
    covered: list[int] = []
    for file in sorted(place.glob("*.safetensors"), key=lambda f: int(f.stem.split("_")[0])):
        content = load_file(file)
        start, end = map(int, file.stem.split("_"))
        covered += range(start, end + 1)
        assert content["locations"].dtype == np.uint16
        assert content["activations"].dtype == np.float16
        tokens = torch.from_numpy(content["tokens"])
        window, position, latent = torch.from_numpy(content["locations"].astype(np.int64)).T
        found[window, position, latent + start] = torch.from_numpy(content["activations"]).float()
    assert covered == list(range(96))
    hook = evaluated.hook_name
    activations = activations_at(tiny_language_model.model, tokens, [hook])[hook]
    latents = evaluated.sae.encode(activations).detach()
    torch.testing.assert_close(found, latents, rtol=1e-3, atol=1e-4)
    assert (found != 0).any()


def measured(run: Path, folder: Path) -> Path:
    """An evaluation of one SAE of the run, its JSON from an earlier version's."""
    fixture = Path(__file__).parents[1] / "fixtures/v0_1/evaluation"
    shutil.copytree(fixture, folder)
    summary = json.loads((folder / "summary.json").read_text())
    [evaluated] = load_saes([str(run / "multiscale")])
    for record in summary["saes"].values():
        record["weights_sha256"] = evaluated.weights_sha256
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_neuronpedia_gets_its_rows_and_saebench_its_own_json(
    trained_run: Path, tmp_path: Path
) -> None:
    evaluation = measured(trained_run, tmp_path / "evaluation")
    request = ExportRequest(trained_run / "multiscale", "ada/My.SAEs", evaluation)
    export_for("neuronpedia", request, tmp_path / "out")
    [release] = yaml.safe_load((tmp_path / "out/pretrained_saes.yaml").read_text()).values()
    [listed] = release["saes"]
    place = tmp_path / "out" / listed["neuronpedia"]
    assert place.name == "1-my-saes"
    rows = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in place.glob("*.jsonl")
    }
    [source], [source_set] = rows["source"], rows["sourceset"]
    assert source["id"] == place.name
    assert source["setName"] == source_set["name"]
    assert source["hfFolderId"] == listed["path"]
    assert listed["path"].endswith("/jumprelu")
    assert source["saelensConfig"]["architecture"] == "jumprelu"
    # In Neuronpedia's tables these have no default, but for the creator, whom it knows.
    for row, needed in (
        (source, {"id", "modelId", "setName"}),
        (source_set, {"modelId", "name", "description", "creatorName"}),
    ):
        assert all(row[key] for key in needed)
    pytest.importorskip("sae_bench")
    from sae_bench.evals.core.eval_output import CoreEvalOutput

    [core] = [row for row in rows["eval"] if row["typeName"] == "core"]
    assert (core["modelId"], core["sourceId"]) == (source["modelId"], source["id"])
    read = CoreEvalOutput(**core["output"])
    assert read.eval_result_metrics.sparsity.l0 > 0


def test_saedashboard_gets_an_sae_and_a_script(trained_run: Path, tmp_path: Path) -> None:
    request = ExportRequest(trained_run, text="monology/pile-uncopyrighted")
    # Its transformer-lens has a list of models, in which a folder is not.
    [line, *unknown] = export_for("sae-dashboard", request, tmp_path / "out")
    assert line == "sh make_dashboards.sh"
    assert len(unknown) == 1
    assert unknown[0].startswith("SAEDashboard's transformer-lens does not know ")
    script = tmp_path / "out/make_dashboards.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    # It brings numpy 1, beside which pyarrow 26 does not import.
    assert "environment/bin/pip install sae-dashboard==0.8.0 'pyarrow<26'" in lines
    words = shlex.split(next(line for line in lines if "neuronpedia-runner" in line))
    # Of the runner's --help in sae-dashboard 0.8.0.
    assert {word for word in words if word.startswith("--")} <= {
        "--from-local-sae", "--sae-set", "--sae-path", "--np-set-name", "--dataset-path",
        "--n-prompts", "--n-tokens-in-prompt", "--output-dir",
    }  # fmt: skip
    copied = tmp_path / "out" / words[words.index("--sae-path") + 1]
    assert json.loads((copied / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert (copied / "sae_weights.safetensors").is_file()


def test_what_a_tool_cannot_take_is_refused_and_nothing_is_left(
    trained_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for tool, request, reason in (
        ("pytorch", ExportRequest(trained_run), f"known are {', '.join(FORMATS)}"),
        ("lm-eval", ExportRequest(trained_run), "--latents 3,17"),
        ("lm-eval", ExportRequest(trained_run, latents=(96,)), "has latents 0 to 95"),
        ("neuronpedia", ExportRequest(trained_run), "give --repo"),
        ("sae-dashboard", ExportRequest(trained_run), "--text monology/pile-uncopyrighted"),
    ):
        with pytest.raises(InputError, match=reason):
            export_for(tool, request, out)
        assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        export_for("delphi", ExportRequest(trained_run), out)
