"""Files and folders are whole or absent; refusals keep what is wrong apart from what to do."""

import pickle
from pathlib import Path

import pytest

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import (
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
