"""SAEDashboard: the SAE, and a script that makes an environment and Neuronpedia's pages in it.

Schema: the options of `neuronpedia-runner` (`sae_dashboard.neuronpedia.neuronpedia_runner`), read
in sae-dashboard 0.8.0. It declares transformer-lens<3 and datasets<4: an environment of its own.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from msae_plugin.common.errors import InputError
from msae_plugin.hub.card_data import hub_dataset
from msae_plugin.hub.formats.request import ExportRequest, plain_folder
from msae_plugin.reporting.dashboards import ARCHITECTURES
from msae_plugin.saes.find import StoredSAE, read_checkpoint

VERSION = "0.8.0"
SCRIPT = "make_dashboards.sh"


def runner_options(request: ExportRequest, sae: StoredSAE, set_name: str) -> list[str]:
    """Options of `neuronpedia-runner` for an SAE in a folder of its name beside the script.

    Raises:
        InputError: Its text has no name on the Hub, where SAEDashboard reads it.
    """
    recorded = request.text or str(sae.metadata.get("dataset_path") or "")
    dataset = hub_dataset(recorded)
    if dataset is None:
        raise InputError(
            f"SAEDashboard reads text from the Hub, and {recorded or 'none recorded'} is not there",
            "name a dataset of the Hub, --text monology/pile-uncopyrighted",
        )
    return [
        "--from-local-sae",
        "--sae-set", set_name,
        "--sae-path", sae.name,
        "--np-set-name", set_name,
        "--dataset-path", dataset,
        "--n-prompts", str(request.windows),
        "--n-tokens-in-prompt", str(sae.metadata.get("context_size") or 128),
        "--output-dir", "neuronpedia_outputs/",
    ]  # fmt: skip


def write(request: ExportRequest, folder: Path) -> list[str]:
    """Write a folder per SAE and the script."""
    set_name = (request.repo or request.run.resolve().name).rsplit("/", 1)[-1].lower()
    lines = [
        "#!/bin/sh",
        "set -eu",
        'cd "$(dirname "$0")"',
        "python3 -m venv environment",
        f"environment/bin/pip install sae-dashboard=={VERSION}",
    ]
    for sae in request.saes:
        source = plain_folder(sae, "SAEDashboard")
        architecture = read_checkpoint(source).architecture
        if architecture not in ARCHITECTURES:
            raise InputError(f"SAEDashboard does not know {sae.name}'s architecture {architecture}")
        (folder / sae.name).mkdir()
        for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
            shutil.copyfile(source / name, folder / sae.name / name)
        options = shlex.join(runner_options(request, sae, set_name))
        lines.append(f"environment/bin/neuronpedia-runner {options}")
    script = folder / SCRIPT
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    script.chmod(0o755)
    return [f"sh {SCRIPT}"]
