"""Downloading from a Hub on the loopback interface: whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_process import REPO, done, refused
from hub_repository import Blob

FILES = {
    "README.md": b"# SAEs\n",
    "a/16k/cfg.json": b'{"architecture": "standard"}',
    "a/16k/sae_weights.safetensors": bytes(range(256)) * 400,
    "a/16k/jumprelu/cfg.json": b"{}",
    "a/16k [2]/cfg.json": b"brackets",
    "b/cfg.json": b"{}",
}
FOLDER = {path.removeprefix("a/16k/"): FILES[path] for path in FILES if path.startswith("a/16k/")}


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def target(hub, tmp_path) -> Path:
    hub.make(REPO, FILES)
    return tmp_path / "here" / "target"


def test_a_folder(hub, worker, target):
    value = done(worker.run("download", reference=f"{REPO}:a/16k", destination=target))
    assert value == str(target)
    assert content(target) == FOLDER
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_all_of_it_and_a_name_with_brackets(hub, worker, target):
    done(worker.run("download", reference=REPO, destination=target))
    assert content(target) == {".gitattributes": b"", **FILES}
    done(worker.run("download", reference=f"{REPO}:a/16k [2]", destination=target / "new"))
    assert content(target / "new") == {"cfg.json": b"brackets"}


def test_another_revision(hub, worker, target):
    repo = hub.repos[REPO]
    repo.tags["v1"] = repo.branches["main"]
    later = {path: blob for path, blob in repo.head().files.items() if path.startswith("b/")}
    repo.branches["main"] = repo.add(repo.head().oid, "less", later)
    done(worker.run("download", reference=f"{REPO}@v1:a/16k", destination=target))
    assert content(target) == FOLDER
    gone = worker.run("download", reference=f"{REPO}:a/16k", destination=target / "x")
    refused(gone, "InputError", "no folder 'a/16k'")
    outcome = worker.run("download", reference=f"{REPO}@v2", destination=target / "x")
    refused(outcome, "InputError", "no revision 'v2'")


def test_an_sae_at_a_revision_is_evaluated_from_that_revision(hub, worker, target):
    # Weights of its own: what is fetched stays in the cache of the following tests.
    repo = hub.repos[REPO]
    for data in (b"first weights", b"second weights"):
        files = {**repo.head().files, "a/16k/sae_weights.safetensors": Blob(data, large=True)}
        repo.branches["main"] = repo.add(repo.head().oid, "trained", files)
        repo.tags.setdefault("v1", repo.branches["main"])
    ((name, folder),) = done(worker.run("locate", reference=f"{REPO}@v1:a/16k"))
    assert name == "tiny-saes-a-16k-v1"
    assert content(Path(folder))["sae_weights.safetensors"] == b"first weights"
    outcome = worker.run("locate", reference=f"{REPO}@v2:a/16k")
    refused(outcome, "InputError", "no revision 'v2'")


def test_what_is_not_there(hub, worker, target):
    outcome = worker.run("download", reference=f"{REPO}:c", destination=target)
    refused(outcome, "InputError", "no folder 'c'", "it has a/16k")
    outcome = worker.run("download", reference="ada/other", destination=target)
    refused(outcome, "InputError", "no repository ada/other", "hf auth login")
    target.mkdir(parents=True)
    (target / "mine").write_text("keep")
    outcome = worker.run("download", reference=REPO, destination=target)
    refused(outcome, "InputError", "not empty")
    assert content(target) == {"mine": b"keep"}


def test_a_private_repository(hub, worker, target):
    hub.repos[REPO].private = True
    outcome = worker.run("download", reference=REPO, destination=target, token=None)
    refused(outcome, "InputError", "private", "hf auth login")
    done(worker.run("download", reference=f"{REPO}:a/16k", destination=target))
    assert content(target) == FOLDER


def test_a_connection_that_breaks_is_taken_up_again(hub, worker, target):
    hub.fail("GET", "/large/", "truncate")
    done(worker.run("download", reference=f"{REPO}:a/16k", destination=target))
    assert content(target) == FOLDER
    assert hub.count("GET", "/large/") == 2


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("corrupt", "RunFailure", "sae_weights.safetensors arrived damaged"),
        (500, "RunFailure", "failed (500)"),
        (403, "InputError", "may not do this"),
    ],
)
def test_what_goes_wrong_leaves_nothing(hub, worker, target, fault, error, words):
    hub.fail("GET", "/large/", fault)
    outcome = worker.run("download", reference=f"{REPO}:a/16k", destination=target)
    refused(outcome, error, words)
    assert list(target.parent.iterdir()) == []


def test_a_full_disk_leaves_nothing(hub, worker, target):
    outcome = worker.run(
        "download", reference=f"{REPO}:a/16k", destination=target, file_size_limit=50_000
    )
    refused(outcome, "RunFailure", "too large for the disk", "make room")
    assert list(target.parent.iterdir()) == []


def test_a_kill_leaves_no_folder_of_that_name(hub, worker, target):
    hub.fail("GET", "/large/", "stall")
    job = worker.start("download", reference=f"{REPO}:a/16k", destination=target)
    assert hub.stalled.wait(120)
    job.kill()
    assert not target.exists()
    hub.release()
    done(worker.run("download", reference=f"{REPO}:a/16k", destination=target))
    assert content(target) == FOLDER


def test_fetching_into_the_cache_for_other_commands(hub, worker, target):
    # Weights of its own: what is in the cache is not asked for again, and cannot go wrong.
    own = b"fetched weights"
    repo = hub.repos[REPO]
    files = {**repo.head().files, "a/16k/sae_weights.safetensors": Blob(own, large=True)}
    repo.branches["main"] = repo.add(repo.head().oid, "trained", files)
    value = done(worker.run("fetch", reference=f"{REPO}:a/16k"))
    assert content(Path(value)) == {**FOLDER, "sae_weights.safetensors": own}
    assert hub.count("GET", "/b/cfg.json") == 0
    value = done(worker.run("fetch", reference=f"{REPO}:a/16k [2]"))
    assert content(Path(value)) == {"cfg.json": b"brackets"}
    # What `msae report` does with its arguments: the disk first.
    assert done(worker.run("local_folder", text=str(target.parent))) == str(target.parent)
    assert content(Path(done(worker.run("local_folder", text=f"{REPO}:b")))) == {"cfg.json": b"{}"}
    missing = worker.run("local_folder", text="ada/other")
    refused(missing, "InputError", "no repository ada/other")
