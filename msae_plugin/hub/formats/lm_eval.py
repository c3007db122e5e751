"""lm-evaluation-harness: steering vectors for its model type `steered`.

Schema: the docstring of `lm_eval.models.hf_steered.SteeredModel`, read in lm-eval 0.4.13. `.pt`
holds a vector and serves an unpublished SAE, `.csv` names an SAE that SAELens loads. 0.4.13 keeps
one row per hookpoint, so every latent gets its own file; and it passes b_dec with each row of a
CSV, which `add` refuses by an assertion, so a CSV can only `clamp`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from msae_plugin.common.errors import InputError
from msae_plugin.hub.formats.request import ExportRequest, hf_module, plain_folder
from msae_plugin.hub.plan import default_paths
from msae_plugin.saes.export import JUMPRELU_FOLDER
from msae_plugin.saes.load import load_saes

COLUMNS = (
    "loader", "action", "sparse_model", "hookpoint", "feature_index", "steering_coefficient",
    "head_index", "sae_id", "description",
)  # fmt: skip


def write(request: ExportRequest, folder: Path) -> list[str]:
    """Write `SAE/latent_N.pt`, which adds, and for a repository `.csv`, which clamps."""
    if not request.latents:
        raise InputError("lm-eval steers with single latents: name them, --latents 3,17")
    force, lines = request.coefficient, list[str]()
    for stored, path in zip(request.saes, default_paths(request.saes), strict=True):
        [sae] = load_saes([str(stored.folder)])
        hookpoint, decoder = hf_module(sae), sae.sae.W_dec.detach().cpu()
        if max(request.latents) >= len(decoder):
            raise InputError(f"--latents: {stored.name} has latents 0 to {len(decoder) - 1}")
        place = folder / stored.name
        place.mkdir()
        for latent in request.latents:
            vector = {"steering_vector": decoder[latent].clone(), "steering_coefficient": force}
            vector |= {"action": "add", "bias": None, "head_index": None}
            torch.save({hookpoint: vector}, place / f"latent_{latent}.pt")
            if request.repo is not None:
                copied = plain_folder(stored, "lm-eval") == stored.jumprelu_export
                row = ["sae_lens", "clamp", request.repo, hookpoint, latent, force, ""]
                row += [f"{path}/{JUMPRELU_FOLDER}" if copied else path, f"latent {latent}"]
                with (place / f"latent_{latent}.csv").open("w", newline="") as file:
                    csv.writer(file).writerows([COLUMNS, row])
        steer = f"steer_path={stored.name}/latent_{request.latents[0]}.pt"
        model = f"pretrained={sae.model_name},{steer}"
        lines.append(f"lm_eval --model steered --model_args {model} --tasks TASK")
    return lines
