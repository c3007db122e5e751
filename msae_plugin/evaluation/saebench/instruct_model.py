"""The instruct model of the unlearning evaluation: prompts, known answers, SAEBench's code adapted.

SAEBench writes its prompts for two Gemma models by name. Here the turns come from the tokenizer's
chat template; the text of the question stays SAEBench's. For Gemma's template both are the same,
token for token (tests/evaluation/saebench/test_unlearning_prompts.py).

SAEBench asks every question in all 24 orders of its choices, with and without the question itself:
by far most of the evaluation's work, and the same for every SAE. Its files are written by its own
code into a keyed folder, and copied from there into the artifacts of each SAE.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jinja2 import TemplateError
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from sae_bench.sae_bench_utils import activation_collection
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.hook_points import HookPoint, LensHandle
from transformers import PreTrainedTokenizerBase

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import kept_folder
from msae_plugin.common.progress import Report
from msae_plugin.evaluation.outcomes import ModelContext
from msae_plugin.evaluation.saebench.patching import all_replaced, evaluation_environment

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

LETTERS = "ABCD"
_PLACE = "THE-QUESTION-GOES-HERE"
# What SAEBench puts before a letter, at the end of its prompt.
_BEFORE_LETTER = "("


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer's turns around one message of the user."""

    prefix: str
    suffix: str  # text after it, up to where the model's answer begins
    # Whether a BOS token is put before the text. It is where the template has none and the
    # tokenizer has one that is not itself a turn marker.
    prepend_bos: bool
    # Whether a prompt begins with BOS, from the template or prepended. SAEBench never intervenes at
    # the first position.
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
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"unlearning: the tokenizer of {name} has no chat template",
            "give an instruct model as unlearning.model, or save the template with the tokenizer",
        )
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACE}], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"unlearning: the chat template of {name} fails ({error})", "correct it"
        ) from error
    parts = str(text).split(_PLACE)
    if len(parts) != 2:
        raise InputError(
            f"unlearning: the chat template of {name} repeats or drops the message", "correct it"
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


@dataclass
class LetterAnswers:
    """In place of SAEBench's `get_output_probs_abcd`, for any tokenizer."""

    model: HookedTransformer  # hooks and all
    chat: ChatFormat
    letters: Sequence[Sequence[int]]  # of `letter_tokens`
    # Called with the number of answered and of all batches.
    progress: Callable[[int, int], None] | None = None

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

        (prompts, 4) in the model's dtype.
        """
        del verbose
        if model is not self.model:
            raise RunFailure("unlearning: SAEBench asks another model than it was given")
        tokenizer: Any = self.model.tokenizer
        device, padding = self.model.cfg.device, tokenizer.pad_token_id or 0
        letters = torch.tensor(self.letters, device=device)
        answers: list[torch.Tensor] = []
        for index in range(n_batches):
            if self.progress is not None:
                self.progress(index, n_batches)
            rows = [
                self.tokens(text) for text in prompts[index * batch_size : (index + 1) * batch_size]
            ]
            # Padded on the right whatever the tokenizer's habit: a causal model does not see it.
            tokens = pad_sequence([torch.tensor(row) for row in rows], True, padding).to(device)
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            logits = self.model(tokens, return_type="logits", padding_side="right")
            chosen = logits[torch.arange(len(rows), device=device), last].softmax(-1)
            by_variant = chosen[:, letters.flatten()].reshape(-1, len(letters), len(LETTERS))
            answers.append(by_variant.max(dim=1)[0])
        return torch.vstack(answers)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a prompt, with exactly one BOS at its front where the model has one."""
        tokenizer: Any = self.model.tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        bos = tokenizer.bos_token_id
        if self.chat.prepend_bos:
            ids = [bos, *ids]
        if self.chat.has_bos and (ids[0] != bos or ids.count(bos) != 1):
            raise RunFailure(
                f"unlearning: a prompt has {ids.count(bos)} BOS tokens where one belongs at its "
                "front: a question contains the text of one"
            )
        if len(ids) > self.model.cfg.n_ctx:
            raise RunFailure(
                f"unlearning: a prompt of {len(ids)} tokens does not fit into the model's context "
                f"of {self.model.cfg.n_ctx}: leave long questions out"
            )
        return ids


_DATA = "data"
# It orders the ids in SAEBench's train and test files, which nothing reads: not the run's seed.
_SPLIT_SEED = 0


def json_sha256(value: Any) -> str:
    """Hash of questions or documents as JSON, whatever file they came in."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions under one of SAEBench's names."""

    name: str  # SAEBench's name
    source: str  # where they are from: a path or a hub name
    rows: list[dict[str, Any]]  # `question`, `choices` (4 texts) and `answer` (0 to 3) of each


@dataclass(frozen=True)
class Documents:
    """A text to find features on."""

    source: str  # where they are from: a path or a hub name
    documents: list[str]  # their text


@dataclass(frozen=True)
class Knowledge:
    """The model's knowledge of one set of questions."""

    questions: Questions
    answerable: int  # how many it answers right in all 24 orders
    folder: Path  # folder with SAEBench's files on them

    def copy_to(self, artifacts: Path) -> None:
        """Put SAEBench's files where its code looks for them."""
        shutil.copytree(self.folder / _DATA, artifacts / _DATA, dirs_exist_ok=True)


def instruct_model(context: ModelContext) -> HookedTransformer:
    """The model; the preflight refuses every other class."""
    return cast("HookedTransformer", context.language_model.model)


def find_knowledge(
    context: ModelContext,
    answers: LetterAnswers,
    questions: Mapping[str, Questions],
    batch_size: int,
    report: Report,
) -> dict[str, Knowledge]:
    """Ask all questions, or read what was answered before. SAEBench must be adapted already."""
    found: dict[str, Knowledge] = {}
    for name, asked in questions.items():
        prompts = [
            metrics.convert_wmdp_data_to_prompt(
                row["question"], row["choices"], prompt_format="GEMMA_INST_FORMAT"
            )
            for row in asked.rows
        ]
        tokens = repr(([answers.tokens(text) for text in prompts], answers.letters))
        key = {
            **context.key("sae-bench", "transformer-lens", "torch", "transformers", "tokenizers"),
            "name": name,
            "questions": json_sha256(asked.rows),
            "tokens": hashlib.sha256(tokens.encode()).hexdigest(),
            "batch_size": batch_size,
        }
        answers.progress = partial(report, f"unlearning: asking {name} in all orders")
        try:
            ask = partial(_ask, answers.model, name, batch_size)
            folder = kept_folder(context.cache, "unlearning", key, ask)
        finally:
            answers.progress = None
        found[name] = Knowledge(asked, len(_answerable(folder, name)), folder)
    return found


def _ask(model: HookedTransformer, name: str, batch_size: int, folder: Path) -> None:
    with evaluation_environment(_SPLIT_SEED):
        metrics.save_target_question_ids(model, batch_size, str(folder), name)
        # Without any answerable question SAEBench's baseline stacks an empty list.
        if len(_answerable(folder, name)):
            metrics.get_baseline_metrics(
                model, batch_size, str(folder), name, {"target_metric": "correct"}
            )


def _answerable(folder: Path, name: str) -> list[int]:
    """Indices of the questions that are answered right in all orders."""
    full_name = name if name == "wmdp-bio" else f"mmlu-{name.replace('_', '-')}"
    file = folder / _DATA / "question_ids" / "all" / f"{full_name}_correct.csv"
    return [int(line) for line in file.read_text().split()]


NAME_WITH_A_FORMAT = "gemma-2-2b-it"
"""A name for which `calculate_MCQ_metrics` takes `GEMMA_INST_FORMAT`; it refuses all others."""


@contextmanager
def adapted(
    model: HookedTransformer,
    chat: ChatFormat,
    answers: LetterAnswers,
    questions: Mapping[str, Questions],
) -> Generator[None, None, None]:
    """Let SAEBench ask this model these questions, for the time of the block."""

    def load_dataset_with_retries(
        _path: str, dataset_name: str, *_arguments: Any, **_options: Any
    ) -> list[dict[str, Any]]:
        return questions[dataset_name].rows

    def load_dataset_from_name(dataset_name: str) -> list[dict[str, Any]]:
        return questions[dataset_name].rows

    with (
        all_replaced(
            (metrics, "load_dataset_with_retries", load_dataset_with_retries),
            (metrics, "load_dataset_from_name", load_dataset_from_name),
            (metrics, "GEMMA_INST_FORMAT", chat.for_saebench),
            (metrics, "get_output_probs_abcd", answers),
            (model.cfg, "model_name", NAME_WITH_A_FORMAT),
        ),
        hooks_set_aside(model),
    ):
        yield


@contextmanager
def corpora_and_sweep(
    forget: Documents,
    retain: Documents,
    windows_seen: Callable[[torch.Tensor, torch.Tensor], None],  # (windows, seq_len), twice
    progress: Callable[[int, int], None],  # interventions that are done, and all of them
) -> Generator[None, None, None]:
    """Let SAEBench count features on these texts and report the sweep, in the block."""
    shuffled_tokens = feature_activation.get_shuffled_forget_retain_tokens

    def get_forget_retain_data(
        *_names: str, min_len: int = 50, **_sizes: int
    ) -> tuple[list[str], list[str]]:
        return _longer(forget, min_len), _longer(retain, min_len)

    def get_shuffled_forget_retain_tokens(
        *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = shuffled_tokens(*arguments, **options)
        for corpus, windows in zip((forget, retain), tokens, strict=True):
            if len(windows) == 0:
                raise RunFailure(
                    f"unlearning: {corpus.source} does not fill one window: lower "
                    "unlearning.seq_len or give more text"
                )
        windows_seen(*tokens)
        return tokens

    def sweep(settings: Iterable[Any], *_arguments: Any, **_options: Any) -> Iterable[Any]:
        listed = list(settings)
        for index, setting in enumerate(listed):
            progress(index, len(listed))
            yield setting

    def silent(items: Iterable[Any], *_arguments: Any, **_options: Any) -> Iterable[Any]:
        return items

    shuffled: Any = get_shuffled_forget_retain_tokens
    with all_replaced(
        (feature_activation, "get_forget_retain_data", get_forget_retain_data),
        (feature_activation, "get_shuffled_forget_retain_tokens", shuffled),
        (metrics, "tqdm", sweep),
        (activation_collection, "tqdm", silent),
    ):
        yield


def _longer(corpus: Documents, min_len: int) -> list[str]:
    documents = [text for text in corpus.documents if len(text) > min_len]
    if not documents:
        raise InputError(
            f"unlearning: no document of {corpus.source} is longer than {min_len} characters, and "
            "SAEBench reads only those"
        )
    return documents


@contextmanager
def hooks_set_aside(model: HookedTransformer) -> Generator[None, None, None]:
    """Run without the hooks that somebody has put on the model, and put them back.

    SAEBench resets all hooks between its steps, and what it computes with them on would differ
    from what it computes after. A hook that an SAE's failed evaluation leaves is removed.
    """
    points = list(model.hook_dict.values())
    directions: tuple[Literal["fwd", "bwd"], ...] = ("fwd", "bwd")
    handles: list[tuple[HookPoint, LensHandle, Literal["fwd", "bwd"]]] = [
        (point, handle, direction)
        for direction in directions
        for point in points
        for handle in (point.fwd_hooks if direction == "fwd" else point.bwd_hooks)
    ]
    if any(handle.is_permanent for _, handle, _ in handles):
        raise InputError(
            "unlearning: the model has permanent hooks, with which it is another model",
            "call model.reset_hooks(including_permanent=True)",
        )
    contexts = {name: dict(point.ctx) for name, point in model.hook_dict.items()}
    model.reset_hooks()
    try:
        yield
    finally:
        model.reset_hooks()
        for point, handle, direction in handles:
            if handle.user_hook is not None:  # TransformerLens keeps it for every `add_hook`
                point.add_hook(handle.user_hook, dir=direction, level=handle.context_level)
        for name, context in contexts.items():
            model.hook_dict[name].ctx.update(context)
