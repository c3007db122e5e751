from __future__ import annotations

import pytest
import torch
from sae_lens.tokenization_and_batching import concat_and_batch_sequences

from msae_plugin.common.errors import InputError
from msae_plugin.data.windows import iterate_windows, require_texts, tokenise


@pytest.fixture
def transformer(tiny_language_model):
    return tiny_language_model


@pytest.fixture
def texts(tiny_texts) -> list[str]:
    return [text[: 40 + 17 * (i % 3)] for i, text in enumerate(tiny_texts[:6])]


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("context_size", [4, 7, 16])
def test_windows_are_those_of_saelens_training(transformer, texts, context_size, prepend_bos):
    bos = transformer.tokenizer.bos_token_id
    ours = [
        window.tokens
        for window in iterate_windows(
            transformer.model,
            transformer.tokenizer,
            texts,
            context_size,
            prepend_bos=prepend_bos,
        )
    ]
    theirs = list(
        concat_and_batch_sequences(
            (torch.tensor(tokenise(transformer.model, text)) for text in texts),
            context_size=context_size,
            begin_batch_token_id=bos if prepend_bos else None,
            sequence_separator_token_id=bos,
        )
    )
    assert len(theirs) > 3
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_every_token_knows_its_document(transformer, texts):
    windows = list(iterate_windows(transformer.model, transformer.tokenizer, texts, 8))
    tokens = torch.cat([window.tokens for window in windows])
    documents = torch.cat([window.documents for window in windows])
    bos = transformer.tokenizer.bos_token_id
    whole_documents = documents.unique()[:-1].tolist()  # the last one may be cut off
    assert len(whole_documents) >= 4
    for document in whole_documents:
        own = tokens[(documents == document) & (tokens != bos)]
        assert own.tolist() == tokenise(transformer.model, texts[document])


def test_empty_documents_are_passed_over_but_counted(transformer):
    first = len(tokenise(transformer.model, "rose soil"))
    texts = ["", "rose soil", "  ", "rope sail anchor wave tide"]
    window = next(iterate_windows(transformer.model, transformer.tokenizer, texts, first + 4))
    assert window.documents.tolist() == [1] * (first + 1) + [3] * 3


def test_no_text_is_refused():
    with pytest.raises(InputError, match="heldout_documents"):
        require_texts(["", " "])
