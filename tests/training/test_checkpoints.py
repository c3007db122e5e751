import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import folder_written_atomically, write_text_atomic
from msae_plugin.training.checkpoints import MANIFEST_FILE, CheckpointStore, open_checkpoint


def write_weights(folder: Path) -> None:
    (folder / "sae").mkdir()
    (folder / "sae" / "weights.bin").write_bytes(b"x" * 1000)
    (folder / "state.json").write_text("{}")


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, 100 * step, {"seed": 1}, write_weights)


def test_a_saved_checkpoint_reads_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    path = save(store, 4)
    assert path == tmp_path / "checkpoints" / "400"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, checkpoint.tokens, checkpoint.config) == (4, 400, {"seed": 1})
    assert store.newest() == checkpoint


def test_newest_is_by_step_not_by_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    for step in (9, 10, 2):
        save(store, step)
    newest = store.newest()
    assert newest is not None
    assert newest.step == 10


def test_only_the_newest_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["300", "400"]


def test_keep_none_still_keeps_one_until_the_end(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=0)
    save(store, 1)
    save(store, 2)
    assert [checkpoint.step for checkpoint in store.complete()] == [2]
    store.finish()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("file", ["sae/weights.bin", "state.json"])
def test_a_truncated_file_is_named(tmp_path: Path, file: str) -> None:
    path = save(CheckpointStore(tmp_path, keep=1), 1)
    os.truncate(path / file, 1)
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path / file) in message
    assert "truncated" in message
    assert "\n" not in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path, keep=1), 1)
    (path / "state.json").unlink()
    with pytest.raises(InputError, match=r"state\.json.*missing"):
        open_checkpoint(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": "x", "files": {}}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    path = save(CheckpointStore(tmp_path, keep=1), 1)
    (path / MANIFEST_FILE).write_text(text)
    with pytest.raises(InputError, match=r"checkpoint\.json.*damaged"):
        open_checkpoint(path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a checkpoint"):
        open_checkpoint(tmp_path)


def test_auto_skips_a_damaged_checkpoint_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    save(store, 1)
    os.truncate(save(store, 2) / "sae" / "weights.bin", 10)
    with caplog.at_level(logging.WARNING):
        chosen = store.resolve("auto")
    assert chosen is not None
    assert chosen.step == 1
    assert "truncated" in caplog.text


def test_auto_without_checkpoints_is_a_new_run(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent", keep=1).resolve("auto") is None


def test_an_older_checkpoint_of_the_same_run_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    old = save(store, 1)
    save(store, 2)
    with pytest.raises(InputError, match="later"):
        store.resolve(str(old))


@pytest.mark.promise(
    "No checkpoint is lost: a kill at any moment leaves the one before, and damaged ones "
    "are named and passed by."
)
def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with folder_written_atomically(target) as folder:
        (folder / "a").write_text("old")

    def fail_half_way() -> None:
        with folder_written_atomically(target) as folder:
            (folder / "a").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_existing_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("a", "b"):
        with folder_written_atomically(target) as folder:
            (folder / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_text_file_is_replaced_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_text_atomic(path, "old")

    def crash(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def save_and_be_killed(folder: str, kill_at: int) -> None:
    """Count every call that changes the disk and die at the given one."""
    calls = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "rename", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    store = CheckpointStore(Path(folder), keep=1)
    save(store, 2)


@pytest.mark.promise(
    "No checkpoint is lost: a kill at any moment leaves the one before, and damaged ones "
    "are named and passed by."
)
def test_a_kill_at_any_call_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    steps: list[int] = []
    for kill_at in range(1, 200):
        folder = tmp_path / str(kill_at)
        save(CheckpointStore(folder, keep=1), 1)
        process = fork.Process(target=save_and_be_killed, args=(str(folder), kill_at))
        process.start()
        process.join()
        store = CheckpointStore(folder, keep=1)
        newest = store.newest()
        assert newest is not None, f"killed at call {kill_at}"
        steps.append(newest.step)
        # Reopening removed what the kill left behind.
        assert all(path.name.isdigit() for path in folder.iterdir())
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    # Early kills leave the old checkpoint, late ones the new; the calls in between were all tried.
    assert len(steps) >= 8
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, 2)


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path, keep=1), 1)
    files = json.loads((path / MANIFEST_FILE).read_text())["files"]
    assert files == {"sae/weights.bin": 1000, "state.json": 2}
