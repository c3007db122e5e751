"""The texts of SAEBench's sparse probing: its own loaders over the hub or local copies, and ours.

What SAEBench's code is given instead of its own names, inside `with` blocks only:
`dataset_utils.load_dataset` reads local copies, `dataset_info.chosen_classes_per_dataset` also
knows our labelled sets, `dataset_utils.get_multi_label_train_test_data` gives texts loaded before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_bench.sae_bench_utils import activation_collection, dataset_info, dataset_utils

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.data.labelled_texts import LABELLED_SOURCES, labelled_texts
from msae_plugin.data.local_datasets import SAEBENCH_PROBING_SETS, LocalCopies
from msae_plugin.evaluation.saebench.patching import replaced
from msae_plugin.models.packaged import PACKAGED_PREFIX


@dataclass(frozen=True)
class ProbingTexts:
    """Texts of one probing set.

    Attributes:
        name: SAEBench's name of the set, or ours.
        classes: The classes that are probed.
        train: Texts by class.
        test: Texts by class.
        facts: What a reader must know about them.
    """

    name: str
    classes: list[str]
    train: dict[str, list[str]]
    test: dict[str, list[str]]
    facts: dict[str, str] = field(default_factory=dict[str, str])


def load_probing_texts(
    name: str,
    train_size: int,
    test_size: int,
    seed: int,
    local_copies: Mapping[str, str | Path],
) -> ProbingTexts:
    """Load a probing set as SAEBench would.

    Args:
        name: SAEBench's name of the set, or `packaged:...`.
        train_size: SAEBench's `probe_train_set_size`.
        test_size: SAEBench's `probe_test_set_size`.
        seed: Of the choice of texts.
        local_copies: File or folder by hub name.

    Raises:
        InputError: There is no such set, or it cannot be had.
        RunFailure: It has too few texts of a class.
    """
    if name.startswith(PACKAGED_PREFIX):
        found = labelled_texts(name, train_size, test_size, seed)
        return ProbingTexts(name, list(found.train), found.train, found.test, found.facts)
    if name not in SAEBENCH_PROBING_SETS:
        known = ", ".join((*SAEBENCH_PROBING_SETS, *LABELLED_SOURCES))
        raise InputError(
            f"sparse_probing.dataset_names: {name!r} is not known: choose from {known}"
        )
    classes = list(dataset_info.chosen_classes_per_dataset[name])
    copies = LocalCopies(local_copies, dataset_utils.load_dataset)
    sizes = f"probe_train_set_size {train_size} and probe_test_set_size {test_size}"
    try:
        with replaced(dataset_utils, "load_dataset", copies.load_dataset):
            train, test = dataset_utils.get_multi_label_train_test_data(
                name, train_size, test_size, seed
            )
    except InputError:
        raise
    # What SAEBench's loaders raise where a class has too few rows: a failed assert, or pandas'
    # ValueError of a sample that is larger than its population.
    except (AssertionError, ValueError) as error:
        reason = str(error) or "a class has too few texts"
        raise RunFailure(
            f"dataset {name}: SAEBench's loader fails with {sizes} ({reason})"
        ) from error
    for label in classes:
        if label not in train:
            raise RunFailure(f"dataset {name}: class {label!r} has too few texts for {sizes}")
    facts = {"source": "local copy"} if SAEBENCH_PROBING_SETS[name] in local_copies else {}
    return ProbingTexts(
        name, classes, {c: train[c] for c in classes}, {c: test[c] for c in classes}, facts
    )


@contextmanager
def served(texts: ProbingTexts) -> Generator[None, None, None]:
    """Give SAEBench these texts under their name, for the time of the block."""

    def get_multi_label_train_test_data(
        dataset_name: str, *_sizes_and_seed: int
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        if dataset_name != texts.name:
            raise RunFailure(f"sparse_probing: SAEBench asks for {dataset_name!r}")
        return dict(texts.train), dict(texts.test)

    serve: Callable[..., Any] = get_multi_label_train_test_data
    classes = {**dataset_info.chosen_classes_per_dataset, texts.name: texts.classes}
    with (
        replaced(dataset_utils, "get_multi_label_train_test_data", serve),
        replaced(dataset_info, "chosen_classes_per_dataset", classes),
    ):
        yield


def tokens_sha256(texts: ProbingTexts, tokenizer: Any, context_length: int) -> str:
    """Hash of exactly what the model reads: covers texts, seed, sizes, tokenizer and context.

    Raises:
        RunFailure: A text holds nothing but BOS, EOS and PAD: its mean over tokens is NaN.
    """
    digest = hashlib.sha256()
    for part, by_class in (("train", texts.train), ("test", texts.test)):
        tokenised = dataset_utils.tokenize_data_dictionary(
            by_class, tokenizer, context_length, "cpu"
        )
        for label, fields in tokenised.items():
            ids = fields["input_ids"]
            kept = activation_collection.get_bos_pad_eos_mask(ids, tokenizer)
            empty = int((~kept.any(dim=1)).sum())
            if empty:
                raise RunFailure(
                    f"dataset {texts.name}: {empty} texts of class {label!r} ({part}) hold nothing "
                    f"but BOS, EOS and PAD in their first {context_length} tokens: SAEBench's mean "
                    "over tokens is NaN"
                )
            digest.update(f"{part}|{label}|{tuple(ids.shape)}|".encode())
            digest.update(ids.contiguous().numpy().tobytes())
            digest.update(kept.contiguous().numpy().tobytes())
    return digest.hexdigest()
