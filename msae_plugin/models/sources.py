"""Where a language model's files are, and what the hub calls it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from msae_plugin.common.errors import InputError
from msae_plugin.models.hub_access import first_line, has_all_weights, model_folder
from msae_plugin.models.packaged import PACKAGED_PREFIX, packaged_model, prepare_packaged_model
from msae_plugin.upstream import official_transformer_lens_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model's name, resolved.

    Attributes:
        folder: Folder with config, tokenizer and weights.
        hub_name: Its name on the hub, where it is known.
        recorded_name: What the metadata of an SAE records: the hub name, else the folder.
    """

    folder: Path
    hub_name: str | None
    recorded_name: str


def resolve_model(name: str, report: Callable[[str], object] = logger.info) -> ModelSource:
    """Find, fetch or convert the files of a model.

    Raises:
        InputError: If there is no such model, or its files cannot be had.
    """
    if name.startswith(PACKAGED_PREFIX):
        hub_name = packaged_model(name).hub_name
        folder = prepare_packaged_model(name, report=report)
        return ModelSource(folder, hub_name, recorded_name=hub_name)
    folder = local_folder(name)
    if folder is not None:
        if not has_all_weights(folder):
            raise InputError(
                f"folder {folder} has a config.json but not all weights "
                "(model.safetensors, or its shards)",
                "save the whole model with save_pretrained",
            )
        hub_name = _hub_name_of_snapshot(folder)
        return ModelSource(folder, hub_name, recorded_name=hub_name or str(folder))
    hub_name = hub_name_of(name)
    return ModelSource(model_folder(hub_name), hub_name, recorded_name=hub_name)


def local_folder(name: str) -> Path | None:
    """The folder that a name stands for, or None if it can only be a hub name.

    Raises:
        InputError: If the name is that of a folder that holds no model, or of none at all.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.is_dir():
        raise InputError(f"folder {folder.resolve()} has no config.json: it is not a model folder")
    if folder.is_absolute() or name.startswith("."):
        raise InputError(f"model folder {folder} does not exist")
    return None


def hub_name_of(name: str) -> str:
    """The hub name behind a name or alias (`gpt2-small` is `gpt2`).

    Raises:
        InputError: If the model is not kept in the format of transformers.
    """
    official = official_transformer_lens_name(name) or name
    if official.startswith(("NeelNanda/", "ArthurConmy/", "Baidicoot/")):
        raise InputError(
            f"model {name!r} is kept in a format that only TransformerLens reads",
            "load it yourself and hand it to the runner as language_model",
        )
    return official


def _hub_name_of_snapshot(folder: Path) -> str | None:
    """The hub name of a folder inside a hub cache, `models--ORG--NAME/snapshots/REVISION`."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder, without running code from it.

    Raises:
        InputError: If it is broken, or of a kind that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    # What transformers raises for broken JSON, for an unknown model type, and for a config that
    # would have to run code from the folder.
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder / 'config.json'} cannot be used ({first_line(error)})",
            "give a causal language model that transformers knows",
        ) from error
