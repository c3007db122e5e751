"""What an installed wheel has: all code, the recipes and templates, the types, the entry points."""

import zipfile
from pathlib import Path

import pytest

from msae_plugin import __version__

ROOT = Path(__file__).parents[1]


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    (file,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(file) as archive:
        held = set(archive.namelist())
        info = f"msae_plugin-{__version__}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in ("msae_plugin", "msae_cli")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in held if not name.startswith(info)} == ours
    assert {"msae_plugin/py.typed", "msae_plugin/recipes/smollm2.yaml"} <= held
    assert "msae_plugin/hub/templates/card.md.j2" in held
    assert "msae = msae_cli.app:main" in entry_points
    assert "multiscale = msae_plugin" in entry_points
