from __future__ import annotations

import pytest

from msae_plugin.common.errors import InputError
from msae_plugin.saes.clean_config import clean_run_config, private_traces
from msae_plugin.saes.download import (
    HubReference,
    is_reference,
    parse_reference,
    require_folder,
    require_repo_name,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ada/saes", HubReference("ada/saes")),
        ("ada/saes:a/b_l0-3", HubReference("ada/saes", "a/b_l0-3")),
        ("ada/saes@v1:a/b/", HubReference("ada/saes", "a/b", "v1")),
        ("ada/saes@refs/pr/1:a", HubReference("ada/saes", "a", "refs/pr/1")),
        ("a.b-c/d_e@main", HubReference("a.b-c/d_e", None, "main")),
    ],
)
def test_references(text, expected):
    assert parse_reference(text) == expected
    assert parse_reference(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["saes", "a/b/c", "/a/b", "a/b:", "a/b:../c", "a/b:/c", "a/b:c/./../d", "a--b/c", "a/b c"],
)
def test_what_is_no_reference(text):
    with pytest.raises(InputError) as error:
        parse_reference(text)
    assert "\n" not in str(error.value)


def test_local_paths_are_told_from_references_by_who_looks_first():
    assert is_reference("runs/a")
    assert not is_reference("./runs/a")
    assert not is_reference("runs")


@pytest.mark.parametrize("folder", ["", "/", ".", "a/../b", "/abs", "a\\b", ".git/x"])
def test_folders_that_cannot_be(folder):
    with pytest.raises(InputError, match="folder"):
        require_folder(folder)


@pytest.mark.parametrize("repo", ["saes", "a/b/c", "-a/b", "a/b.git", "a/" + "b" * 99])
def test_repositories_that_cannot_be(repo):
    with pytest.raises(InputError, match="repository"):
        require_repo_name(repo)


def test_traces_of_a_machine():
    text = '{"a": "/home/jane/x.json", "b": "C:\\\\Users\\\\jane", "c": "~/saes", "d": "/mnt/d/e"}'
    assert private_traces(text) == [
        "/home/jane/x.json",
        "C:\\\\Users\\\\jane",
        "~/saes",
        "/mnt/d/e",
    ]
    clean = (
        "https://huggingface.co/data/x gemma-2-2b/tmp/x google/gemma layers/home 1/2 and/or "
        "blocks.9.hook_resid_post a:b ~0.5 ± 3 s/tmp 12:30"
    )
    assert private_traces(clean) == []


def test_a_relative_path_that_exists_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    cleaned = clean_run_config(
        {"model": "models/tiny", "other": "google/gemma-2-2b", "n": "x/" * 9999}
    )
    assert cleaned["model"] == "tiny"
    assert cleaned["other"] == "google/gemma-2-2b"
