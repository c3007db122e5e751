"""The patch that we would offer to SAELens applies, and does what docs/upstream says."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

PATCH = Path(__file__).parents[1] / "docs" / "upstream" / "sae_lens_entry_points.patch"

# Runs SAELens with the patched registry in place of its own. The plugin is not imported.
SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sae_lens.registry", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["sae_lens.registry"] = module
spec.loader.exec_module(module)
import sae_lens
assert "msae_plugin" not in sys.modules
assert module.get_sae_class("jumprelu")[0].__name__ == "JumpReLUSAE"
assert "msae_plugin" not in sys.modules, "a known name imports nothing"
print(module.get_sae_class("multiscale")[0].__name__)
print(module.get_sae_training_class("multiscale")[0].__name__)
try:
    module.get_sae_class("no_such_architecture")
except KeyError:
    print("KeyError")
"""


def test_the_entry_point_is_declared() -> None:
    found = entry_points(group="sae_lens.architectures", name="multiscale")
    assert {point.value for point in found} == {"msae_plugin"}


@pytest.mark.skipif(shutil.which("git") is None, reason="the patch is applied with git")
def test_a_patched_saelens_loads_the_plugin_by_name(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    (tmp_path / "sae_lens").mkdir()
    shutil.copy(Path(spec.origin).parent / "registry.py", tmp_path / "sae_lens")
    subprocess.run(["git", "apply", str(PATCH)], cwd=tmp_path, check=True)
    patched = tmp_path / "sae_lens" / "registry.py"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(patched)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["MultiScaleSAE", "MultiScaleTrainingSAE", "KeyError"]
