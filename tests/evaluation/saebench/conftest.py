"""A tiny model, tiny SAEs and a small text, as the evaluations receive them."""

import json
from pathlib import Path

import pytest
from evaluation_builders import make_subject, random_multiscale, random_standard

from msae_plugin.common.files import tensors_sha256
from msae_plugin.evaluation.outcomes import ModelContext
from msae_plugin.models.loading import LanguageModel
from msae_plugin.saes.load import EvaluatedSAE


@pytest.fixture
def context(tiny_language_model: LanguageModel, tmp_path: Path) -> ModelContext:
    """The tiny model, float32, with a cache of its own."""
    return ModelContext(
        language_model=tiny_language_model,
        weights_sha256=tensors_sha256(tiny_language_model.model.state_dict()),
        dtype="float32",
        device="cpu",
        name="tiny-model",
        cache=tmp_path / "cache",
    )


@pytest.fixture
def subjects() -> list[EvaluatedSAE]:
    """Two SAEs of different architectures."""
    return [
        make_subject(random_standard(1), "standard"),
        make_subject(random_multiscale(2), "multiscale"),
    ]


@pytest.fixture
def text_file(tmp_path: Path, tiny_texts: list[str]) -> Path:
    """100 of the generated documents."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts[:100]))
    return path
