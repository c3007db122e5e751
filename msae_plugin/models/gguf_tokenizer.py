"""The tokenizer that a GGUF file describes, for the two kinds that packaged models have.

The same tokenizer as transformers 5.24 makes of the file (tests compare the saved files), whichever
version is installed: 5.23 put a space before every text of Gemma's, and so gave most texts another
first token. Gemma's file has no merges; finding them takes 1.4 s here and 5 s there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GemmaTokenizer, PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a GGUF file.

    Raises:
        ValueError: If it is neither Gemma's SentencePiece nor byte-level BPE.
    """
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
    return {
        **settings,
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", add_bos_token),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }


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
