"""Datasets on the tiny model's topics, and a look at what probing computes of the model."""

import dataclasses
import json
import random
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_bench.sae_bench_utils import activation_collection
from sae_lens import SAE

from msae_plugin.common.files import tensors_sha256
from msae_plugin.evaluation.outcomes import ModelContext
from msae_plugin.evaluation.saebench.patching import replaced
from msae_plugin.saes.load import EvaluatedSAE

AG_NEWS = "fancyzhx/ag_news"
TOPICS = ("garden", "kitchen", "harbour", "library")
BIOS = "LabHC/bias_in_bios_class_set1"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_ag_news(folder: Path, texts: list[str]) -> Path:
    """The generated documents in AG News' schema, labelled by topic."""
    rows = [
        {"text": text, "label": label}
        for text in texts
        for label, topic in enumerate(TOPICS)
        if f" from the {topic}:" in text
    ]
    write_jsonl(folder / "train.jsonl", rows[: len(rows) // 2])
    write_jsonl(folder / "test.jsonl", rows[len(rows) // 2 :])
    return folder


def write_bios(folder: Path, texts: list[str]) -> Path:
    """The same in the schema of Bias in Bios: professions and genders."""
    rows = [
        {"hard_text": text, "profession": profession, "gender": number % 2}
        for number, text in enumerate(texts)
        for profession, topic in zip((0, 1, 2, 6), TOPICS, strict=True)
        if f" from the {topic}:" in text
    ]
    rows += [
        {"hard_text": f"{text} again", "profession": 9, "gender": number % 2}
        for number, text in enumerate(texts[:80])
    ]
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def broken(subject: EvaluatedSAE, name: str, encode: Any) -> EvaluatedSAE:
    """The same SAE with another `encode`."""

    class Broken(type(subject.sae)):  # type: ignore[misc]
        pass

    Broken.encode = encode
    sae: SAE[Any] = Broken(subject.sae.cfg)
    sae.load_state_dict(subject.sae.state_dict())
    return dataclasses.replace(subject, name=name, sae=sae.eval())


@contextmanager
def model_passes() -> Generator[list[str], None, None]:
    """Hooks whose activations are computed inside the block, once per set of texts."""
    seen: list[str] = []
    original = activation_collection.get_all_llm_activations

    def counted(tokens: Any, model: Any, batch: int, layer: int, hook: str, **options: Any) -> Any:
        seen.append(hook)
        return original(tokens, model, batch, layer, hook, **options)

    with replaced(activation_collection, "get_all_llm_activations", counted):
        yield seen


def surroundings(context: ModelContext, subjects: list[EvaluatedSAE]) -> tuple[Any, ...]:
    """What an evaluation leaves as it was."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[union-attr]
        torch.get_rng_state().tolist(),
        context.language_model.tokenizer.padding_side,
        context.language_model.tokenizer.truncation_side,
        [tensors_sha256(subject.sae.state_dict()) for subject in subjects],
        [str(subject.sae.cfg.to_dict()) for subject in subjects],
        ["encode" in vars(subject.sae) for subject in subjects],
    )
