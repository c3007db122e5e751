"""The tokens of the core evaluation, cut as SAEBench cuts them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore

from msae_plugin.common.errors import InputError
from msae_plugin.data.text import load_text
from msae_plugin.data.text_corpora import open_corpus
from msae_plugin.evaluation.outcomes import ModelContext
from msae_plugin.evaluation.saebench.patching import quiet
from msae_plugin.models.packaged import PACKAGED_PREFIX
from msae_plugin.saes.load import Subject

DEFAULT_HELDOUT_DOCUMENTS = 200


def is_local(dataset: str) -> bool:
    """Whether a data set is read by us (packaged, a file, a folder) rather than from the hub."""
    return dataset.startswith(PACKAGED_PREFIX) or Path(dataset).expanduser().exists()


def core_dataset(settings: Mapping[str, Any]) -> Dataset | str:
    """What SAELens' ActivationsStore is given: a hub name as it is, local text as a table.

    Packaged text is what training never sees (`heldout_documents`, as in a recipe). A table is
    shuffled by rows; a streamed hub data set, as in SAEBench, by shards only, so seeds of a
    one-shard data set give the same tokens (`run_core` says so).

    Raises:
        InputError: The text cannot be had.
    """
    dataset = str(settings["dataset"])
    if not is_local(dataset):
        return dataset
    default = DEFAULT_HELDOUT_DOCUMENTS if dataset.startswith(PACKAGED_PREFIX) else 0
    heldout = int(settings.get("heldout_documents") or default)
    if heldout:
        documents = load_text(dataset, heldout_documents=heldout).heldout
    else:
        documents = list(open_corpus(dataset, "train", None).documents())
    return Dataset.from_dict({"text": documents})


def core_tokens(
    context: ModelContext, settings: Mapping[str, Any], subject: Subject, seed: int, n_batches: int
) -> torch.Tensor:
    """The first batches of tokens that SAEBench would evaluate this SAE on.

    Args:
        context: The model.
        settings: Settings of `core`.
        subject: BOS and sequence settings come from its metadata, as in SAEBench.
        seed: Seed of the shuffling; SAEBench's own is 42.
        n_batches: How many.

    Returns:
        (n_batches, batch_size_prompts, context_size) long.

    Raises:
        InputError: The text is too short. SAEBench would begin it again and count tokens twice.
    """
    sae = subject.for_saebench(context.torch_dtype, "cpu")
    # SAELens warns of a text that is shorter than 10^9 tokens and not tokenized: neither matters.
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        store = ActivationsStore.from_sae(
            context.language_model.model,
            sae,
            context_size=int(settings["context_size"]),
            dataset=core_dataset(settings),
            dataset_trust_remote_code=True,
        )
        store.shuffle_input_dataset(seed=seed)
        batches: list[torch.Tensor] = []
        while len(batches) < n_batches:
            try:
                batch = store.get_batch_tokens(
                    int(settings["batch_size_prompts"]), raise_at_epoch_end=True
                )
            except StopIteration:
                raise InputError(
                    f"core: {settings['dataset']} holds only {len(batches)} batches of "
                    f"{settings['batch_size_prompts']} x {settings['context_size']} tokens and "
                    f"{n_batches} are asked for: lower n_eval_reconstruction_batches and "
                    "n_eval_sparsity_variance_batches, or raise heldout_documents"
                ) from None
            batches.append(batch.cpu())
    return torch.stack(batches)


def tokens_sha256(tokens: torch.Tensor) -> str:
    """Hash of tokens: covers the text, its order, the tokenizer, the context and the seed."""
    return hashlib.sha256(
        str(tuple(tokens.shape)).encode() + tokens.contiguous().numpy().tobytes()
    ).hexdigest()


def ignored_tokens(tokenizer: Any) -> set[int]:
    """PAD, EOS and BOS, which SAEBench leaves out of every mean."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return {int(token) for token in ids if token is not None}
