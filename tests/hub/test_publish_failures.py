"""What can break between here and the Hub: nothing half-published is reported as published."""

from __future__ import annotations

import os
import signal

import pytest
from hub_process import REPO, done, refused
from hub_server import wait_until

COMMIT = r"/api/models/ada/tiny-saes/commit/"


def test_a_connection_dropped_before_the_commit(hub, worker, run):
    hub.fail("POST", COMMIT, "drop")
    outcome = worker.run("publish", run=run / "batchtopk", repo=REPO)
    refused(outcome, "RunFailure", "nothing was published", f"{REPO} was made and is empty")
    assert hub.files(REPO).keys() == {".gitattributes"}
    done(worker.run("publish", run=run / "batchtopk", repo=REPO))


def test_a_connection_dropped_after_the_commit(hub, worker, run):
    hub.fail("POST", COMMIT, "drop_after")
    value = done(worker.run("publish", run=run / "batchtopk", repo=REPO))
    assert value["commit"] == hub.repos[REPO].head().oid
    assert value["verifications"]


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(500, "RunFailure", "failed (500)"), (403, "InputError", "may not do this")],
)
def test_a_commit_that_the_hub_refuses(hub, worker, run, status, error, words):
    hub.make(REPO, {"README.md": b"# Here\n"})
    before = hub.repos[REPO].head()
    hub.fail("POST", COMMIT, status)
    outcome = worker.run("publish", run=run / "batchtopk", repo=REPO, tag="v1")
    refused(outcome, error, words, "nothing was published")
    assert hub.repos[REPO].head() == before
    assert hub.repos[REPO].tags == {}


def test_a_large_file_is_sent_again_when_the_storage_stumbles(hub, worker, run):
    hub.fail("PUT", "/large/", 503)
    value = done(worker.run("publish", run=run / "batchtopk", repo=REPO))
    assert value["verifications"]
    assert hub.count("PUT", "/large/") == 3


def test_somebody_else_commits_meanwhile(hub, worker, run):
    repo = hub.make(REPO, {"README.md": b"# Here\n"})
    hub.fail("POST", "/preupload/", "stall")
    job = worker.start("publish", run=run / "batchtopk", repo=REPO)
    assert hub.stalled.wait(120)
    theirs = repo.add(repo.head().oid, "theirs", repo.head().files)
    repo.branches["main"] = theirs
    hub.release()
    outcome = job.wait()
    refused(outcome, "RunFailure", "somebody changed the repository", "nothing was published")
    assert repo.head().oid == theirs


def test_killed_in_the_middle_of_an_upload(hub, worker, run):
    hub.make(REPO, {"README.md": b"# Here\n"})
    before = hub.repos[REPO].head()
    hub.fail("PUT", "/large/", "stall", times=9)
    job = worker.start("publish", run=run / "batchtopk", repo=REPO)
    assert hub.stalled.wait(120)
    job.kill()
    hub.release()
    assert hub.repos[REPO].head() == before
    done(worker.run("publish", run=run / "batchtopk", repo=REPO))
    wait_until(lambda: hub.repos[REPO].head() != before)


def test_interrupted_in_the_middle_of_an_upload(hub, worker, run):
    hub.fail("PUT", "/large/", "stall", times=9)
    job = worker.start("publish", run=run / "batchtopk", repo=REPO)
    assert hub.stalled.wait(120)
    os.kill(job.pid, signal.SIGINT)
    hub.release()
    refused(job.wait(), "KeyboardInterrupt", "nothing was published", f"{hub.endpoint}/{REPO}")
    assert hub.files(REPO).keys() == {".gitattributes"}


@pytest.mark.promise("What fails after a commit names the commit.")
@pytest.mark.parametrize("damage", ["corrupt", 404])
def test_what_does_not_come_back_is_said_and_the_commit_named(hub, worker, run, damage):
    hub.fail("GET", "/large/", damage)
    outcome = worker.run("publish", run=run / "batchtopk", repo=REPO, tag="v1")
    head = hub.repos[REPO].head().oid
    refused(outcome, "RunFailure", f"has the new commit {head}", "check of it failed")
    assert f"to take it back, run `git revert {head}`" in outcome.message
    assert hub.repos[REPO].tags == {}


def test_a_tag_that_fails_is_said_and_the_commit_named(hub, worker, run):
    hub.fail("POST", "/tag/", 500)
    outcome = worker.run("publish", run=run / "batchtopk", repo=REPO, tag="v1")
    head = hub.repos[REPO].head().oid
    refused(outcome, "RunFailure", f"published as commit {head}", "without the tag")
    assert f"`git revert {head}`" in outcome.message


def test_a_full_disk_during_the_check(hub, worker, run):
    outcome = worker.run("publish", run=run / "batchtopk", repo=REPO, file_size_limit=30_000)
    head = hub.repos[REPO].head().oid
    refused(outcome, "RunFailure", head, "too large for the disk")


@pytest.mark.slow
def test_a_hub_that_keeps_failing_is_given_up(hub, worker, run):
    hub.fail("PUT", "/large/", 503, times=99)
    outcome = worker.run("publish", run=run / "batchtopk", repo=REPO)
    refused(outcome, "RunFailure", "failed (503)", "nothing was published")
    assert hub.files(REPO).keys() == {".gitattributes"}
