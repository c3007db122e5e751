"""Which folders a report is made of, and what their files say, unchanged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from msae_plugin.common.errors import InputError
from msae_plugin.evaluation.summary import FORMAT as SUMMARY_FORMAT
from msae_plugin.evaluation.summary import JSON_FILE as SUMMARY_FILE
from msae_plugin.saes.run_record import RUN_FILE

COMPARISON_FILE = "comparison.json"
COMPARISON_FORMAT = 1
DEMO_FILE = "demo.json"
KNOWN_FILES = (COMPARISON_FILE, SUMMARY_FILE, RUN_FILE)
KINDS = ("language_model", "ground_truth")


@dataclass(frozen=True)
class Source:
    """One known file of a folder.

    Args:
        label: Name of the folder, unique in the report.
        folder: Where it is.
        content: What the file holds.
    """

    label: str
    folder: Path
    content: Mapping[str, Any]


@dataclass(frozen=True)
class RunSource(Source):
    """A run folder.

    Args:
        demo: Content of `demo.json`; None without it.
    """

    demo: Mapping[str, Any] | None


@dataclass(frozen=True)
class Sources:
    """Everything that a report reads, in the order in which it was named.

    Args:
        comparisons: Folders with `comparison.json`.
        evaluations: Folders with `summary.json`.
        runs: Folders with `run.json`.
    """

    comparisons: tuple[Source, ...]
    evaluations: tuple[Source, ...]
    runs: tuple[RunSource, ...]

    @property
    def all(self) -> tuple[Source, ...]:
        """Every source."""
        return (*self.comparisons, *self.evaluations, *self.runs)


def read_sources(folders: Sequence[Path]) -> Sources:
    """Recognise and read the folders.

    Args:
        folders: Run, evaluation and comparison folders in any mixture; one may hold several of
            the files. A folder named twice counts once.

    Raises:
        InputError: No folder, a folder without a known file, a broken file, or another format.
    """
    if not folders:
        raise InputError("give at least one folder: a run, an evaluation or a comparison")
    unique = list({folder.resolve(): folder for folder in folders}.values())
    labels = dict(zip(unique, _labels(unique), strict=True))
    comparisons: list[Source] = []
    evaluations: list[Source] = []
    runs: list[RunSource] = []
    for folder, label in labels.items():
        if not folder.is_dir():
            raise InputError(
                f"{str(folder)!r} is not a folder: give a run, an evaluation or a comparison"
            )
        present = [name for name in KNOWN_FILES if (folder / name).is_file()]
        if not present:
            raise InputError(
                f"{str(folder)!r} holds none of {', '.join(KNOWN_FILES)}: give the --output folder "
                "of msae train, eval or compare"
            )
        if COMPARISON_FILE in present:
            comparisons.append(Source(label, folder, read_comparison(folder / COMPARISON_FILE)))
        if SUMMARY_FILE in present:
            evaluations.append(Source(label, folder, _read_summary(folder / SUMMARY_FILE)))
        if RUN_FILE in present:
            demo = read_json(folder / DEMO_FILE) if (folder / DEMO_FILE).is_file() else None
            runs.append(RunSource(label, folder, _read_run(folder / RUN_FILE), demo))
    return Sources(tuple(comparisons), tuple(evaluations), tuple(runs))


def _labels(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    labels = [path[-1] for path in parts]
    depth = 1
    while len(set(labels)) < len(labels) and depth < max(map(len, parts)):
        depth += 1
        repeated = {label for label, n in Counter(labels).items() if n > 1}
        labels = [
            "/".join(path[-depth:]) if label in repeated else label
            for path, label in zip(parts, labels, strict=True)
        ]
    return labels


def read_comparison(path: Path) -> Mapping[str, Any]:
    """A checked `comparison.json`.

    Raises:
        InputError: It cannot be read, is of another format, or a row lacks what every row has.
    """
    content = _of_format(path, COMPARISON_FORMAT)
    if content.get("kind") not in KINDS:
        raise InputError(
            f"{str(path)!r}: kind must be one of {', '.join(KINDS)}; got {content.get('kind')!r}"
        )
    rows = content.get("rows")
    if not isinstance(rows, list) or not isinstance(content.get("definitions"), dict):
        raise InputError(f"{str(path)!r}: needs a list 'rows' and an object 'definitions'")
    for place, row in enumerate(cast("list[object]", rows)):
        entries = cast("Mapping[str, Any]", row) if isinstance(row, dict) else {}
        for key in ("name", "method", "metrics"):
            if key not in entries:
                raise InputError(f"{str(path)!r}: row {place} has no {key!r}")
        if not isinstance(entries["metrics"], dict):
            raise InputError(f"{str(path)!r}: 'metrics' of row {place} is not an object")
    return content


def _read_summary(path: Path) -> Mapping[str, Any]:
    content = _of_format(path, SUMMARY_FORMAT)
    for key, kind in (("saes", dict), ("results", list), ("metrics", dict)):
        if not isinstance(content.get(key), kind):
            raise InputError(f"{str(path)!r}: needs {key!r}: evaluate again with this version")
    return content


def _read_run(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    if not isinstance(content.get("saes"), dict):
        raise InputError(f"{str(path)!r} is no record of msae train: it names no 'saes'")
    return content


def _of_format(path: Path, expected: int) -> Mapping[str, Any]:
    content = read_json(path)
    if content.get("format") != expected:
        raise InputError(
            f"{str(path)!r} is of format {content.get('format')!r} and this version reads "
            f"{expected}: make it again with this version of msae_plugin"
        )
    return content


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        InputError: The file cannot be read or holds something else.
    """
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} does not hold a JSON object")
    return cast("Mapping[str, Any]", content)


def read_json_lines(path: Path) -> list[Mapping[str, Any]]:
    """Objects of a JSON-lines file; none when there is no file.

    A last line that a kill cut short is left out, as a resumed run does.

    Raises:
        InputError: Another line is broken.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value: object = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"{str(path)!r}, line {number}, is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f"{str(path)!r}, line {number}, is not a JSON object")
        found.append(cast("Mapping[str, Any]", value))
    return found


def flat_facts(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as names and texts, in their order."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat_facts(cast("Mapping[str, Any]", value), f"{name}.")
        elif isinstance(value, list):
            yield name, ", ".join(str(item) for item in cast("list[object]", value))
        elif value is not None:
            yield name, str(value)
