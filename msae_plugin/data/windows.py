"""Text to windows of tokens, laid out as in training, each token knowing its document.

SAELens trains on documents that are joined with BOS between them and cut into windows of
`context_size` (`sae_lens.tokenization_and_batching.concat_and_batch_sequences`). Held-out text is
laid out the same way here; unlike SAELens' generator this one also says which document a token is
from, which contexts need to stay inside one document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msae_plugin.common.errors import InputError


@dataclass(frozen=True)
class Window:
    """One window of tokens."""

    tokens: torch.Tensor  # (context_size,) long, the model's input
    # (context_size,) long, index of the text that each token is from. A BOS in front of a document
    # counts as that document's.
    documents: torch.Tensor


def tokenise(model: Any, text: str) -> list[int]:
    """Token ids of one text without BOS, by the same call as SAELens' activation store."""
    tokens: torch.Tensor = model.to_tokens(
        text, truncate=False, move_to_device=False, prepend_bos=False
    )
    ids: list[int] = tokens.squeeze(0).tolist()
    return ids


def iterate_windows(
    model: Any, tokenizer: Any, texts: Iterable[str], context_size: int, *, prepend_bos: bool = True
) -> Iterator[Window]:
    """Windows of exactly `context_size` tokens; the unfilled last one is dropped, as in training.

    Empty texts are passed over, but counted. Memory does not grow with the number of texts.
    """
    bos: int | None = tokenizer.bos_token_id
    begin = bos if prepend_bos else None
    tokens: list[int] = []
    documents: list[int] = []
    for document, text in enumerate(texts):
        if not text.strip():
            continue
        ids = tokenise(model, text)
        offset = 0
        while offset < len(ids):
            # SAELens separates documents with BOS even where windows do not begin with it.
            prefix = bos if tokens else begin
            if prefix is not None and ids[offset] != prefix:
                tokens.append(prefix)
                documents.append(document)
            part = ids[offset : offset + context_size - len(tokens)]
            tokens.extend(part)
            documents.extend([document] * len(part))
            offset += len(part)
            if len(tokens) == context_size:
                yield Window(torch.tensor(tokens), torch.tensor(documents))
                tokens, documents = [], []


def batched_windows(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Group windows into lists of at most `size`."""
    batch: list[Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def require_texts(texts: Sequence[str]) -> None:
    """Refuse an empty list of held-out texts before a model runs."""
    if not any(text.strip() for text in texts):
        raise InputError(
            "held-out text: there is no document in it; raise data.heldout_documents or give a "
            "larger corpus"
        )
