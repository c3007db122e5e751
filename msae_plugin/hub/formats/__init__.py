"""The tools that `msae export` writes files of an SAE for, one module for each."""

from __future__ import annotations

from pathlib import Path

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import folder_written_atomically, require_empty
from msae_plugin.hub.formats import delphi, lm_eval, neuronpedia, sae_dashboard
from msae_plugin.hub.formats.request import ExportRequest

FORMATS = {
    "neuronpedia": neuronpedia.write,
    "lm-eval": lm_eval.write,
    "sae-dashboard": sae_dashboard.write,
    "delphi": delphi.write,
}
"""Each writes into a folder and returns what to do next, a line each, seen from that folder."""


def export_for(tool: str, request: ExportRequest, output: Path) -> list[str]:
    """Write SAEs as a tool takes them into a new or empty folder; returns what to do next in it."""
    if tool not in FORMATS:
        raise InputError(f"--to {tool}: known are {', '.join(FORMATS)}")
    require_empty(output)
    with folder_written_atomically(output) as folder:
        return FORMATS[tool](request, folder)
