"""Damaged activations of a comparison are named, and no SAE is trained on them."""

import json
from pathlib import Path

import pytest
import torch

from msae_plugin.common.errors import InputError
from msae_plugin.comparison.activations import FOLDER, FORMAT, MANIFEST, open_activations
from msae_plugin.training.activation_store import ActivationWriter

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    facts = {
        "format": FORMAT,
        "key": "key",
        "rows": 9000,
        "training_rows": 8960,
        "batch_size": 128,
        "model": {},
        "data": {},
        "metadata": {},
    }
    writer = ActivationWriter(tmp_path / FOLDER, facts, [HOOK], manifest=MANIFEST)
    writer.append({HOOK: torch.randn(9000, 3)}, {})
    writer.finish(1.0)
    return tmp_path


@pytest.mark.promise("No damaged byte of stored activations is trained on or measured with.")
def test_damaged_rows_are_never_in_a_batch(output: Path) -> None:
    sound = open_activations(output)
    assert sound is not None
    sound.batch(HOOK, 0, 0)
    file = output / FOLDER / f"{HOOK}.bin"
    contents = bytearray(file.read_bytes())
    contents[100 * 12] ^= 1
    file.write_bytes(contents)
    damaged = open_activations(output)
    assert damaged is not None
    with pytest.raises(InputError, match=r"resid_post.bin' is damaged: delete"):
        damaged.batch(HOOK, 0, 0)
    assert torch.equal(damaged.samples(HOOK, 0), sound.samples(HOOK, 0))


@pytest.mark.parametrize("contents", ["[]", "{", "null", '{"format": 1}'])
def test_a_damaged_manifest_is_named(output: Path, contents: str) -> None:
    (output / FOLDER / MANIFEST).write_text(contents)
    with pytest.raises(InputError, match=MANIFEST):
        open_activations(output)


def test_a_changed_manifest_is_noticed(output: Path) -> None:
    path = output / FOLDER / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "batch_size": 64}))
    with pytest.raises(InputError, match="is damaged: delete"):
        open_activations(output)
