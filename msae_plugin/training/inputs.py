"""The model and the text of a recipe, loaded and checked against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.seeding import derive_seed
from msae_plugin.data.text import TextData, load_text
from msae_plugin.models.forward_pass import faster_in_bfloat16
from msae_plugin.models.loading import (
    LanguageModel,
    describe_model,
    hook_widths,
    load_language_model,
)
from msae_plugin.training.plans import SAEPlan
from msae_plugin.training.recipe import DataSettings, RunConfig


@dataclass(frozen=True)
class ModelAndText:
    """A loaded model and its text."""

    language_model: LanguageModel
    text: TextData
    autocast: bool  # Whether the model runs in bfloat16

    def fitted(self, plans: Sequence[SAEPlan]) -> list[SAEPlan]:
        """The plans for the widths that the model has at their hooks."""
        widths = hook_widths(self.language_model, list({plan.hook: None for plan in plans}))
        return [plan.fitted(widths[plan.hook]) for plan in plans]

    def record(self) -> dict[str, Any]:
        """`model` and `data` of a `run.json`."""
        model, text = self.language_model, self.text
        return {
            "model": {
                "name": model.model_name,
                "loader": model.loader,
                "d_model": model.d_model,
                "n_layers": model.n_layers,
                "autocast": self.autocast,
            },
            "data": {
                "description": text.description,
                "heldout_documents": len(text.heldout) + len(text.heldout_tokens),
            },
        }

    def heldout_texts(self) -> list[str]:
        """The documents that were kept from training."""
        return self.text.heldout_texts(self.language_model.tokenizer)


def load_model_and_text(
    config: RunConfig,
    device: str,
    say: Callable[[str], object],
    *,
    language_model: LanguageModel | None = None,
    text: TextData | None = None,
    ranks: Ranks = ALONE,
) -> ModelAndText:
    """Load what is not given."""
    # The text first: a wrong path must not cost the minutes that a large model takes.
    if text is None:
        shape = language_model.shape if language_model else describe_model(config.model.name)
        text = load_data(config.data, config.training.seed, say, vocabulary=shape.vocabulary)
    if language_model is None:
        say(f"loading {config.model.name}")
        language_model = load_language_model(
            config.model.name,
            config.hooks,
            device,
            config.model.dtype,
            loader=config.model.loader,
            report=say,
        )
    language_model.shape.require_positions(config.data.context_size, "data.context_size")
    autocast = config.model.autocast
    if autocast == "auto":
        measured = faster_in_bfloat16(language_model.model, config.hooks)
        autocast = bool(ranks.first(torch.tensor(measured)))
        say(f"bfloat16 autocast is {'faster here: on' if autocast else 'slower here: off'}")
    return ModelAndText(language_model, text, autocast)


def load_data(
    data: DataSettings, seed: int, say: Callable[[str], object], *, vocabulary: int | None = None
) -> TextData:
    """Load the text of a recipe; `training.seed` decides which documents are held out."""
    say(f"reading {data.source}")
    return load_text(
        data.source,
        split=data.split,
        text_column=data.text_column,
        heldout_documents=data.heldout_documents,
        seed=derive_seed(seed, "text"),
        streaming=data.streaming,
        vocabulary=vocabulary,
    )
