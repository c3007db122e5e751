"""Files and folders are whole or absent; refusals keep what is wrong apart from what to do."""

import errno
import pickle
from pathlib import Path

import pytest

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.files import (
    MARKER,
    file_written_atomically,
    kept_folder,
    package_folder,
)
from msae_plugin.common.stored import read_json_object


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")

    def killed() -> None:
        with file_written_atomically(target) as temporary:
            temporary.write_text("half")
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        killed()
    assert target.read_text() == "old"
    with file_written_atomically(target) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_kept_folder_is_computed_once_and_again_after_a_failure(tmp_path: Path) -> None:
    computed: list[Path] = []

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    def compute(folder: Path) -> None:
        assert list(folder.iterdir()) == []  # nothing of the failure is left
        computed.append(folder)
        (folder / "whole").touch()

    with pytest.raises(RuntimeError):
        kept_folder(tmp_path, "kind", {"a": 1}, fail)
    first = kept_folder(tmp_path, "kind", {"a": 1}, compute)
    assert kept_folder(tmp_path, "kind", {"a": 1}, compute) == first
    assert kept_folder(tmp_path, "kind", {"a": 2}, compute) != first
    assert len(computed) == 2


@pytest.mark.promise("No damaged byte of stored activations is trained on or measured with.")
@pytest.mark.parametrize("damage", ["bit", "missing", "marker", "no marker", "not JSON"])
def test_a_kept_folder_whose_bytes_changed_is_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    def compute(folder: Path) -> None:
        (folder / "inside").mkdir()
        (folder / "inside" / "numbers").write_bytes(bytes(1000))

    folder = kept_folder(tmp_path, "kind", {"a": 1}, compute)
    file, marker = folder / "inside" / "numbers", folder / MARKER
    if damage == "bit":
        file.write_bytes(bytes(500) + b"\1" + bytes(499))
    elif damage == "missing":
        file.unlink()
    elif damage == "no marker":
        marker.unlink()
    else:
        marker.write_text(marker.read_text().replace('"a"', '"b"') if damage == "marker" else "{")
    assert kept_folder(tmp_path, "kind", {"a": 1}, compute) == folder
    assert file.read_bytes() == bytes(1000)
    assert ("is damaged: it is computed again" in caplog.text) == (damage != "no marker")


def test_a_full_disk_is_told_with_the_folder_that_it_is(tmp_path: Path) -> None:
    def compute(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    told = r"kind/\w+ cannot be written .*; [1-9]\S* [KMGT]iB are free there"
    with pytest.raises(RunFailure, match=told):
        kept_folder(tmp_path, "kind", {"a": 1}, compute)


def test_a_kept_folder_of_version_0_1_is_used(tmp_path: Path) -> None:
    folder = kept_folder(tmp_path, "kind", {"a": 1}, lambda made: (made / "x").write_text("whole"))
    (folder / MARKER).write_text('{"a": 1}')
    (folder / "x").write_text("kept")

    def never(_: Path) -> None:
        raise AssertionError

    assert (kept_folder(tmp_path, "kind", {"a": 1}, never) / "x").read_text() == "kept"


def test_a_package_is_found_without_being_imported() -> None:
    folder = package_folder("msae_plugin")
    assert folder is not None
    assert (folder / "common" / "files.py").is_file()
    assert package_folder("no_such_package") is None


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content, message in (("[1]", "does not hold a JSON object"), ("{", "cannot be read")):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            read_json_object(file)


def test_refusals_keep_both_fields() -> None:
    error = InputError("there is no x", "write y")
    assert str(error) == "there is no x: write y"
    # Processes of a run send them to each other.
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.what, copied.how) == (str(error), "there is no x", "write y")
    assert InputError("no advice").how is None
