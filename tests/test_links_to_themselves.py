"""A link that leads to itself is a wrong input, wherever it is given."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from msae_cli.app import app
from msae_plugin.common.errors import InputError
from msae_plugin.saes.run_record import sae_roots


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    link = tmp_path / "loop"
    link.symlink_to(link)
    return link


@pytest.mark.parametrize("command", [["info"], ["report"], ["publish", "--repo", "jane/x"]])
def test_a_command_refuses_it(loop: Path, tmp_path: Path, command: list[str]) -> None:
    output = [] if command[0] == "info" else ["--output", str(tmp_path / "out")]
    output += ["--dry-run"] if command[0] == "publish" else []
    outcome = CliRunner().invoke(app, [*command, str(loop), *output])
    assert outcome.exit_code == 2


def test_a_run_whose_record_names_it_is_refused(loop: Path) -> None:
    with pytest.raises(InputError, match="the folder of 'a' can be none"):
        sae_roots(loop.parent, {"saes": {"a": {"folder": loop.name}}})
