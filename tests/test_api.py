"""What the functions of the package return, and when SAELens is imported."""

import subprocess
import sys
from pathlib import Path

import msae_plugin as msae

FIRST_IMPORT = """
import sys
import msae_plugin
assert not {"torch", "sae_lens", "pandas"} & set(sys.modules)
assert set(msae_plugin.__all__) <= set(dir(msae_plugin))
import msae_plugin.architecture.training_sae
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
assert SAE_CLASS_REGISTRY["multiscale"][0] is msae_plugin.MultiScaleSAE
assert SAE_TRAINING_CLASS_REGISTRY["multiscale"][0] is msae_plugin.MultiScaleTrainingSAE
"""


def test_saelens_is_imported_when_needed_and_then_knows_the_architecture() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IMPORT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_result_is_short_and_stands_for_its_folder(tmp_path: Path) -> None:
    rows = [{"sae": f"s{n}", "l0": n / 2} for n in range(50)]
    result = msae.Result("train", tmp_path, None, rows, ["warning: s0: <dead>"])
    assert Path(result) == tmp_path
    assert list(result.table().columns) == ["sae", "l0"]
    assert len(result.table()) == 50
    shown = repr(result)
    assert shown.startswith(f"msae train: {tmp_path}\n")
    assert shown.endswith("warning: s0: <dead>")
    assert shown.count("\n") < 30
    assert "warning: s0: &lt;dead&gt;" in result._repr_html_()
