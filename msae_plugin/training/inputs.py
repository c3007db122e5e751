"""What a run reads: the model and the text, loaded and checked against the recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.progress import ProgressDisplay
from msae_plugin.common.seeding import derive_seed
from msae_plugin.data.text import TextData, load_text
from msae_plugin.models.forward_pass import faster_in_bfloat16
from msae_plugin.models.loading import LanguageModel, hook_widths, load_language_model
from msae_plugin.training.plans import SAEPlan
from msae_plugin.training.recipe import RunConfig


@dataclass(frozen=True)
class ModelAndText:
    """A loaded model and its text.

    Attributes:
        language_model: The model.
        text: The text.
        autocast: Whether the model runs in bfloat16.
    """

    language_model: LanguageModel
    text: TextData
    autocast: bool

    def record(self) -> dict[str, Any]:
        """`model` and `data` of a `run.json`."""
        model, text = self.language_model, self.text
        return {
            "model": {
                "name": model.model_name,
                "loader": model.model_class_name,
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
    plans: list[SAEPlan],
    device: str,
    progress: ProgressDisplay,
    *,
    language_model: LanguageModel | None = None,
    text: TextData | None = None,
    ranks: Ranks = ALONE,
) -> ModelAndText:
    """Load what is not given.

    Args:
        config: The recipe.
        plans: Its SAEs.
        device: Where the model goes.
        progress: Told what is loaded.
        language_model: Used instead of `config.model.name`.
        text: Used instead of `config.data.source`.
        ranks: The processes of the run, which agree on the autocast.

    Raises:
        InputError: The model or the text cannot be read, or an SAE does not fit the activations.
    """
    # The text first: a wrong path must not cost the minutes that a large model takes.
    if text is None:
        text = _load_text(config, progress)
    if language_model is None:
        progress.message(f"loading {config.model.name}")
        language_model = load_language_model(
            config.model.name,
            config.hooks,
            device=device,
            dtype=config.model.dtype,
            report=progress.message,
        )
    widths = hook_widths(language_model, config.hooks)
    for plan in plans:
        plan.require_width(widths[plan.hook])
    return ModelAndText(
        language_model,
        text,
        chosen_autocast(
            config.model.autocast, config.hooks, language_model, progress.message, ranks
        ),
    )


def _load_text(config: RunConfig, progress: ProgressDisplay) -> TextData:
    data = config.data
    progress.message(f"reading {data.source}")
    return load_text(
        data.source,
        split=data.split,
        text_column=data.text_column,
        heldout_documents=data.heldout_documents,
        seed=derive_seed(config.training.seed, "text"),
        streaming=data.streaming,
    )


def chosen_autocast(
    setting: bool | Literal["auto"],
    hooks: Sequence[str],
    language_model: LanguageModel,
    say: Callable[[str], object],
    ranks: Ranks = ALONE,
) -> bool:
    """Whether the model runs in bfloat16: as the recipe says, or as is faster here.

    Args:
        setting: `model.autocast` of the recipe.
        hooks: How far the model is run.
        language_model: The model.
        say: Told what was found.
        ranks: The processes of the run, which must agree.
    """
    if setting != "auto":
        return setting
    measured = faster_in_bfloat16(language_model.model, hooks)
    faster = bool(ranks.first(torch.tensor(measured)))
    say(f"bfloat16 autocast is {'faster here: on' if faster else 'slower here: off'}")
    return faster
