"""SAEDashboard pages beside a report: what it is handed, and where its pages go.

SAEDashboard is no dependency, so that a stand-in records the calls here; `test_dashboard.py` runs
the real one where it is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from sae_lens import SAE
from typer.testing import CliRunner

from msae_cli.app import app
from msae_plugin.common.errors import InputError
from msae_plugin.reporting.dashboards import DashboardRequest, require_dashboard
from msae_plugin.reporting.report import report

Calls = list[dict[str, Any]]
INSTALLED = importlib.util.find_spec("sae_dashboard") is not None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What a stand-in for SAEDashboard is asked for."""
    found: Calls = []

    class Runner:
        def __init__(self, config: Any) -> None:
            self.config = config

        def run(self, encoder: Any, model: Any, tokens: Any) -> Any:
            found.append({**vars(self.config), "encoder": encoder, "tokens": tokens})
            return SimpleNamespace(model=model)

    def save_feature_centric_vis(sae_vis_data: Any, filename: Path) -> None:
        filename.write_text("<html>latents</html>")

    contents = {
        "sae_dashboard": {},
        "sae_dashboard.sae_vis_runner": {"SaeVisRunner": Runner},
        "sae_dashboard.sae_vis_data": {"SaeVisConfig": SimpleNamespace},
        "sae_dashboard.data_writing_fns": {"save_feature_centric_vis": save_feature_centric_vis},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes, __spec__=importlib.util.spec_from_loader(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_pages_of_the_most_frequent_latents(trained_run: Path, tmp_path: Path, calls: Calls):
    output = tmp_path / "report"
    report([trained_run], output, dashboards=DashboardRequest(count=3, windows=5))
    pages = sorted(path.name for path in (output / "dashboards").iterdir())
    assert pages == ["batchtopk.html", "multiscale.html"]
    page, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    for name in pages:
        assert f'href="dashboards/{name}"' in page
        assert f"](dashboards/{name})" in text
    ours = next(call for call in calls if call["encoder"].cfg.architecture() == "jumprelu")
    assert ours["hook_point"] == "blocks.1.hook_resid_post"
    assert ours["tokens"].shape[0] == 5
    sae = SAE.load_from_disk(trained_run / "multiscale" / "jumprelu")
    assert ours["tokens"].shape[1] == sae.cfg.metadata.context_size
    assert len(ours["features"]) == 3
    # Another report takes the place of this one, pages and all.
    report([trained_run], output)
    assert not (output / "dashboards").exists()


def test_chosen_latents(trained_run: Path, tmp_path: Path, calls: Calls):
    report([trained_run], tmp_path / "report", dashboards=DashboardRequest(latents=(7, 3)))
    assert [call["features"] for call in calls] == [[7, 3], [7, 3]]


def test_a_latent_that_is_not_there(trained_run: Path, tmp_path: Path, calls: Calls):
    wanted = DashboardRequest(latents=(3, 96))
    with pytest.raises(InputError, match="has latents 0 to 95; got 96"):
        report([trained_run], tmp_path / "report", dashboards=wanted)
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="SAEDashboard is not installed")
def test_with_the_package_itself(trained_run: Path, tmp_path: Path):
    report([trained_run], tmp_path / "report", dashboards=DashboardRequest(count=2, windows=16))
    pages = sorted((tmp_path / "report" / "dashboards").iterdir())
    assert [page.name for page in pages] == ["batchtopk.html", "multiscale.html"]
    for page in pages:
        assert len(page.read_text()) > 10_000


@pytest.mark.skipif(INSTALLED, reason="SAEDashboard is installed")
def test_without_the_package_nothing_is_begun(trained_run: Path, tmp_path: Path):
    with pytest.raises(InputError, match="needs SAEDashboard: pip install"):
        require_dashboard()
    with pytest.raises(InputError, match="needs SAEDashboard"):
        report([trained_run], tmp_path / "report", dashboards=DashboardRequest())
    assert not (tmp_path / "report").exists()


def test_latents_that_are_no_numbers():
    found = CliRunner().invoke(app, ["report", "runs/a", "-o", "out", "--latents", "3,x"])
    assert found.exit_code == 2
    assert "give numbers of latents" in found.output
