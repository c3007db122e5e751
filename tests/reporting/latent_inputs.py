"""A comparison of one method with three seeds on the tiny model, whose SAEs are made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from report_inputs import comparison, row, write_comparison
from sae_lens import StandardSAE, StandardSAEConfig

HOOK, CONTEXT, HELDOUT = "blocks.1.hook_resid_post", 32, 40


def write_latents_inputs(
    folder: Path, model: Path, texts: list[str], d_sae: int = 48, seeds: tuple[int, ...] = (1, 2, 3)
) -> Path:
    """The second seed's first half is the first seed's latents in reverse; the third has none."""
    corpus = folder / "notes.jsonl"
    corpus.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows: list[dict[str, Any]] = []
    first = torch.randn(d_sae, 64, generator=torch.Generator().manual_seed(1))
    for seed in seeds:
        directions = torch.randn(d_sae, 64, generator=torch.Generator().manual_seed(seed))
        if seed == 2:
            directions[: d_sae // 2] = first[: d_sae // 2].flip(0)
        name = f"tiny_seed{seed}"
        sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=d_sae, apply_b_dec_to_input=False))
        with torch.no_grad():
            sae.W_dec.copy_(torch.nn.functional.normalize(directions, dim=1))
            sae.W_enc.copy_(sae.W_dec.T + 0.05)
            # Most are sparse, the first fires always, the last never.
            sae.b_enc.fill_(-1.0).index_fill_(0, torch.tensor([0]), 30.0)
            sae.b_enc[-1] = -1e6
        metadata = sae.cfg.metadata
        metadata.model_name, metadata.hook_name = str(model), HOOK
        metadata.context_size, metadata.prepend_bos = CONTEXT, True
        metadata.training_steps = 20
        metadata.training_architecture_details = {"prefix_fractions": [0.25, 0.5]}
        place = folder / "cmp/saes" / name / "sae"
        place.mkdir(parents=True)
        sae.save_model(place)
        (place.parent / "export.json").write_text('{"l0_exported": null}')
        rows.append(row("tiny", 8.0, seed, name=name, hook=HOOK, folder=f"saes/{name}"))
    data = {"source": str(corpus), "context_size": CONTEXT, "heldout_documents": HELDOUT}
    config = {"data": data, "training": {"seed": 7}}
    return write_comparison(folder / "cmp", comparison(rows=rows, config=config))
