"""Local copies of the datasets that SAEBench's sparse probing takes from the hub.

SAEBench's own loaders read them: what `datasets.load_dataset` would have given is read from the
configured files instead, in the same schema. Nothing goes through the cache of `datasets`, whose
key does not hold the contents of local files: a rewritten file gave the old rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import datasets.config
from datasets import Dataset, DatasetDict

from msae_plugin.common.errors import InputError
from msae_plugin.data.text_files import (
    find_text_files,
    is_saved_dataset,
    is_text_file,
    read_rows,
    saved_dataset,
)


@dataclass(frozen=True)
class HubDataset:
    """The parts of a dataset on the hub that SAEBench's loader reads.

    Attributes:
        columns: The columns that it reads.
        splits: The splits that it reads.
        configurations: The named configurations that it reads; none where it asks for no name.
        streamed: Whether it streams, which needs the hub although the dataset was loaded before.
        language_column: The column that the argument `languages` selects rows by.
        classes: Classes of a probing set made of it.
    """

    columns: tuple[str, ...]
    splits: tuple[str, ...] = ("train", "test")
    configurations: tuple[str, ...] = ()
    streamed: bool = False
    language_column: str | None = None
    classes: int = 5


HUB_DATASETS = {
    "LabHC/bias_in_bios": HubDataset(("hard_text", "profession", "gender")),
    "canrager/amazon_reviews_mcauley_1and5": HubDataset(("text", "category", "rating")),
    "codeparrot/github-code": HubDataset(
        ("code", "language"), ("train",), streamed=True, language_column="language"
    ),
    "fancyzhx/ag_news": HubDataset(("text", "label"), classes=4),
    "Helsinki-NLP/europarl": HubDataset(
        ("translation",),
        ("train",),
        configurations=("en-fr", "fr-it", "de-en", "es-fr", "nl-pt"),
        streamed=True,
    ),
}
"""The datasets behind SAEBench's eight probing sets, by hub name."""

SAEBENCH_PROBING_SETS = {
    "LabHC/bias_in_bios_class_set1": "LabHC/bias_in_bios",
    "LabHC/bias_in_bios_class_set2": "LabHC/bias_in_bios",
    "LabHC/bias_in_bios_class_set3": "LabHC/bias_in_bios",
    "canrager/amazon_reviews_mcauley_1and5": "canrager/amazon_reviews_mcauley_1and5",
    "canrager/amazon_reviews_mcauley_1and5_sentiment": "canrager/amazon_reviews_mcauley_1and5",
    "codeparrot/github-code": "codeparrot/github-code",
    "fancyzhx/ag_news": "fancyzhx/ag_news",
    "Helsinki-NLP/europarl": "Helsinki-NLP/europarl",
}
"""Hub name of each of SAEBench's probing sets."""


class LocalCopies:
    """Stands for `datasets.load_dataset`: configured names are read from local files.

    Args:
        paths: File or folder by hub name. A folder is one from `save_to_disk`, or holds files
            (.jsonl, .parquet, .csv, ...) with `train` and `test` in their names or folders, as a
            clone of the hub's repository does; named configurations are subfolders, or files that
            begin with the name.
        elsewhere: Loads every other name; `datasets.load_dataset`.
    """

    def __init__(
        self,
        paths: Mapping[str, str | Path],
        elsewhere: Callable[..., Any] = datasets.load_dataset,
    ) -> None:
        self._paths = {name: Path(path).expanduser() for name, path in paths.items()}
        self._elsewhere = elsewhere

    def load_dataset(
        self,
        path: str,
        name: str | None = None,
        *,
        split: str | None = None,
        streaming: bool = False,
        languages: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """A dataset, its splits by name, or the stream of a split, as `datasets` gives them.

        Raises:
            InputError: The local copy does not exist, or is not in the dataset's schema.
        """
        if path not in self._paths:
            forwarded = options if languages is None else {**options, "languages": languages}
            return self._elsewhere(path, name, split=split, streaming=streaming, **forwarded)
        schema = HUB_DATASETS.get(path)
        place = self._paths[path]

        def rows(wanted: str) -> Iterator[dict[str, Any]]:
            found = _rows(place, name, wanted)
            if schema is not None:
                found = _checked(found, schema, f"{place} (local copy of {path}, split {wanted})")
                if languages is not None and schema.language_column is not None:
                    column = schema.language_column
                    found = (row for row in found if row[column] in languages)
            return found

        if split is None:
            splits = schema.splits if schema is not None else ("train",)
            return DatasetDict({each: Dataset.from_list(list(rows(each))) for each in splits})
        if streaming:
            return _Stream(rows, split)
        return Dataset.from_list(list(rows(split)))


class _Stream:
    """Rows that can be read again and again, as those of an IterableDataset.

    `IterableDataset.from_generator` would hash the code behind them: seconds, and endless for
    functions that call each other.
    """

    def __init__(self, rows: Callable[[str], Iterator[dict[str, Any]]], split: str) -> None:
        self._rows = rows
        self._split = split

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._rows(self._split)


def check_local_copy(hub_name: str, path: str | Path) -> None:
    """Read the first row of every split and configuration that SAEBench reads.

    Raises:
        InputError: Something is missing or of another schema.
    """
    schema = HUB_DATASETS[hub_name]
    place = Path(path).expanduser()
    for configuration in schema.configurations or (None,):
        for split in schema.splits:
            where = f"{place} (local copy of {hub_name}, split {split})"
            rows = _checked(_rows(place, configuration, split), schema, where)
            if next(islice(rows, 1), None) is None:
                raise InputError(f"{where} holds no rows")


def in_datasets_cache(hub_name: str) -> bool:
    """Whether `datasets` has prepared this dataset before; it then needs no hub."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    wanted = hub_name.replace("/", "___").lower()
    return cache.is_dir() and any(
        entry.name.lower() == wanted and any(entry.rglob("*.arrow")) for entry in cache.iterdir()
    )


def _checked(
    rows: Iterator[dict[str, Any]], schema: HubDataset, where: str
) -> Iterator[dict[str, Any]]:
    for row in rows:
        for column in schema.columns:
            if column not in row:
                raise InputError(f"{where} has no column {column!r}: it has {', '.join(row)}")
        yield row


def _rows(place: Path, configuration: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split, one by one."""
    if not place.exists():
        raise InputError(f"{place} does not exist")
    if configuration is not None:
        yield from _configuration_rows(place, configuration, split)
    elif is_saved_dataset(place):
        if split != "train" and not (place / "dataset_dict.json").is_file():
            raise InputError(f"{place} has no split {split!r}", "save a DatasetDict with both")
        yield from cast("Iterator[dict[str, Any]]", iter(saved_dataset(place, split)))
    elif place.is_dir():
        for file in find_text_files(place, split):
            yield from _file_rows(file)
    elif split != "train":
        raise InputError(
            f"{place} is one file and has no split {split!r}", "give a folder with both"
        )
    else:
        yield from _file_rows(place)


def _configuration_rows(place: Path, configuration: str, split: str) -> Iterator[dict[str, Any]]:
    if (place / configuration).is_dir():
        yield from _rows(place / configuration, None, split)
        return
    files = (
        sorted(file for file in place.iterdir() if file.name.startswith(f"{configuration}."))
        if place.is_dir()
        else []
    )
    files = [file for file in files if is_text_file(file)]
    if not files:
        raise InputError(
            f"{place} has no configuration {configuration!r}",
            f"expected a folder or a file {configuration}.jsonl in it",
        )
    for file in files:
        yield from _file_rows(file)


def _file_rows(file: Path) -> Iterator[dict[str, Any]]:
    if ".txt" in file.suffixes:
        raise InputError(f"{file} is plain text: labelled text has columns")
    return (row for _, row in read_rows(file, typed=True) if row)
