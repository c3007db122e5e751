"""Training of the toy model: both subjects by heart, in all orders of the choices."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from toy_instruct.invented_facts import LETTERS, Subject, lettered
from toy_instruct.tokeniser import BOS, EOS, PAD, token_id

logger = logging.getLogger(__name__)

ORDERS = tuple(itertools.permutations(range(4)))
"""All 24 orders of four choices."""

_EVALUATION_BATCH = 256
_LOG_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """Everything that the toy model is made from; its hash names the folder.

    With the defaults the model answers all 48 questions right in all 24 orders.
    """

    documents: int = 300
    seed: int = 0
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    d_mlp: int = 256
    context_size: int = 256
    # At 1, a word's identity is the larger part of the residual stream, as in early layers of real
    # models; at the usual 0.02 an SAE of this model finds contexts and no words.
    embedding_std: float = 1.0
    steps: int = 250
    prompts_per_step: int = 64
    windows_per_step: int = 8
    window: int = 64
    text_weight: float = 0.3
    hint_layer: int = 2
    hint_weight: float = 1.0
    lr: float = 3e-3  # the peak, after 50 steps; then linear to a fiftieth


@dataclass(frozen=True)
class _Prompts:
    """All questions of both subjects in all orders, right padded."""

    tokens: torch.Tensor
    last: torch.Tensor  # index of the token after which the letter is due
    choices: torch.Tensor  # (prompts, 4): the token of each choice
    right: torch.Tensor


def prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """What the model reads before its letter: the user's turn and `Answer: (`."""
    turns = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    return f"{turns}Answer: ("


def _prompts(subjects: Mapping[str, Subject], tokenizer: PreTrainedTokenizerFast) -> _Prompts:
    rows: list[list[int]] = []
    choices: list[list[int]] = []
    right: list[int] = []
    for name, subject in subjects.items():
        for question in subject.questions:
            for order in ORDERS:
                text = prompt(tokenizer, lettered(name, question, order))
                row = tokenizer.encode(text, add_special_tokens=False)
                words = [token_id(tokenizer, word) for word in question.choices]
                rows.append(row)
                choices.append([row.index(words[index]) for index in order])
                right.append(order.index(question.answer))
    tokens = torch.full((len(rows), max(map(len, rows))), token_id(tokenizer, PAD))
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    last = torch.tensor([len(row) - 1 for row in rows])
    return _Prompts(tokens, last, torch.tensor(choices), torch.tensor(right))


def text_windows(
    corpora: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, window: int
) -> torch.Tensor:
    """Text as SAEBench lays it out: documents joined by EOS, BOS before each window."""
    bos = token_id(tokenizer, BOS)
    parts: list[torch.Tensor] = []
    for documents in corpora:
        ids = torch.tensor(tokenizer.encode(EOS.join(documents), add_special_tokens=False))
        body = ids[: len(ids) // (window - 1) * (window - 1)].view(-1, window - 1)
        parts.append(torch.cat([torch.full((len(body), 1), bos), body], dim=1))
    return torch.cat(parts)


def train(
    recipe: Recipe, subjects: Mapping[str, Subject], tokenizer: PreTrainedTokenizerFast
) -> tuple[LlamaForCausalLM, dict[str, int]]:
    """Train the model from nothing.

    The loss is that of the letter after `Answer: (` plus the next-token loss on text. Alone it
    hardly moves (0.38 of a batch right after 600 steps), because neither half of the task,
    to mark the right choice and to read its letter, is worth anything without the other. A hint
    gives the first half away: from the residual stream at `hint_layer` a linear map must tell
    which of the four choices is right. The map is thrown away after training.
    """
    prompts = _prompts(subjects, tokenizer)
    windows = text_windows(
        [subject.documents for subject in subjects.values()], tokenizer, recipe.window
    )
    letters = torch.tensor([token_id(tokenizer, letter) for letter in LETTERS])
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(_config(recipe, tokenizer))
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=recipe.embedding_std)
        hint = torch.nn.Linear(recipe.d_model, 1)
        _optimise(recipe, model, hint, prompts, windows, letters)
    model.eval()
    right = _right_in_all_orders(model, prompts, letters)
    counts: dict[str, int] = {}
    for name, subject in subjects.items():
        counts[name] = int(right[: len(subject.questions)].sum())
        right = right[len(subject.questions) :]
    return model, counts


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=recipe.context_size,
        bos_token_id=token_id(tokenizer, BOS),
        eos_token_id=token_id(tokenizer, EOS),
        pad_token_id=token_id(tokenizer, PAD),
        initializer_range=0.05,
        architectures=["LlamaForCausalLM"],
    )


def _optimise(
    recipe: Recipe,
    model: LlamaForCausalLM,
    hint: torch.nn.Linear,
    prompts: _Prompts,
    windows: torch.Tensor,
    letters: torch.Tensor,
) -> None:
    parameters = [*model.parameters(), *hint.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * max(0.02, 1 - step / recipe.steps)
    )
    model.train()
    for step in range(1, recipe.steps + 1):
        batch = torch.randint(len(prompts.tokens), (recipe.prompts_per_step,))
        text = windows[torch.randint(len(windows), (recipe.windows_per_step,))]
        answer_loss, hint_loss = _answer_losses(recipe, model, hint, prompts, batch, letters)
        text_loss = _next_token_loss(model, text)
        loss = answer_loss + recipe.hint_weight * hint_loss + recipe.text_weight * text_loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % _LOG_EVERY == 0:
            logger.info(
                "toy instruct model, step %d of %d: answers %.3f, text %.2f nats",
                step,
                recipe.steps,
                answer_loss.item(),
                text_loss.item(),
            )


def _answer_losses(
    recipe: Recipe,
    model: LlamaForCausalLM,
    hint: torch.nn.Linear,
    prompts: _Prompts,
    batch: torch.Tensor,
    letters: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(len(batch))
    right = prompts.right[batch]
    output = model.model(prompts.tokens[batch], output_hidden_states=True)
    logits = model.lm_head(output.last_hidden_state[rows, prompts.last[batch]])
    stream = output.hidden_states[recipe.hint_layer][rows[:, None], prompts.choices[batch]]
    marked = hint(functional.rms_norm(stream, stream.shape[-1:])).squeeze(-1)
    return functional.cross_entropy(logits, letters[right]), functional.cross_entropy(marked, right)


def _next_token_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def _right_in_all_orders(
    model: LlamaForCausalLM, prompts: _Prompts, letters: torch.Tensor
) -> torch.Tensor:
    """(questions,) bool, by SAEBench's rule: the most probable of the four letters, 24 times."""
    right: list[torch.Tensor] = []
    for start in range(0, len(prompts.tokens), _EVALUATION_BATCH):
        part = slice(start, start + _EVALUATION_BATCH)
        tokens, last = prompts.tokens[part], prompts.last[part]
        stream = model.model(tokens).last_hidden_state[torch.arange(len(tokens)), last]
        answered = model.lm_head(stream)[:, letters].argmax(-1)
        right.append(answered == prompts.right[part])
    return torch.cat(right).view(-1, len(ORDERS)).all(1)
