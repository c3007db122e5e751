"""SAEDashboard: the SAE, and a script that makes an environment and Neuronpedia's pages in it.

Schema: the options of `neuronpedia-runner` (`sae_dashboard.neuronpedia.neuronpedia_runner`), read
in sae-dashboard 0.8.0. It declares transformer-lens<3 and datasets<4: an environment of its own.
It brings numpy 1, beside which pyarrow 26 does not import; pip does not know.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from msae_plugin.common.errors import InputError
from msae_plugin.hub.card_data import hub_dataset
from msae_plugin.hub.formats.request import ExportRequest, plain_folder
from msae_plugin.saes.find import read_checkpoint
from msae_plugin.upstream import shipped_with_transformer_lens

SCRIPT = "make_dashboards.sh"
# What SAEDashboard 0.8 can take one latent out of.
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
_BEGINNING = """#!/bin/sh
set -eu
cd "$(dirname "$0")"
python3 -m venv environment
environment/bin/pip install sae-dashboard==0.8.0 'pyarrow<26'
"""


def runner_options(
    set_name: str, sae_path: str, name: str, dataset: str, context: object
) -> list[str]:
    """Options of `neuronpedia-runner` for one SAE."""
    size = [] if context is None else ["--n-tokens-in-prompt", str(context)]
    words = ["--sae-set", set_name, "--sae-path", sae_path, "--np-set-name", name.lower()]
    return [*words, "--dataset-path", dataset, *size, "--output-dir", "neuronpedia_outputs/"]


def write(request: ExportRequest, folder: Path) -> list[str]:
    """Write a folder per SAE and the script."""
    name = (request.repo or request.run.resolve().name).rsplit("/", 1)[-1]
    script, unknown = _BEGINNING, dict[str, None]()
    for sae in request.saes:
        source = plain_folder(sae, "SAEDashboard")
        if (architecture := read_checkpoint(source).architecture) not in ARCHITECTURES:
            raise InputError(f"SAEDashboard does not know {sae.name}'s architecture {architecture}")
        text = request.text or str(sae.metadata.get("dataset_path"))
        dataset = hub_dataset(text)
        if dataset is None:
            raise InputError(
                f"SAEDashboard reads text from the Hub, and {text} is not there",
                "name a dataset of the Hub, --text monology/pile-uncopyrighted",
            )
        model = str(sae.metadata.get("model_name"))
        if not shipped_with_transformer_lens(model):
            unknown[model] = None
        (folder / sae.name).mkdir()
        for file in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
            shutil.copyfile(source / file, folder / sae.name / file)
        options = runner_options(name, sae.name, name, dataset, sae.metadata.get("context_size"))
        options += ["--from-local-sae", "--n-prompts", str(request.windows)]
        script += f"environment/bin/neuronpedia-runner {shlex.join(options)}\n"
    (folder / SCRIPT).write_text(script, encoding="utf-8")
    told = (f"SAEDashboard's transformer-lens does not know {m} and will stop" for m in unknown)
    return [f"sh {SCRIPT}", *told]
