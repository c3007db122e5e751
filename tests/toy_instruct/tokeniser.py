"""A tokeniser of whole words with Gemma's turn markers and Gemma's chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, PAD, EOS, UNKNOWN = "<bos>", "<pad>", "<eos>", "<unk>"
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# The template that google/gemma-2-2b-it carries, less its refusal of system messages.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

_SPECIAL = (PAD, EOS, BOS, UNKNOWN, START_OF_TURN, END_OF_TURN)


def word_tokeniser(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokeniser that knows the words and punctuation marks of some texts.

    White space separates and is not kept: `A` and ` A` are one token, as multiple-choice letters
    need. Words are numbered in the order in which they occur.
    """
    vocabulary = {token: number for number, token in enumerate(_SPECIAL)}
    for text in texts:
        # What `pre_tokenizers.Whitespace` cuts text into, by its documentation.
        for word in re.findall(r"\w+|[^\w\s]+", text):
            vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
    )


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token."""
    # Typed for lists of tokens as well.
    return int(tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]
