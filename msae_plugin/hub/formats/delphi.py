"""delphi: the cache of latents that its explainers and scorers read.

Schema: `delphi.latents.cache.LatentCache.save_splits` and `delphi.latents.loader.TensorBuffer`,
read in eai-delphi 0.1.3. latents/MODULE/START_END.safetensors holds, of the latents START to END,
`locations` (n, 3) unsigned: window, position, latent - START; `activations` (n,) float16; and
`tokens` (windows, context). config.json beside them is its `CacheConfig` with the model's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.numpy import save_file

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import write_json_atomic
from msae_plugin.common.progress import Report
from msae_plugin.data.text import first_windows, load_text
from msae_plugin.evaluation.evaluate import model_for
from msae_plugin.hub.formats.request import ExportRequest, hf_module
from msae_plugin.models.forward_pass import activations_at
from msae_plugin.models.loading import LanguageModel, load_language_model
from msae_plugin.saes.export import dense
from msae_plugin.saes.load import EvaluatedSAE, load_saes

SPLITS, BATCH = 5, 32
SMALLEST = 1e-5  # delphi takes smaller values for zero


def write(request: ExportRequest, folder: Path) -> list[str]:
    """Run the model over held-out text and write `SAE/latents/`."""
    data = request.data
    if not data:
        raise InputError("delphi's cache needs text, and the run names none", "give --text")
    for stored in request.saes:
        [sae] = load_saes([str(stored.folder)])
        place = folder / stored.name / "latents" / hf_module(sae)
        place.mkdir(parents=True)
        name = model_for(None, [sae])
        request.report(f"loading {name}")
        model = load_language_model(name, [sae.hook_name], report=request.report)
        tokens = _heldout_tokens(sae, model, data, request.windows)
        places, values = _active(sae, model, tokens, request.report)
        locations, activations = places.numpy(), values.numpy()
        bounds = np.linspace(0, sae.sae.cfg.d_sae, SPLITS + 1).astype(int)
        for start, end in pairwise(bounds):
            own = (locations[:, 2] >= start) & (locations[:, 2] < end)
            shifted = locations[own] - np.array([0, 0, start])
            small = not shifted.size or shifted.max() < 2**16
            content = {
                "locations": shifted.astype(np.uint16 if small else np.uint32),
                "activations": activations[own].astype(np.float16),
                "tokens": tokens.numpy(),
            }
            save_file(content, place / f"{start}_{end - 1}.safetensors")
        config = {"dataset_repo": str(data["source"]), "dataset_name": ""}
        config |= {"dataset_split": str(data.get("split") or "train")}
        config |= {"dataset_column": str(data.get("text_column") or "text")}
        config |= {"batch_size": BATCH, "n_splits": SPLITS, "n_tokens": tokens.numel()}
        config |= {"cache_ctx_len": tokens.shape[1], "model_name": sae.model_name}
        write_json_atomic(place / "config.json", config)
    return ["LatentDataset(raw_dir='SAE/latents', ...) of delphi reads each"]


def _heldout_tokens(
    evaluated: EvaluatedSAE, model: LanguageModel, data: Mapping[str, Any], windows: int
) -> torch.Tensor:
    """(windows, context_size) tokens of the held-out text, laid out as in training."""
    text = load_text(
        str(data["source"]),
        split=str(data.get("split") or "train"),
        text_column=cast("str | None", data.get("text_column")),
        heldout_documents=int(data["heldout_documents"]),
    )
    metadata = evaluated.sae.cfg.metadata
    size = int(metadata.context_size or 128)
    texts, bos = text.heldout_texts(model.tokenizer), bool(metadata.prepend_bos)
    found = first_windows(model, texts, size, windows * size, prepend_bos=bos)
    return torch.stack([window.tokens for window in found])


@torch.no_grad()
def _active(
    sae: EvaluatedSAE, model: LanguageModel, tokens: torch.Tensor, report: Report
) -> tuple[torch.Tensor, torch.Tensor]:
    """Window, position and latent (n, 3) of everything that is active, and the values (n,)."""
    places: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for number, batch in enumerate(tokens.split(BATCH)):
        report("windows of text", number * BATCH, len(tokens))
        read = activations_at(model.model, batch, [sae.hook_name])[sae.hook_name]
        latents = dense(sae.sae.encode(read)).cpu()
        active = (latents.abs() > SMALLEST).nonzero()
        values.append(latents[tuple(active.T)])
        places.append(active + torch.tensor([number * BATCH, 0, 0]))
    return torch.cat(places), torch.cat(values)
