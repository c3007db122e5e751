"""Damaged results of an earlier call of the same command are named, or made again."""

import json
from pathlib import Path

import pytest

from msae_plugin.common.errors import InputError
from msae_plugin.comparison.results import store_metrics, stored_metrics
from msae_plugin.comparison.training_schedule import Search, Trial
from msae_plugin.evaluation.evaluate import FILE, read_outcomes, write_outcomes
from msae_plugin.evaluation.outcomes import ScoreResult

DAMAGED = ("", "{", "[]", "null", "[" * 100_000, '{"key": "key"}', '{"a": 1}', '{"a": []}')


@pytest.mark.parametrize("contents", DAMAGED)
def test_outcomes(tmp_path: Path, contents: str) -> None:
    (tmp_path / "a.json").write_text("{}")
    write_outcomes(tmp_path, {"a": "key"}, {"a": ScoreResult("measured", {"x": 1.0})})
    (tmp_path / FILE).write_text(contents)
    with pytest.raises(InputError, match=rf"{FILE} is damaged .*: delete it or give another"):
        read_outcomes(tmp_path, {"a": "key"})


def test_an_outcome_without_numbers(tmp_path: Path) -> None:
    write_outcomes(tmp_path, {"a": "key"}, {"a": ScoreResult("measured", {"x": 1.0})})
    contents = json.loads((tmp_path / FILE).read_text())
    contents["a"]["metrics"] = {"x": "1.0"}
    (tmp_path / FILE).write_text(json.dumps(contents))
    with pytest.raises(InputError, match=rf"{FILE} is damaged"):
        read_outcomes(tmp_path, {"a": "key"})


@pytest.mark.parametrize("contents", DAMAGED)
def test_numbers_of_a_comparison_are_measured_again(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "heldout.json"
    store_metrics(path, "key", {"x": 1.0})
    assert stored_metrics(path, "key") == {"x": 1.0}
    path.write_text(contents)
    assert stored_metrics(path, "key") is None


@pytest.mark.parametrize("contents", DAMAGED)
def test_a_search(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "search" / "standard_l0-6.json"
    search = Search(path, "key", 6.0, [Trial(1.0, 7.0, 640)], 1.5, settled=True)
    search.save()
    assert Search.load(path, 6.0, ["key"]) == search
    path.write_text(contents)
    with pytest.raises(InputError, match=r"standard_l0-6.json is damaged .*: delete it"):
        Search.load(path, 6.0, ["key"])
