"""What a comparison refuses before anything is made, and a disk that fills while it runs."""

import errno
from pathlib import Path
from typing import Any

import pytest

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.comparison import compare as module
from msae_plugin.comparison.compare import compare
from msae_plugin.comparison.recipe import CompareConfig


def test_a_dictionary_that_no_memory_holds(
    ground_truth_recipe: dict[str, Any], tmp_path: Path
) -> None:
    saes = {"batchtopk": {"architecture": "batchtopk", "d_sae": 10**9}}
    config = CompareConfig.from_dict(ground_truth_recipe | {"common": {}, "saes": saes})
    with pytest.raises(InputError, match=r"d_sae 1000000000 takes .* lower d_sae"):
        compare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "training.batch_size_tokens",
        "synthetic.eval_batch_size",
        "synthetic.eval_samples",
        "synthetic.model.num_features",
    ],
)
def test_samples_that_no_memory_holds(
    ground_truth_recipe: dict[str, Any], tmp_path: Path, name: str
) -> None:
    sizes = {name: 10**12, "training.tokens": 10**13, "synthetic.eval_samples": 10**12}
    if name == "synthetic.eval_samples":
        sizes["synthetic.eval_batch_size"] = 64
    recipe = ground_truth_recipe | {"saes": {"batchtopk": {"architecture": "batchtopk"}}}
    config = CompareConfig.from_dict(recipe, [f"{key}={value}" for key, value in sizes.items()])
    with pytest.raises(InputError, match=rf"{name} takes .* at once, .* lower {name}"):
        compare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk(
    ground_truth_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_compare", full)
    saes = {"batchtopk": {"architecture": "batchtopk"}}
    config = CompareConfig.from_dict(ground_truth_recipe | {"saes": saes})
    with pytest.raises(
        RunFailure, match=r"out cannot be written .*; [1-9]\S* [KMGT]iB are free there"
    ):
        compare(config, tmp_path / "out")
