"""Checkpoints of SAELens 2, 3 and 5 are shown as what SAELens loads them as."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import save_file

from msae_plugin.common.errors import InputError
from msae_plugin.hub.card_data import card_entry
from msae_plugin.saes.find import find_saes, locate, read_checkpoint, read_folder

HOOK = "blocks.1.hook_resid_post"
COMMON = {"model_name": "gpt2", "context_size": 32, "d_in": 8, "d_sae": 16, "dtype": "float32"}
FORMATS: dict[str, dict[str, Any]] = {
    "2": {"hook_point": HOOK, "hook_point_layer": 1},
    "3": {"hook_name": HOOK, "activation_fn": "relu", "sae_lens_version": "3.0.0"},
    "5": {
        "hook_name": HOOK,
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "sae_lens_training_version": "5.0.0",
    },
}


def write(folder: Path, own: dict[str, Any]) -> None:
    weights = {
        "W_enc": torch.randn(8, 16),
        "W_dec": torch.randn(16, 8),
        "b_enc": torch.zeros(16),
        "b_dec": torch.zeros(8),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**COMMON, **own}))


@pytest.mark.parametrize("version", FORMATS)
def test_it_is_described_as_saelens_loads_it(version: str, tmp_path: Path) -> None:
    write(tmp_path, FORMATS[version])
    loaded = SAE.load_from_disk(tmp_path).cfg
    described = read_checkpoint(tmp_path)
    files = {"cfg.json": json.loads((tmp_path / "cfg.json").read_text())}
    card = card_entry("sae", files.get, has_jumprelu=False, figures=())
    assert described.architecture == card.trained_as == loaded.architecture()
    for name in ("hook_name", "model_name", "context_size"):
        wanted = getattr(loaded.metadata, name)
        assert described.metadata[name] == wanted
        assert card.recorded(name) == str(wanted)


def test_what_the_migration_stumbles_over_is_named(tmp_path: Path) -> None:
    write(tmp_path, {**FORMATS["5"], "activation_fn_kwargs": None})
    with pytest.raises(InputError, match=r"cfg\.json.*as SAELens 5 wrote it"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("read", [read_folder, find_saes, lambda path: locate(str(path))])
@pytest.mark.parametrize(
    ("file", "library"), [("layers.0/sae.safetensors", "sparsify"), ("params.npz", "Gemma Scope")]
)
def test_an_sae_of_another_library_is_named(
    read: Any, file: str, library: str, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(InputError, match=rf"holds an SAE of {library}: msae import"):
        read(tmp_path)
