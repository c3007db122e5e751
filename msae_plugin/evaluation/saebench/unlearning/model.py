"""Multiple-choice prompts for any instruct model, and the probabilities of its letters.

SAEBench writes its prompts for two Gemma models by name. Here the turns come from the tokenizer's
chat template; the text of the question stays SAEBench's. For Gemma's template both are the same,
token for token (tests/evaluation/saebench/test_unlearning_prompts.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from msae_plugin.common.errors import InputError, RunFailure

LETTERS = "ABCD"
_PLACE = "THE-QUESTION-GOES-HERE"
# What SAEBench puts before a letter, at the end of its prompt.
_BEFORE_LETTER = "("


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer's turns around one message of the user.

    Args:
        prefix: Text before the message.
        suffix: Text after it, up to where the model's answer begins.
        prepend_bos: Whether a BOS token is put before the text. It is where the template has
            none and the tokenizer has one that is not itself a turn marker.
        has_bos: Whether a prompt begins with BOS, from the template or prepended. SAEBench never
            intervenes at the first position.
    """

    prefix: str
    suffix: str
    prepend_bos: bool
    has_bos: bool

    @property
    def for_saebench(self) -> str:
        """In place of `GEMMA_INST_FORMAT`, which SAEBench calls `.format(prompt=...)` on."""
        before, after = (
            part.replace("{", "{{").replace("}", "}}") for part in (self.prefix, self.suffix)
        )
        return f"{before}{{prompt}}{after}"


def chat_format(
    tokenizer: PreTrainedTokenizerBase, name: str, *, default_prepend_bos: bool = True
) -> ChatFormat:
    """Read the turns off a tokenizer's chat template.

    The template is filled with a mark in place of the question: templates trim the message, and
    SAEBench does not.

    Args:
        tokenizer: Of an instruct model.
        name: The model's name, for messages.
        default_prepend_bos: Whether the model expects BOS where the template has none.

    Raises:
        InputError: The tokenizer has no chat template, or one that cannot hold a question.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"unlearning: the tokenizer of {name} has no chat template: give an instruct model as "
            "unlearning.model, or save the template with the tokenizer"
        )
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACE}], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"unlearning: the chat template of {name} fails ({error}): correct it"
        ) from error
    parts = str(text).split(_PLACE)
    if len(parts) != 2:
        raise InputError(
            f"unlearning: the chat template of {name} repeats or drops the message: correct it"
        )
    prefix, suffix = parts
    bos = tokenizer.bos_token
    if not isinstance(bos, str) or not bos:
        return ChatFormat(prefix, suffix, prepend_bos=False, has_bos=False)
    if bos in prefix.removeprefix(bos) + suffix:  # BOS is one of the turn markers
        return ChatFormat(prefix, suffix, prepend_bos=False, has_bos=False)
    in_template = prefix.startswith(bos)
    prepend = not in_template and default_prepend_bos
    return ChatFormat(prefix, suffix, prepend_bos=prepend, has_bos=in_template or prepend)


def letter_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> list[list[int]]:
    """The single tokens that answer A, B, C and D.

    Looked for are the letters alone and with a space before, which is what SAEBench counts for
    Gemma, and as they are cut after the `(` that ends the prompt: some tokenizers have another
    token for the start of a text.

    Args:
        tokenizer: Of an instruct model.
        name: The model's name, for messages.

    Returns:
        One to three different lists of four token ids.

    Raises:
        InputError: None of the ways gives single tokens.
    """
    opening = tokenizer.encode(_BEFORE_LETTER, add_special_tokens=False)
    found: list[list[int]] = []
    for written in ("{}", " {}", _BEFORE_LETTER + "{}"):
        ids = [
            tokenizer.encode(written.format(letter), add_special_tokens=False) for letter in LETTERS
        ]
        if written.startswith(_BEFORE_LETTER):
            ids = [row[len(opening) :] for row in ids if row[: len(opening)] == opening]
        # A letter that the vocabulary does not know is one token too.
        single = [row[0] for row in ids if len(row) == 1 and row[0] != tokenizer.unk_token_id]
        if len(set(single)) == len(LETTERS) and single not in found:
            found.append(single)
    if not found:
        raise InputError(
            f"unlearning: the tokenizer of {name} has no single tokens for A, B, C and D: the "
            "evaluation compares the probabilities of single tokens"
        )
    return found


class LetterAnswers:
    """In place of SAEBench's `get_output_probs_abcd`, for any tokenizer.

    Args:
        model: The model, hooks and all.
        chat: Its turns.
        letters: From `letter_tokens`.
        progress: Called with the number of answered and of all batches.
    """

    def __init__(
        self,
        model: HookedTransformer,
        chat: ChatFormat,
        letters: Sequence[Sequence[int]],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._model = model
        self._tokenizer: Any = model.tokenizer
        self._chat = chat
        self._letters = letters
        self.progress = progress

    @torch.no_grad()
    def __call__(
        self,
        model: HookedTransformer,
        prompts: Sequence[str],
        batch_size: int = 2,
        n_batches: int = 100,
        verbose: bool = True,
    ) -> torch.Tensor:
        """Probabilities of the letters after each prompt, the larger of a letter's tokens.

        Args:
            model: The model of this object.
            prompts: Texts, the turns included.
            batch_size: Prompts at a time.
            n_batches: Batches to answer.
            verbose: SAEBench's switch for its progress bar.

        Returns:
            (prompts, 4) in the model's dtype.

        Raises:
            RunFailure: A prompt does not fit into the model's context, or has more than one BOS.
        """
        del verbose
        if model is not self._model:
            raise RunFailure("unlearning: SAEBench asks another model than it was given")
        device = self._model.cfg.device
        letters = torch.tensor(self._letters, device=device)
        answers: list[torch.Tensor] = []
        for index in range(n_batches):
            if self.progress is not None:
                self.progress(index, n_batches)
            rows = [
                self.tokens(text) for text in prompts[index * batch_size : (index + 1) * batch_size]
            ]
            tokens = self._padded(rows).to(device)
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            # Padded on the right whatever the tokenizer's habit: a causal model does not see it.
            logits = self._model(tokens, return_type="logits", padding_side="right")
            chosen = logits[torch.arange(len(rows), device=device), last].softmax(-1)
            by_variant = chosen[:, letters.flatten()].reshape(-1, len(letters), len(LETTERS))
            answers.append(by_variant.max(dim=1)[0])
        return torch.vstack(answers)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a prompt, with exactly one BOS at its front where the model has one.

        Raises:
            RunFailure: It does not fit into the model's context, or has a BOS elsewhere.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        bos = self._tokenizer.bos_token_id
        if self._chat.prepend_bos:
            ids = [bos, *ids]
        if self._chat.has_bos and (ids[0] != bos or ids.count(bos) != 1):
            raise RunFailure(
                f"unlearning: a prompt has {ids.count(bos)} BOS tokens where one belongs at its "
                "front: a question contains the text of one"
            )
        if len(ids) > self._model.cfg.n_ctx:
            raise RunFailure(
                f"unlearning: a prompt of {len(ids)} tokens does not fit into the model's context "
                f"of {self._model.cfg.n_ctx}: leave long questions out"
            )
        return ids

    def fingerprint(self, prompts: Sequence[str]) -> str:
        """Hash of the token ids of prompts and letters: of tokenizer, turns and questions."""
        content = repr(([self.tokens(text) for text in prompts], self._letters))
        return hashlib.sha256(content.encode()).hexdigest()

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        padding = self._tokenizer.pad_token_id
        tokens = torch.full((len(rows), max(map(len, rows))), 0 if padding is None else padding)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        return tokens
