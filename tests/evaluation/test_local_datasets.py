"""Local copies in the place of hub datasets, read by SAEBench's own loaders."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from sae_bench.sae_bench_utils import dataset_utils

from msae_plugin.common.errors import InputError
from msae_plugin.data.labelled_texts import (
    HUB_DATASETS,
    LABELLED_SOURCES,
    LabelledSource,
    LocalCopies,
    check_local_copy,
)
from msae_plugin.evaluation import preflight
from msae_plugin.evaluation.preflight import missing_for_probing, stored_tokens
from msae_plugin.evaluation.saebench.patching import replaced

AG_NEWS = "fancyzhx/ag_news"
ROWS = [{"text": f"NA {n}, “quoted”", "label": n % 4} for n in range(40)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def jsonl(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", ROWS[:28])
    write_jsonl(folder / "test.jsonl", ROWS[28:])


def parquet(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    pd.DataFrame(ROWS[:20]).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    pd.DataFrame(ROWS[20:28]).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    pd.DataFrame(ROWS[28:]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nconfigs: []\n---\n")


def csv(folder: Path) -> None:
    folder.mkdir()
    pd.DataFrame(ROWS[:28]).to_csv(folder / "train.csv", index=False)
    pd.DataFrame(ROWS[28:]).to_csv(folder / "test.csv", index=False)


def saved(folder: Path) -> None:
    parts = {"train": Dataset.from_list(ROWS[:28]), "test": Dataset.from_list(ROWS[28:])}
    DatasetDict(parts).save_to_disk(str(folder))


def no_hub(*arguments: Any, **options: Any) -> Any:
    raise AssertionError(f"the hub was asked for {arguments} {options}")


def copies(name: str, folder: Path) -> LocalCopies:
    return LocalCopies({name: folder}, no_hub)


@pytest.mark.parametrize("write", [jsonl, parquet, csv, saved])
def test_every_format_gives_the_rows_of_the_hub(tmp_path, write):
    write(tmp_path / "ag_news")
    found = copies(AG_NEWS, tmp_path / "ag_news").load_dataset(AG_NEWS, streaming=False)
    assert pd.DataFrame(found["train"]).to_dict("records") == ROWS[:28]
    assert pd.DataFrame(found["test"]).to_dict("records") == ROWS[28:]
    assert all(isinstance(row["label"], int) for row in found["test"])
    check_local_copy(AG_NEWS, tmp_path / "ag_news")


def test_a_rewritten_file_gives_the_new_rows(tmp_path):
    jsonl(tmp_path / "ag_news")
    local = copies(AG_NEWS, tmp_path / "ag_news")
    assert local.load_dataset(AG_NEWS)["train"][0]["text"] == ROWS[0]["text"]
    write_jsonl(tmp_path / "ag_news" / "train.jsonl", [{"text": "new", "label": 3}])
    assert local.load_dataset(AG_NEWS)["train"][:] == {"text": ["new"], "label": [3]}
    stream = local.load_dataset(AG_NEWS, split="train", streaming=True)
    assert list(stream) == [{"text": "new", "label": 3}]
    write_jsonl(tmp_path / "ag_news" / "train.jsonl", [{"text": "newer", "label": 2}])
    stream = local.load_dataset(AG_NEWS, split="train", streaming=True)
    assert list(stream) == [{"text": "newer", "label": 2}]


def test_other_names_go_to_datasets_with_what_was_asked():
    asked: list[Any] = []

    def elsewhere(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options))
        return "from the hub"

    local = LocalCopies({AG_NEWS: "/nowhere"}, elsewhere)
    options = {"split": "train", "streaming": True, "trust_remote_code": True}
    assert (
        local.load_dataset("codeparrot/github-code", languages=["C"], **options) == "from the hub"
    )
    assert asked == [(("codeparrot/github-code", None), {**options, "languages": ["C"]})]


def classes_of(found: tuple[dict[str, list[str]], dict[str, list[str]]]) -> dict[str, set[str]]:
    return {label: set(texts) | set(found[1][label]) for label, texts in found[0].items()}


def load_by_saebench(local: LocalCopies, name: str, train: int = 8, test: int = 4) -> Any:
    with replaced(dataset_utils, "load_dataset", local.load_dataset):
        return dataset_utils.get_multi_label_train_test_data(name, train, test, 42)


def test_saebenchs_loader_reads_ag_news(tmp_path):
    jsonl(tmp_path / "ag_news")
    found = load_by_saebench(copies(AG_NEWS, tmp_path / "ag_news"), AG_NEWS)
    # Independent of everything here: pandas' own sample of the rows.
    frame = pd.DataFrame(ROWS[:28])
    for label in range(4):
        rows = frame[frame["label"] == label]["text"]
        assert found[0][str(label)] == rows.sample(n=4, random_state=42).tolist()
        assert len(found[1][str(label)]) == 2


def test_saebenchs_loader_reads_bias_in_bios(tmp_path):
    name = "LabHC/bias_in_bios"
    rows = [
        {"hard_text": f"bio {n} of {profession}", "profession": profession, "gender": n % 2}
        for profession in (0, 1, 2, 6, 9)
        for n in range(12)
    ]
    for split in ("train", "test", "dev"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    found = classes_of(load_by_saebench(copies(name, tmp_path), f"{name}_class_set1"))
    assert set(found) == {"0", "1", "2", "6", "9"}
    for profession, texts in found.items():
        assert texts <= {f"bio {n} of {profession}" for n in range(12)}


def test_saebenchs_loader_reads_amazon_reviews(tmp_path):
    name = "canrager/amazon_reviews_mcauley_1and5"
    rows = [
        {"text": f"{rating} stars for {category}, {n}", "category": category, "rating": rating}
        for category in (1, 2, 3, 5, 6)
        for rating in (1.0, 5.0)
        for n in range(6)
    ]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        pd.DataFrame(rows).to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
    by_category = classes_of(load_by_saebench(copies(name, tmp_path), name))
    assert set(by_category) == {"1", "2", "3", "5", "6"}
    assert all(" for 5," in text for text in by_category["5"])
    by_rating = classes_of(load_by_saebench(copies(name, tmp_path), f"{name}_sentiment"))
    assert set(by_rating) == {"1.0", "5.0"}
    assert all(text.startswith("5.0 stars") for text in by_rating["5.0"])


@pytest.mark.parametrize("layout", ["folders", "files"])
def test_saebenchs_loader_reads_europarl(tmp_path, layout):
    name = "Helsinki-NLP/europarl"
    for pair in HUB_DATASETS[name].configurations:
        rows = [
            {"translation": {language: f"{language} {n}" for language in pair.split("-")}}
            for n in range(9)
        ]
        file = f"{pair}/train.jsonl" if layout == "folders" else f"{pair}.jsonl"
        write_jsonl(tmp_path / file, rows)
    found = classes_of(load_by_saebench(copies(name, tmp_path), name))
    assert set(found) == {"en", "fr", "de", "es", "nl"}
    assert all(text.startswith("nl ") for text in found["nl"])
    check_local_copy(name, tmp_path)


def test_saebenchs_loader_reads_github_code(tmp_path):
    name = "codeparrot/github-code"
    languages = ("C", "Python", "HTML", "Java", "PHP", "Ruby")
    rows = [
        {"code": f"{language} {n} " + "x" * 600, "language": language}
        for n in range(9)
        for language in languages
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    seen = {row["language"] for row in copies(name, tmp_path).load_dataset(
        name, split="train", streaming=True, languages=["C", "PHP"], trust_remote_code=True
    )}  # fmt: skip
    assert seen == {"C", "PHP"}
    found = load_by_saebench(copies(name, tmp_path), name)
    assert set(found[0]) == set(languages) - {"Ruby"}


def test_wrong_copies_are_named(tmp_path):
    local = copies(AG_NEWS, tmp_path / "absent")
    with pytest.raises(InputError, match="absent does not exist"):
        local.load_dataset(AG_NEWS)
    write_jsonl(tmp_path / "one" / "train.jsonl", ROWS)
    with pytest.raises(InputError, match="has no split 'test'"):
        copies(AG_NEWS, tmp_path / "one").load_dataset(AG_NEWS)
    with pytest.raises(InputError, match="one file and has no split 'test'"):
        copies(AG_NEWS, tmp_path / "one" / "train.jsonl").load_dataset(AG_NEWS)
    for split in ("train", "test"):
        write_jsonl(tmp_path / "two" / f"{split}.jsonl", [{"text": "t", "topic": 1}])
    with pytest.raises(
        InputError, match=r"split train\) has no column 'label': it has text, topic"
    ):
        check_local_copy(AG_NEWS, tmp_path / "two")
    (tmp_path / "two" / "train.jsonl").write_text('{"text": "t", "label": 1}\n{"text"')
    with pytest.raises(InputError, match=r"train\.jsonl, line 2: not valid JSON"):
        copies(AG_NEWS, tmp_path / "two").load_dataset(AG_NEWS)
    with pytest.raises(InputError, match="no configuration 'en-fr'"):
        check_local_copy("Helsinki-NLP/europarl", tmp_path / "two")


def test_the_hub_is_missing_without_a_local_copy(tmp_path):
    # HF_HUB_OFFLINE is set for all tests.
    missing = missing_for_probing({})
    assert [entry.what.split(" is not ")[0] for entry in missing] == [
        f"dataset '{name}'" for name in HUB_DATASETS
    ]
    assert all("HF_HUB_OFFLINE" in entry.what for entry in missing)
    assert "datasets: {LabHC/bias_in_bios: FOLDER}" in missing[0].how
    jsonl(tmp_path / "ag_news")
    settings = {"dataset_names": [AG_NEWS], "datasets": {AG_NEWS: str(tmp_path / "ag_news")}}
    assert missing_for_probing(settings) == []
    (tmp_path / "ag_news" / "test.jsonl").unlink()
    assert "has no split 'test'" in missing_for_probing(settings)[0].what


def test_a_prepared_dataset_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    settings = {"dataset_names": [AG_NEWS, "Helsinki-NLP/europarl"]}
    assert len(missing_for_probing(settings)) == 2
    for name in ("fancyzhx___ag_news", "Helsinki-NLP___europarl"):
        (tmp_path / name / "default").mkdir(parents=True)
        (tmp_path / name / "default" / "train.arrow").touch()
    # SAEBench streams the other one, which asks the hub every time.
    assert [entry.what.split(" is not ")[0] for entry in missing_for_probing(settings)] == [
        "dataset 'Helsinki-NLP/europarl'"
    ]


def test_packages_sizes_and_unknown_names_are_missing(monkeypatch):
    absent = LabelledSource("no_such_package", "none", "none==1", ("a",), lambda folder: {})
    monkeypatch.setitem(LABELLED_SOURCES, "packaged:none", absent)
    names = ["packaged:none", "packaged:news-topics", "ag_news"]
    sizes = {"probe_train_set_size": 2000, "probe_test_set_size": 500}
    package, texts, unknown = missing_for_probing({"dataset_names": names, **sizes})
    assert (package.what, package.how) == (
        "package none (labelled set packaged:none)",
        "pip install none==1",
    )
    assert "1217 texts" in texts.what
    assert "lower probe_train_set_size" in texts.how
    assert "'ag_news' is not known" in unknown.what
    assert AG_NEWS in unknown.how


def test_disk_for_the_activations_is_checked(tmp_path, monkeypatch):
    settings = {
        "dataset_names": ["packaged:news-topics"],
        "probe_train_set_size": 200,
        "probe_test_set_size": 100,
        "context_length": 64,
    }
    # 4 classes, 100 + 50 texts of each, 64 tokens.
    assert stored_tokens(settings) == 4 * 150 * 64
    # SAEBench's protocol: 37 classes of 2000 + 500 texts of 128 tokens.
    assert stored_tokens({}) == (5 * 3 + 5 + 2 + 5 + 4 + 5) * 2500 * 128
    free = 4 * 150 * 64 * 576 * 4 * 3
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage)
    cache = tmp_path / "not" / "yet"
    assert missing_for_probing(settings, cache=cache, bytes_per_token=576 * 4, runs=3) == []
    (disk,) = missing_for_probing(settings, cache=cache, bytes_per_token=576 * 4, runs=4)
    assert "337.5 MiB of disk" in disk.what
    assert "cache:" in disk.how
