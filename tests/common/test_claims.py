"""One process at a time writes a folder; what a dead one held is taken over."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from msae_cli.arguments import check_output
from msae_plugin.common.claims import CLAIM, claim_when_free, claimed_output, release
from msae_plugin.common.errors import InputError
from msae_plugin.common.files import kept_folder

SPAWN = multiprocessing.get_context("spawn")


def hold(folder: Path, share: str | None, held: Connection) -> None:
    with claimed_output(folder, share):
        held.send(True)
        time.sleep(600)


def test_an_output_below_a_thousand_folders_is_refused(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 1500)
    refusal = f"^--output '{tmp_path.parts[0]}.* lies 1500 folders below any that exists: give .*$"
    for refused in (check_output, lambda output: claimed_output(output).__enter__()):
        with pytest.raises(InputError, match=refusal) as error:
            refused(deep)
        assert len(str(error.value)) < 300
    assert not (tmp_path / "d").exists()


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> "Iterator[multiprocessing.Process]":
    """Another process that holds `tmp_path / "out"`, all of it or the share in the parameter."""
    here, there = SPAWN.Pipe()
    share = getattr(request, "param", None)
    process = SPAWN.Process(target=hold, args=(tmp_path / "out", share, there), daemon=True)
    process.start()
    assert here.recv()
    yield process  # pyright: ignore[reportReturnType]
    process.kill()


@pytest.mark.promise("Two commands at once do not share a folder: one is refused, or waits.")
def test_a_folder_is_held_by_one_process_until_it_dies(
    holder: "multiprocessing.Process", tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for share in (None, "part-1-of-2"):
        with (
            pytest.raises(InputError, match=rf"is being written by process {holder.pid}: wait"),
            claimed_output(out, share),
        ):
            pass
    assert [path.name for path in out.iterdir()] == [CLAIM]
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with claimed_output(out):
        assert json.loads((out / CLAIM).read_text())["pid"] == os.getpid()
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("holder", ["part-1-of-2"], indirect=True)
def test_shares_of_the_work_go_together_and_all_of_it_with_none(
    holder: "multiprocessing.Process", tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with claimed_output(out, "part-2-of-2"):
        pass
    for share in (None, "part-1-of-2"):
        with (
            pytest.raises(InputError, match=rf"process {holder.pid}"),
            claimed_output(out, share),
        ):
            pass


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        # The number is that of this process's parent, which began at another time.
        ({"pid": os.getppid(), "host": socket.gethostname(), "started": "0"}, None),
        ({"pid": 2**22 + 1, "host": socket.gethostname(), "started": None}, None),
        (
            {"pid": 1, "host": "elsewhere", "started": None},
            r"process 1 on elsewhere .*delete",
        ),
        # Left by a process that was killed before it wrote into it: taken over after a wait.
        ("", None),
    ],
)
def test_whose_claim_counts(tmp_path: Path, claim: object, message: str | None) -> None:
    text = claim if isinstance(claim, str) else json.dumps(claim)
    (tmp_path / CLAIM).write_text(text)
    if message is None:
        with claimed_output(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(InputError, match=message), claimed_output(tmp_path):
            pass
        assert (tmp_path / CLAIM).read_text() == text


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out", Path("/proc/msae/run")):
        with (
            pytest.raises(InputError, match=rf"--output '{place}' cannot be written \(") as error,
            claimed_output(place),
        ):
            pass
        assert "\n" not in str(error.value)
        assert not place.exists()


@pytest.mark.parametrize(("share", "left"), [(None, "part-1-of-2"), ("part-1-of-2", None)])
def test_the_empty_claim_of_a_killed_process_is_waited_for(
    tmp_path: Path, share: str | None, left: str | None
) -> None:
    """A process may be killed between making its claim and writing into it."""
    (tmp_path / (CLAIM if left is None else f"{CLAIM}-{left}")).touch()
    with claimed_output(tmp_path, share):
        assert (tmp_path / (CLAIM if share is None else f"{CLAIM}-{share}")).read_text()


def test_a_folder_that_stays_empty_is_gone_with_its_parents(tmp_path: Path) -> None:
    with claimed_output(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with claimed_output(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def fill(root: Path, order: "multiprocessing.Queue[str]") -> None:
    def compute(folder: Path) -> None:
        (folder / "half").touch()
        order.put("began")
        time.sleep(1.5)
        assert (folder / "half").exists()  # nobody emptied it
        order.put("ended")

    kept_folder(root, "kind", {"a": 1}, compute)


@pytest.mark.promise("Two commands at once do not share a folder: one is refused, or waits.")
def test_a_cache_folder_is_filled_once_by_processes_that_want_it_together(tmp_path: Path) -> None:
    order: multiprocessing.Queue[str] = SPAWN.Queue()
    processes = [SPAWN.Process(target=fill, args=(tmp_path, order)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [order.get(), order.get()] == ["began", "ended"]
    assert order.empty()
    assert [
        path.name for path in (tmp_path / "kind").iterdir() if path.name.startswith(CLAIM)
    ] == []


def test_waiting_ends_with_the_release(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    beside = tmp_path / f"{CLAIM}-folder"
    beside.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": None}))
    threading.Timer(1.0, release, args=[folder]).start()
    claim_when_free(folder)
    assert json.loads(beside.read_text())["pid"] == os.getpid()
