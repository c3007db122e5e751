"""What of SAEBench's unlearning code and of the model is changed while it runs, and put back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from sae_bench.sae_bench_utils import activation_collection
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint, LensHandle

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.evaluation.saebench.patching import replaced
from msae_plugin.evaluation.saebench.unlearning.data import Corpus, Questions
from msae_plugin.evaluation.saebench.unlearning.model import ChatFormat, LetterAnswers

NAME_WITH_A_FORMAT = "gemma-2-2b-it"
"""A name for which `calculate_MCQ_metrics` takes `GEMMA_INST_FORMAT`; it refuses all others."""

WindowsSeen = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes the windows of tokens on which features are counted: (windows, seq_len), twice."""

Progress = Callable[[int, int], None]
"""Takes how many interventions are done, and how many there are."""


@contextmanager
def adapted(
    model: HookedTransformer,
    chat: ChatFormat,
    answers: LetterAnswers,
    questions: Mapping[str, Questions],
) -> Generator[None, None, None]:
    """Let SAEBench ask this model these questions, for the time of the block."""

    def load_dataset_with_retries(
        dataset_path: str, dataset_name: str, split: str, retries: int = 5, delay: int = 20
    ) -> list[dict[str, Any]]:
        del dataset_path, split, retries, delay
        return questions[dataset_name].rows

    def load_dataset_from_name(dataset_name: str) -> list[dict[str, Any]]:
        return questions[dataset_name].rows

    with ExitStack() as stack:
        for owner, name, value in (
            (metrics, "load_dataset_with_retries", load_dataset_with_retries),
            (metrics, "load_dataset_from_name", load_dataset_from_name),
            (metrics, "GEMMA_INST_FORMAT", chat.for_saebench),
            (metrics, "get_output_probs_abcd", answers),
            (model.cfg, "model_name", NAME_WITH_A_FORMAT),
        ):
            stack.enter_context(replaced(owner, name, value))
        stack.enter_context(hooks_set_aside(model))
        yield


@contextmanager
def corpora_and_sweep(
    forget: Corpus,
    retain: Corpus,
    windows_seen: WindowsSeen,
    progress: Progress,
) -> Generator[None, None, None]:
    """Let SAEBench count features on these texts and report the sweep, in the block."""
    shuffled_tokens = feature_activation.get_shuffled_forget_retain_tokens

    def get_forget_retain_data(
        forget_corpora: str = "bio-forget-corpus",
        retain_corpora: str = "wikitext",
        min_len: int = 50,
        max_len: int = 2000,
        batch_size: int = 4,
    ) -> tuple[list[str], list[str]]:
        del forget_corpora, retain_corpora, max_len, batch_size
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

    with ExitStack() as stack:
        for owner, name, value in (
            (feature_activation, "get_forget_retain_data", get_forget_retain_data),
            (
                feature_activation,
                "get_shuffled_forget_retain_tokens",
                get_shuffled_forget_retain_tokens,
            ),
            (metrics, "tqdm", sweep),
            (activation_collection, "tqdm", silent),
        ):
            stack.enter_context(replaced(owner, name, value))
        yield


def _longer(corpus: Corpus, min_len: int) -> list[str]:
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

    Raises:
        InputError: The model has permanent hooks, which change what no cache key covers.
    """
    points = list(model.hook_dict.values())
    forward = [(point, handle) for point in points for handle in point.fwd_hooks]
    backward = [(point, handle) for point in points for handle in point.bwd_hooks]
    if any(handle.is_permanent for _, handle in forward + backward):
        raise InputError(
            "unlearning: the model has permanent hooks, with which it is another model: call "
            "model.reset_hooks(including_permanent=True)"
        )
    contexts = {name: dict(point.ctx) for name, point in model.hook_dict.items()}
    model.reset_hooks()
    try:
        yield
    finally:
        model.reset_hooks()
        for point, handle in forward:
            _put_back(point, handle, "fwd")
        for point, handle in backward:
            _put_back(point, handle, "bwd")
        for name, context in contexts.items():
            model.hook_dict[name].ctx.update(context)


def _put_back(point: HookPoint, handle: LensHandle, direction: Literal["fwd", "bwd"]) -> None:
    if handle.user_hook is not None:  # TransformerLens keeps it for every hook of `add_hook`
        point.add_hook(handle.user_hook, dir=direction, level=handle.context_level)
