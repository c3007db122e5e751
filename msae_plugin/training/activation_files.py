"""Activations on the disk, and the pass of the language model that makes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from msae_plugin.common.errors import InputError
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.progress import ProgressDisplay
from msae_plugin.data.text import TextData
from msae_plugin.models.loading import LanguageModel, ModelShape
from msae_plugin.training.checkpoints import CheckpointStore
from msae_plugin.training.log import MetricsLog
from msae_plugin.training.passes import TrainingSetting
from msae_plugin.training.plans import build_sae
from msae_plugin.training.recipe import RunConfig
from msae_plugin.training.shared_pass import SharedPassRunner, shared_pass_config

# Free space that is left alone.
_SPARE_BYTES = 200 << 20
PLACEHOLDER = {"architecture": "standard", "d_sae": 1}
"""The `sae` of a recipe whose activations are kept: a runner wants one, it is never trained."""


def mapped(
    path: Path, rows: int, width: int, dtype: torch.dtype, *, writable: bool
) -> torch.Tensor:
    """(rows, width) tensor over a file, which is made when missing and writable."""
    flat = torch.from_file(str(path), shared=writable, size=rows * width, dtype=dtype)
    return flat.view(rows, width)


def require_space(folder: Path, needed: int) -> None:
    """Refuse a disk on which activations of this many bytes do not fit.

    Raises:
        InputError: Saying how much is needed and free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise InputError(
            f"the activations need {needed / 2**30:.1f} GiB in {folder} and {free / 2**30:.1f} GiB "
            "are free: lower training.tokens, or give --output on a larger disk"
        )


def reading_runner(
    config: RunConfig,
    language_model: LanguageModel,
    text: TextData,
    folder: Path,
    device: str,
    *,
    autocast: bool,
    guard: InterruptionGuard,
    progress: ProgressDisplay,
) -> SharedPassRunner:
    """A runner of `msae train` that makes batches and trains nothing.

    Args:
        config: The recipe, whose SAE is `PLACEHOLDER`.
        language_model: The model.
        text: The text.
        folder: Where the activations go; nothing is written there.
        device: Where the activations are made.
        autocast: Whether the model runs in bfloat16.
        guard: Knows about signals.
        progress: Of the run.
    """
    shape = ModelShape(language_model.d_model, language_model.n_layers, language_model.vocabulary)
    plans = config.validate(shape)
    return SharedPassRunner(
        shared_pass_config(config, plans, language_model, device, autocast=autocast),
        TrainingSetting(
            config=config,
            plans=plans,
            folders={plan.name: folder for plan in plans},
            # Nothing is trained: there will be no checkpoint.
            store=CheckpointStore(folder / "checkpoints", 0, writes=False),
            guard=guard,
            metrics=MetricsLog([]),
            progress=progress,
        ),
        dataset=text.train,
        language_model=language_model,
        saes={plan.name: build_sae(plan, 0, device) for plan in plans},
    )
