"""Reading one column of text out of files, row by row, in constant memory.

`datasets` can do most of this, but names neither the file nor the line of what it cannot read, and
its Arrow cache has returned old rows for a rewritten file. Formats: JSON lines, Parquet, CSV and
TSV, plain text (documents separated by blank lines); all but Parquet also compressed.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from msae_plugin.common.errors import InputError, first_line

ROWS_PER_READ = 256
"""Rows held at once while a table is read."""

MAX_PARAGRAPH_CHARACTERS = 1_000_000
"""A plain text without blank lines is cut into documents of this length."""

_FORMATS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv",
    ".tsv": "csv", ".txt": "text",
}  # fmt: skip
_OPENERS: Mapping[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COMPRESSIONS = (*_OPENERS, ".zst")
# What a folder of data holds beside its data.
_NOT_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|metadata|package|config)\.json|"
    r"(readme|licen[cs]e|requirements|notice).*\.txt",
    re.IGNORECASE,
)
_SPLIT_IN_NAME = re.compile(
    r"(?:^|[^a-z])(train|training|test|validation|valid|val|dev|eval)(?:[^a-z]|$)", re.IGNORECASE
)
_SPLIT_ALIASES = {
    "training": "train", **dict.fromkeys(("valid", "val", "dev", "eval"), "validation")
}  # fmt: skip


WRITE_ONE_COLUMN = "write their text into a column of its own and name it as text_column"


def is_text_file(path: Path) -> bool:
    """Whether the name of a file is that of a readable format."""
    return _format(path) is not None


def find_text_files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder and its subfolders, in a fixed order.

    Where the names of files tell splits (`train-00000.parquet`, `test/part.jsonl`), only those of
    the wanted split are taken. Where several formats are present, the one with most bytes is.
    """
    by_format: dict[str, list[Path]] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file_format = _format(Path(name))
            if file_format and not name.startswith(".") and not _NOT_DATA.fullmatch(name):
                by_format.setdefault(file_format, []).append(Path(parent) / name)
    if not by_format:
        raise InputError(
            f"folder {folder} holds no text files", "expected .jsonl, .parquet, .csv, .tsv or .txt"
        )
    paths = max(by_format.values(), key=lambda group: sum(path.stat().st_size for path in group))
    splits = {path: _split_of(path.relative_to(folder)) for path in paths}
    named = sorted({name for name in splits.values() if name is not None})
    if split in named:
        return [path for path in paths if splits[path] == split]
    # Files without a split in their name are training text, whatever lies beside them.
    unnamed = [path for path in paths if splits[path] is None]
    if not unnamed or (named and split != "train"):
        raise InputError(
            f"folder {folder} has no split {split!r}: its files are of {', '.join(named)}"
        )
    return unnamed


def is_plain_text(path: Path) -> bool:
    """Whether the documents of a file are its paragraphs."""
    return _format(path) == "text"


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a file, value by column; empty where there is none."""
    return next(read_rows(path), (0, dict[str, Any]()))[1]


def column_names(path: Path) -> list[str]:
    """The columns of a file, from its first row or header; none where it is empty."""
    kind = _format(path)
    if kind == "parquet":
        return list(_opened_parquet(path).schema_arrow.names)
    if kind != "csv":
        return list(first_row(path))
    return [] if next(_lines(path), None) is None else list(next(_csv_tables(path)).columns)


def read_column(
    path: Path, column: str, where: tuple[str, str] | None = None
) -> Iterator[str | list[int]]:
    """Read the documents of one file, skipping those that are empty or missing.

    `where` takes only rows whose column, the first, has this value, the second (CSV only).
    """
    wanted = (column, *(where or ())[:1])
    is_json = _format(path) == "json"
    for number, row in read_rows(path, wanted):
        for name in wanted:
            if name not in row:
                at = f"{path}, line {number}" if is_json else str(path)
                raise InputError(f"{at} has no column {name!r}: it has {', '.join(row)}")
        if where is None or row[where[0]] == where[1]:
            document = as_document(row[column], f"{path}, row {number}, column {column!r}")
            if document:
                yield document


def read_rows(
    path: Path, columns: Sequence[str] | None = None, *, typed: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the rows of one file of any format.

    Yields the number of the row or, in JSON, of the line, and its values by column. Plain text has
    one column, `text`, with a paragraph in each row. Of Parquet `columns` alone are read. Numbers
    in CSV are numbers where `typed`, which takes the whole table at once, else text.
    """
    kind = _format(path)
    if kind == "text":
        return enumerate(({"text": text} for text in _paragraphs(path)), start=1)
    if kind == "json":
        return _json_rows(path)
    if kind == "parquet":
        return enumerate(_parquet_rows(path, columns), start=1)
    tables = _csv_tables(path, typed=typed)
    rows = (row for table in tables for row in table.to_dict("records"))
    return enumerate(cast("Iterator[dict[str, Any]]", rows), start=1)


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of `datasets` writes."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_dataset(folder: Path, split: str) -> Dataset:
    """A folder of `save_to_disk`; a single dataset in it stands for any split."""
    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a complete dataset ({first_line(error)})") from error
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        raise InputError(f"{folder} has no split {split!r}: it has {', '.join(map(str, saved))}")
    return saved[split]


def as_document(value: object, place: str) -> str | list[int] | None:
    """A cell as a document: text, token ids, or None where it is empty."""
    if value is None:
        return None
    if isinstance(value, str):
        return encodable(value) if value.strip() else None
    if isinstance(value, Sequence):
        ids = cast("Sequence[object]", value)
        if all(isinstance(token, int) for token in ids):
            return [int(cast("int", token)) for token in ids]
    kind = nested_kind(value)
    raise InputError(
        f"{place}: expected text or a list of token ids, not {kind or type(value).__name__}",
        None if kind is None else WRITE_ONE_COLUMN,
    )


def nested_kind(value: object) -> str | None:
    """What a cell holds that has text somewhere inside; None for anything else."""
    if isinstance(value, Mapping):
        return f"fields ({', '.join(map(str, cast('Mapping[object, object]', value)))})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        first = next(iter(cast("Sequence[object]", value)), None)
        if isinstance(first, Mapping):
            names = [str(name) for name in cast("Mapping[object, object]", first)]
            chat = {"content", "value"} & set(names)
            return f"a list of {'messages' if chat else 'records'} ({', '.join(names)})"
        if isinstance(first, str):
            return "a list of texts"
    return None


def encodable(text: str) -> str:
    """Half a pair of UTF-16, which JSON can escape and UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _format(path: Path) -> str | None:
    name = path.name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    kind = _FORMATS.get(Path(name).suffix)
    # A compressed Parquet file cannot be read from its end, where its index is.
    return None if kind == "parquet" and path.suffix.lower() != ".parquet" else kind


def _split_of(path: Path) -> str | None:
    for part in reversed(path.parts):
        found = _SPLIT_IN_NAME.search(part)
        if found:
            split = found.group(1).lower()
            return _SPLIT_ALIASES.get(split, split)
    return None


def open_text(path: Path) -> IO[str]:
    """Open a text file, compressed or not, as UTF-8."""
    suffix = path.suffix.lower()
    if suffix != ".zst":
        return _OPENERS.get(suffix, open)(path, "rt", encoding="utf-8-sig")
    try:
        # An optional package, wanted for this one compression.
        import zstandard
    except ImportError as error:
        raise InputError(f"{path} needs a package", "pip install zstandard") from error
    return cast("IO[str]", zstandard.open(path, "rt", encoding="utf-8-sig"))


def _lines(path: Path, longest: int = -1) -> Iterator[str]:
    """The lines of a file; `longest` cuts those that are longer, so that none fills the memory."""
    try:
        with open_text(path) as stream:
            yield from iter(lambda: stream.readline(longest), "")
    except InputError:
        raise
    # What a damaged or wrongly named file gives: each compression has errors of its own.
    except Exception as error:
        raise InputError(f"{path} cannot be read ({error})", "expected text in UTF-8") from error


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in _lines(path, MAX_PARAGRAPH_CHARACTERS):
        if not line.strip() or length + len(line) > MAX_PARAGRAPH_CHARACTERS:
            if lines:
                yield "".join(lines).strip()
            lines, length = [], 0
        if line.strip():
            lines.append(line)
            length += len(line)
    if lines:
        yield "".join(lines).strip()


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        # A ValueError, too, for a number of thousands of digits.
        except (ValueError, RecursionError) as error:
            advice = (
                "this looks like one JSON array: write one object per line"
                if number == 1 and line.lstrip().startswith("[")
                else "expected one JSON object per line"
            )
            raise InputError(
                f"{path}, line {number}: not valid JSON ({error}): {advice}"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected one JSON object per line")
        yield number, cast("dict[str, Any]", row)


def _opened_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as Parquet ({error})") from error


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    file = _opened_parquet(path)
    names = file.schema_arrow.names
    for column in columns or ():
        if column not in names:
            raise InputError(f"{path} has no column {column!r}: it has {', '.join(names)}")
    number = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield row
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is damaged after row {number} ({error})") from error


def _csv_tables(path: Path, *, typed: bool = False) -> Iterator[pd.DataFrame]:
    separator = "\t" if ".tsv" in path.name.lower() else ","
    try:
        with (
            open_text(path) as stream,
            # All columns, although one is wanted: pandas overlooks rows with too many fields, the
            # sign of broken quoting, when told which columns to use.
            pd.read_csv(
                stream,
                sep=separator,
                dtype=None if typed else str,
                # `NA`, `null` and `nan` are words.
                keep_default_na=False,
                # The types of a column follow from all of its values.
                chunksize=2**31 - 1 if typed else ROWS_PER_READ,
            ) as tables,
        ):
            for table in tables:
                # What pandas makes of a header that is shorter than the rows.
                if not isinstance(table.index, pd.RangeIndex):
                    raise ValueError("the rows have more fields than the header")
                yield table
    except InputError:
        raise
    # What pandas raises, and the compressions.
    except Exception as error:
        raise InputError(f"{path} cannot be read as CSV ({first_line(error)})") from error
