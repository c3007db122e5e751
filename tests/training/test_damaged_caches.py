"""Damaged bytes of stored activations are found when they are read, and never trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from msae_plugin.common.errors import InputError
from msae_plugin.training import activation_store
from msae_plugin.training.activation_store import (
    CachedActivations,
    HashedRows,
    open_cache,
    row_hashes,
)
from msae_plugin.training.runner import RunResult

HOOK = "blocks.1.hook_resid_post"
WIDTH = 64


def flip(path: Path, place: int) -> None:
    """One bit of a byte."""
    with path.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1]))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in few rows."""
    monkeypatch.setattr(activation_store, "ROWS_PER_HASH", 200)


Make = Callable[..., CachedActivations]
SHORT = "training.tokens=1280"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_of_a_file_is_held_by_the_hash_of_its_block(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path, rows = tmp_path / "rows.bin", torch.randn(901, 3).to(dtype)
    path.write_bytes(rows.view(torch.uint8).numpy().tobytes())
    hashes = row_hashes(rows)
    assert row_hashes(rows, hashes[:2]) == hashes
    assert len(hashes) == 5

    def opened() -> HashedRows:
        return HashedRows(path, 901, 3, dtype, hashes, "damaged")

    assert torch.equal(opened()[:], rows)
    # Row 450 is in the third block of 200.
    flip(path, 450 * 3 * dtype.itemsize)
    found = opened()
    assert torch.equal(found[:400], rows[:400])
    assert torch.equal(found[600:], rows[600:])
    assert torch.equal(found[torch.tensor([0, 399, 600, 900])], rows[[0, 399, 600, 900]])
    for chosen in (slice(400, 410), slice(399, 401), torch.tensor([0, 599]), slice(-500, None)):
        with pytest.raises(InputError, match="damaged"):
            opened()[chosen]
    with pytest.raises(InputError, match="damaged"):
        HashedRows(path, 901, 3, dtype, hashes[:-1], "damaged")


@pytest.mark.promise("No damaged byte of stored activations is trained on or measured with.")
def test_training_ends_where_the_cache_is_damaged_and_goes_on_with_a_whole_one(
    cache: Make, train_from: Callable[..., RunResult], tmp_path: Path
) -> None:
    cache(tmp_path / "cache", SHORT)
    shutil.copytree(tmp_path / "cache", tmp_path / "damaged")
    expected = train_from(tmp_path / "whole", tmp_path / "cache", SHORT).saes["sae"].state_dict()
    flip(tmp_path / "damaged" / f"{HOOK}.bin", 1000 * WIDTH * 4)
    # In the place of the sound one: a recipe names its cache.
    (tmp_path / "cache").rename(tmp_path / "sound")
    (tmp_path / "damaged").rename(tmp_path / "cache")
    with pytest.raises(InputError, match=r"resid_post.bin' is damaged: make the cache again"):
        train_from(tmp_path / "run", tmp_path / "cache", SHORT)
    assert not (tmp_path / "run" / "sae").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "sound").rename(tmp_path / "cache")
    resumed = train_from(tmp_path / "run", tmp_path / "cache", SHORT, resume="auto")
    found = resumed.saes["sae"].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_changed_manifest_is_noticed(cache: Make, tmp_path: Path) -> None:
    cache(tmp_path, SHORT)
    path = tmp_path / "cache.json"
    contents = json.loads(path.read_text())
    assert len(contents["sha256"][HOOK]) == -(-contents["rows"] // 200)
    contents["model"]["name"] = "another"
    path.write_text(json.dumps(contents))
    with pytest.raises(InputError, match="is damaged: make the cache again"):
        open_cache(tmp_path)


def test_a_cache_without_hashes_is_read(cache: Make, tmp_path: Path) -> None:
    expected = cache(tmp_path, SHORT).tensors[HOOK][:]
    path = tmp_path / "cache.json"
    contents = json.loads(path.read_text())
    del contents["sha256"], contents["digest"]
    path.write_text(json.dumps(contents))
    assert torch.equal(open_cache(tmp_path).tensors[HOOK][:], expected)


@pytest.mark.promise("No damaged byte of stored activations is trained on or measured with.")
@pytest.mark.parametrize("damage", ["rows", "position", "progress", "no progress"])
def test_a_stopped_pass_goes_on_only_from_what_was_written(
    cache: Make,
    tmp_path: Path,
    killed_after: Callable[[int], AbstractContextManager[None]],
    damage: str,
) -> None:
    with killed_after(7):
        cache(tmp_path, SHORT)
    progress, rows = tmp_path / "progress.json", tmp_path / f"{HOOK}.bin"
    (position,) = tmp_path.glob("position-*.pt")
    done = json.loads(progress.read_text())["done"]
    assert done % 200
    sound = {path: path.read_bytes() for path in (progress, rows, position)}
    if damage == "rows":
        flip(rows, (done - 1) * WIDTH * 4)
    elif damage == "position":
        flip(position, position.stat().st_size // 2)
    elif damage == "progress":
        progress.write_text(progress.read_text().replace(f'"done": {done}', f'"done": {done} '))
        text = json.loads(progress.read_text())
        text["sha256"][HOOK][0] = text["sha256"][HOOK][0][::-1]
        progress.write_text(json.dumps(text))
    else:
        progress.write_text("{")
    with pytest.raises(InputError, match=r"is damaged: delete it|progress.json' cannot be read"):
        cache(tmp_path, SHORT)
    for path, contents in sound.items():
        path.write_bytes(contents)
    cache(tmp_path, SHORT)
