"""SAEDashboard on the jumprelu copy, where SAEDashboard is installed.

It is no dependency: version 0.8 declares transformer-lens<3 (and ran with 3.9 all the same).
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
import torch
from sae_lens import SAE
from test_card import entry

from msae_plugin.hub.publish import dashboard_command, dashboard_hint

INSTALLED = importlib.util.find_spec("sae_dashboard") is not None


def test_the_hint_says_whether_it_is_installed():
    assert ("not installed" in dashboard_hint()) is not INSTALLED


if INSTALLED:

    @pytest.mark.slow
    def test_dashboards_of_a_jumprelu_copy(trained_run, tiny_language_model, tmp_path):
        from sae_dashboard.data_writing_fns import save_feature_centric_vis
        from sae_dashboard.sae_vis_data import SaeVisConfig
        from sae_dashboard.sae_vis_runner import SaeVisRunner

        jumprelu = SAE.load_from_disk(trained_run / "multiscale" / "jumprelu")
        assert jumprelu.cfg.architecture() == "jumprelu"
        config = SaeVisConfig(
            hook_point=jumprelu.cfg.metadata.hook_name,
            features=range(4),
            minibatch_size_features=4,
            minibatch_size_tokens=8,
        )
        tokens = torch.randint(3, 500, (16, 32), generator=torch.Generator().manual_seed(0))
        data = SaeVisRunner(config).run(
            encoder=jumprelu, model=tiny_language_model.model, tokens=tokens
        )
        save_feature_centric_vis(sae_vis_data=data, filename=tmp_path / "page.html")
        assert len((tmp_path / "page.html").read_text()) > 10_000

    @pytest.mark.slow
    def test_the_command_has_arguments_that_the_dashboard_knows():
        words = shlex.split(dashboard_command("ada/saes", entry()) or "")
        answer = subprocess.run(
            [sys.executable, *words[1:3], "--help"], capture_output=True, text=True, check=True
        )
        known = set(re.findall(r"--[\w-]+", answer.stdout))
        assert {word for word in words if word.startswith("--")} <= known
