"""Whether an evaluation's language model can be had and fits the SAEs; no weights are read."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import default_cache_dir
from msae_plugin.common.missing import Missing
from msae_plugin.models.hook_names import validate_hook
from msae_plugin.models.hub_access import (
    explain_hub_error,
    has_all_weights,
    model_config_folder,
    require_repository,
)
from msae_plugin.models.loading import ModelShape, describe_model
from msae_plugin.models.packaged import (
    PACKAGED_PREFIX,
    install_command,
    is_installed,
    packaged_model,
    prepare_packaged_model,
)
from msae_plugin.models.sources import hub_name_of, local_folder, read_config
from msae_plugin.models.transformer_lens import require_supported, transformer_lens_name
from msae_plugin.saes.load import Subject

# Where the messages of this project turn from what is wrong to what to do.
_ADVICE = re.compile(
    r"[:;] (?=(?:accept|ask|check|choose|copy|export|expected|give|install|log|lower|name|pip|save|"
    r"set|train|use)\b)"
)
_NAMED_TWICE = re.compile(r"dataset (?P<name>\S+): (?=dataset '(?P=name)')")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def as_missing(error: Exception, otherwise: str) -> Missing:
    """A one-line error as what is missing and how to get it.

    Args:
        error: Its text.
        otherwise: What to do where the text does not say.
    """
    text = " ".join(str(error).split())
    parts = _ADVICE.split(text, maxsplit=1)
    return Missing(parts[0], parts[1] if len(parts) > 1 else otherwise)


def without_advice(missing: Missing) -> Missing:
    """The same with the advice of an error taken out of `what`: `how` says it better."""
    what = _ADVICE.split(missing.what, maxsplit=1)[0]
    return Missing(_NAMED_TWICE.sub("", " ".join(what.split())), missing.how)


def missing_device(device: str) -> list[Missing]:
    """Whether this machine has the device that `model.device` asks for."""
    kind, _, number = device.partition(":")
    cpu = "set model.device to cpu or auto"
    if kind == "cuda" and not torch.cuda.is_available():
        return [Missing("device cuda: torch sees no GPU on this machine", cpu)]
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        return [Missing(f"device {device}: this machine has {count} GPUs", "set model.device")]
    if kind == "mps" and not torch.backends.mps.is_available():
        return [Missing("device mps: torch sees no Apple GPU on this machine", cpu)]
    return []


def missing_model(name: str) -> list[Missing]:
    """Whether a model's files are here, or can be fetched.

    Args:
        name: `packaged:NAME`, a folder, a hub name, or an alias of TransformerLens.
    """
    otherwise = "set model.name to a folder, a hub name or packaged:smollm2-135m"
    try:
        if name.startswith(PACKAGED_PREFIX):
            return _missing_packaged(name)
        folder = local_folder(name)
        if folder is None:
            hub_name: str | None = hub_name_of(name)
            folder = model_config_folder(str(hub_name))
            if not has_all_weights(folder):
                _require_access(str(hub_name))
        else:
            hub_name = None
            if not has_all_weights(folder):
                return [
                    Missing(
                        f"weights of the model in {folder}: it has a config.json alone",
                        "save the whole model with save_pretrained",
                    )
                ]
        require_supported(folder, transformer_lens_name(read_config(folder), hub_name))
    except InputError as error:
        return [as_missing(error, otherwise)]
    return []


def misfits(name: str, subjects: Sequence[Subject]) -> list[Missing]:
    """SAEs that cannot be of this model: a layer too many, another width.

    Args:
        name: A model whose config can be had.
        subjects: The SAEs.
    """
    shape = describe_model(name)
    found: list[Missing] = []
    for subject in subjects:
        problem = _misfit(subject, shape)
        if problem is not None:
            found.append(
                Missing(
                    f"SAE {subject.name!r} does not fit model {name}: {problem}",
                    "leave it out, or give the model that it was trained on (--model)",
                )
            )
    return found


def tokenizer_folder(name: str) -> Path | None:
    """A folder with a model's tokenizer, fetched if need be; None where it cannot be had."""
    try:
        if name.startswith(PACKAGED_PREFIX):
            return prepare_packaged_model(name)
        folder = local_folder(name)
        if folder is not None:
            return folder
        hub_name = hub_name_of(name)
        folder = model_config_folder(hub_name)
    except InputError:
        return None
    if any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return folder
    try:
        require_repository(hub_name, "model")  # without a network at once
        return Path(snapshot_download(hub_name, allow_patterns=_TEXT_FILES))
    # As in hub_access: the errors of a failed connection share no base class but Exception.
    except Exception:  # noqa: BLE001
        return None


def _missing_packaged(name: str) -> list[Missing]:
    package = packaged_model(name)
    if not is_installed(package):
        return [
            Missing(
                f"package {package.distribution} (model {name})",
                install_command(package),
            )
        ]
    converted = any(default_cache_dir().glob(f"{package.key}-*"))
    if not converted and importlib.util.find_spec("gguf") is None:
        return [Missing(f"package gguf, which reads model {name}", "pip install gguf")]
    return []


def _require_access(hub_name: str) -> None:
    require_repository(hub_name, "model")
    try:
        # Anyone may see a gated repository; its files need accepted terms and a token.
        HfApi().auth_check(hub_name)
    # As in hub_access.
    except Exception as error:
        raise InputError(explain_hub_error(hub_name, "model", error)) from error


def _misfit(subject: Subject, shape: ModelShape) -> str | None:
    try:
        validate_hook(subject.hook_name, shape.n_layers)
    except InputError as error:
        return str(error)
    d_in = subject.sae.cfg.d_in
    if "hook_resid" in subject.hook_name and d_in != shape.d_model:
        return f"it has d_in {d_in}, the residual stream is {shape.d_model} wide"
    return None
