"""delphi: the cache of latents that its explainers and scorers read.

Schema: `delphi.latents.cache.LatentCache.save_splits` and `delphi.latents.loader.TensorBuffer`,
read in eai-delphi 0.1.3. latents/MODULE/START_END.safetensors holds, of the latents START to END,
`locations` (n, 3) unsigned: window, position, latent - START; `activations` (n,) float16; and
`tokens` (windows, context). config.json beside them is its `CacheConfig` with the model's name.
"""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import write_json_atomic
from msae_plugin.data.text import load_text
from msae_plugin.data.windows import batched_windows, iterate_windows
from msae_plugin.evaluation.evaluate import model_for
from msae_plugin.hub.formats.request import ExportRequest, dense_latents, hf_module, loaded
from msae_plugin.models.forward_pass import activations_at
from msae_plugin.models.loading import load_language_model
from msae_plugin.saes.load import EvaluatedSAE

SPLITS = 5
BATCH = 32
SMALLEST = 1e-5  # delphi takes smaller values for zero


def write(request: ExportRequest, folder: Path) -> list[str]:
    """Run the model over held-out text and write `SAE/latents/`."""
    data = request.data
    if not data:
        raise InputError(
            "delphi's cache needs text, and the run names none", "give --text, as data.source"
        )
    for stored in request.saes:
        sae = loaded(stored)
        place = folder / stored.name / "latents" / hf_module(sae)
        place.mkdir(parents=True)
        locations, activations, tokens = _latents(sae, data, request.windows)
        _write_splits(place, locations, activations, tokens, sae.sae.cfg.d_sae)
        config = {
            "dataset_repo": str(data["source"]),
            "dataset_split": str(data.get("split") or "train"),
            "dataset_name": "",
            "dataset_column": str(data.get("text_column") or "text"),
            "batch_size": BATCH,
            "cache_ctx_len": tokens.shape[1],
            "n_tokens": tokens.size,
            "n_splits": SPLITS,
            "model_name": sae.model_name,
        }
        write_json_atomic(place / "config.json", config)
    return ["LatentDataset(raw_dir='SAE/latents', ...) of delphi reads each"]


def _latents(sae: EvaluatedSAE, data: Any, windows: int) -> tuple[Any, Any, Any]:
    """Places (n, 3), values (n,) and tokens (windows, context) of everything that is active."""
    model = load_language_model(model_for(None, [sae]), [sae.hook_name])
    metadata = sae.sae.cfg.metadata
    text = load_text(
        str(data["source"]),
        split=str(data.get("split") or "train"),
        text_column=data.get("text_column"),
        heldout_documents=int(data.get("heldout_documents") or 200),
    )
    found = iterate_windows(
        model.model,
        model.tokenizer,
        text.heldout_texts(model.tokenizer),
        int(metadata.context_size or 128),
        prepend_bos=metadata.prepend_bos is not False,
    )
    places: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    for batch in batched_windows(islice(found, windows), BATCH):
        ids = torch.stack([window.tokens for window in batch])
        activations = activations_at(model.model, ids, [sae.hook_name])[sae.hook_name]
        latents = dense_latents(sae.sae, activations).cpu()
        active = (latents.abs() > SMALLEST).nonzero()
        values.append(latents[tuple(active.T)])
        active[:, 0] += sum(map(len, tokens))
        places.append(active)
        tokens.append(ids)
    if not tokens:
        raise InputError(
            f"{data['source']}: its held-out text is shorter than a window", "give more text"
        )
    return tuple(torch.cat(parts).numpy() for parts in (places, values, tokens))


def _write_splits(place: Path, locations: Any, activations: Any, tokens: Any, d_sae: int) -> None:
    bounds = np.linspace(0, d_sae, SPLITS + 1).astype(int)
    for start, end in pairwise(bounds):
        own = (locations[:, 2] >= start) & (locations[:, 2] < end)
        shifted = locations[own] - np.array([0, 0, start])
        small = not shifted.size or shifted.max() < 2**16
        content = {
            "locations": shifted.astype(np.uint16 if small else np.uint32),
            "activations": activations[own].astype(np.float16),
            "tokens": tokens,
        }
        save_file(content, place / f"{start}_{end - 1}.safetensors")
