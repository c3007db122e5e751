"""Batches of activations that can be had again by number, and one pass of a model kept on disk.

OUTPUT/activations/activations.json  what it holds, written last: its presence says "complete"
OUTPUT/activations/<hook>.bin        (rows, d_in) as they are in memory

The batches come from SAELens' own store, mixing buffer included, through the runner of `msae
train`. The first rows are for training, in an order of each seed's own; further rows set the
thresholds and check the exports. A run that was killed makes the pass again.

A batch is a function of hook, seed and number. So every SAE of a seed sees the same batches in the
same order, whichever of them are trained together, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.saes.sae import SAEMetadata

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import json_safe, key_digest
from msae_plugin.common.interruption import InterruptionGuard
from msae_plugin.common.progress import Report
from msae_plugin.common.seeding import derive_seed, seed_everything
from msae_plugin.common.stored import StoredActivations as StoredManifest
from msae_plugin.common.stored import read_json_object
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.models.transformer_lens import BRIDGE
from msae_plugin.training.activation_store import (
    PLACEHOLDER,
    ActivationWriter,
    HashedRows,
    read_activations,
)
from msae_plugin.training.inputs import ModelAndText
from msae_plugin.training.passes import reading_runner, write_activations
from msae_plugin.training.recipe import RunConfig

SAMPLE_TOKENS = 4096
"""Activations that the export check gets."""


FOLDER, MANIFEST = "activations", "activations.json"
FORMAT = 1
_METADATA = (
    "dataset_path", "model_name", "model_class_name", "hook_head_index", "context_size",
    "seqpos_slice", "model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens",
    "sequence_separator_token", "disable_concat_sequences",
)  # fmt: skip


def rows_needed(config: CompareConfig) -> tuple[int, int]:
    """Rows to train on, and all rows."""
    training = config.training
    whole_batches = training.tokens // training.batch_size_tokens * training.batch_size_tokens
    calibration = training.calibrate_batches * training.batch_size_tokens
    return whole_batches, whole_batches + calibration + SAMPLE_TOKENS


def recipe(config: CompareConfig) -> RunConfig:
    """The sections of a training recipe, with an SAE that is never trained: runners want one."""
    training = replace(config.training, tokens=rows_needed(config)[1])
    return RunConfig(
        model=config.model, data=config.data, hooks=config.hooks, sae=PLACEHOLDER, training=training
    )


def activations_key(config: CompareConfig) -> str:
    """A digest of everything that the activations depend on."""
    model, data, training = config.model, config.data, config.training
    bridge = [BRIDGE] if model.loader == BRIDGE else []  # older keys have no loader
    return key_digest(
        {
            "format": FORMAT,
            "model": [model.name, model.dtype, model.autocast, *bridge],
            "data": json_safe(vars(data)),
            "hooks": config.hooks,
            "rows": rows_needed(config),
            "batch": training.batch_size_tokens,
            "buffer": [training.n_batches_in_buffer, training.activations_mixing_fraction],
            "seed": training.seed,
        }
    )


class StoredActivations:
    """The activations of a comparison on the disk, (rows, d_in) by hook, mapped from the files."""

    # SAEs to train at once: one where batches are read, several where each has to be made.
    side_by_side = 1

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], tensors: Mapping[str, HashedRows]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tensors = tensors
        self.batch_size = int(manifest["batch_size"])
        self.training_rows = int(manifest["training_rows"])
        # The order that was asked for last: seeds are trained one after another.
        self._order: tuple[int, torch.Tensor] | None = None

    def d_in(self, hook: str) -> int:
        """Width of the activations at a hook."""
        return self.tensors[hook].shape[1]

    def batch(self, hook: str, seed: int, number: int) -> torch.Tensor:
        """Batch `number` of the seed's order; after the last one the order begins again."""
        if self._order is None or self._order[0] != seed:
            generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
            self._order = seed, torch.randperm(self.training_rows, generator=generator)
        start = number * self.batch_size % self.training_rows
        rows = self._order[1][start : start + self.batch_size]
        # Neighbours in the file are read together; the order within a batch changes nothing.
        return self.tensors[hook][rows.sort().values]

    def fresh(self, hook: str, _seed: int, count: int) -> list[torch.Tensor]:
        """Batches of the rows after those for training, the same for all seeds."""
        start = self.training_rows
        rows = self.tensors[hook][start : start + count * self.batch_size]
        return list(rows.split(self.batch_size))

    def samples(self, hook: str, _seed: int) -> torch.Tensor:
        """The last rows in float32, the same for all seeds."""
        return self.tensors[hook][-SAMPLE_TOKENS:].float()

    def describe(self, metadata: SAEMetadata, hook: str) -> None:
        """Copy what SAELens' runner wrote when the pass was made."""
        for key, value in cast("Mapping[str, Any]", self.manifest["metadata"]).items():
            setattr(metadata, key, value)
        metadata.hook_name = hook

    def record(self) -> dict[str, Any]:
        """Model and text, as the pass recorded them."""
        return {key: self.manifest[key] for key in ("model", "data")}


def open_activations(output: Path) -> StoredActivations | None:
    """The activations in a comparison's folder; None when the pass was not made or not finished."""
    folder = output / FOLDER
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json_object(folder / MANIFEST, StoredManifest)
    if manifest["format"] != FORMAT:
        raise InputError(f"{folder} is of another version: delete it, or give another --output")
    damaged = f"{{}} is damaged: delete {folder}, or give another --output"
    return StoredActivations(folder, manifest, read_activations(folder, manifest, damaged))


def store_activations(
    config: CompareConfig,
    output: Path,
    inputs: ModelAndText,
    device: str,
    guard: InterruptionGuard,
    report: Report,
) -> StoredActivations:
    """Run the text through the model once and keep the activations."""
    folder = output / FOLDER
    # Of a pass that was killed.
    shutil.rmtree(folder, ignore_errors=True)
    training_rows, rows = rows_needed(config)
    run = recipe(config)
    seed_everything(run.training.seed)
    runner = reading_runner(run, inputs, device, guard)
    record = inputs.record()
    # SAELens' metadata of the SAE that is not trained, less the SAE's own.
    written = next(iter(runner.saes.values())).cfg.metadata
    facts = {
        "format": FORMAT,
        "key": activations_key(config),
        "rows": rows,
        "training_rows": training_rows,
        "batch_size": config.training.batch_size_tokens,
        "model": {**record["model"], "dtype": config.model.dtype},
        "data": {**record["data"], "context_size": config.data.context_size},
        "metadata": {key: json_safe(getattr(written, key)) for key in _METADATA},
    }
    dtype = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    writer = ActivationWriter(folder, facts, config.hooks, manifest=MANIFEST, dtype=dtype)

    def advance(done: int) -> None:
        report("the model's pass over the text", done, rows)

    write_activations(runner, writer, guard, advance)
    stored = open_activations(output)
    assert stored is not None, "the manifest was written a moment ago"
    return stored
