"""What an export for another tool is made of, and what several of them need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from msae_plugin.architecture.config import ARCHITECTURE
from msae_plugin.common.errors import InputError
from msae_plugin.common.progress import Report, warnings_alone
from msae_plugin.evaluation.evaluate import model_for
from msae_plugin.models.loading import read_config, resolve_model
from msae_plugin.saes.find import StoredSAE, find_saes
from msae_plugin.saes.load import EvaluatedSAE
from msae_plugin.saes.run_record import read_run_record


@dataclass(frozen=True)
class ExportRequest:
    """What `msae export` was asked for."""

    run: Path  # a run, one SAE of it, or any folder of SAELens
    repo: str | None = None  # `user/name` where the SAEs are published; None before
    evaluation: Path | None = None  # output of `msae eval` on them
    latents: tuple[int, ...] = ()
    coefficient: float = 10.0  # steering, in units of the activations
    text: str | None = None  # as data.source in a recipe; None for the run's own
    windows: int = 256  # windows of that text
    report: Report = warnings_alone  # told what is done

    @cached_property
    def saes(self) -> list[StoredSAE]:
        """The SAEs of the run."""
        return find_saes(self.run)

    @property
    def data(self) -> Mapping[str, Any]:
        """`data` of the run's recipe, or the text that was asked for; empty without either."""
        for folder in (self.run, *self.run.resolve().parents[:2]):
            found = ((read_run_record(folder) or {}).get("config") or {}).get("data")
            if found and self.text in (None, found["source"]):
                return found
        return {"source": self.text, "heldout_documents": 200} if self.text else {}


def plain_folder(sae: StoredSAE, tool: str) -> Path:
    """The folder that SAELens loads without this package; refused where there is none."""
    if sae.jumprelu_export is None and sae.architecture == ARCHITECTURE:
        raise InputError(f"{tool} loads with SAELens alone: {sae.name} has no jumprelu copy")
    return sae.jumprelu_export or sae.folder


def hf_module(sae: EvaluatedSAE) -> str:
    """The module of transformers' base model whose output the SAE reads: `layers.9`, `h.9`."""
    if not sae.hook_name.endswith("hook_resid_post"):
        raise InputError(f"SAE {sae.reference!r}: {sae.hook_name} is the output of no layer")
    config = read_config(resolve_model(model_for(None, [sae])).folder)
    depth = int(config.get_text_config().num_hidden_layers)
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return f"{name}.{sae.layer}"
    raise InputError(f"{sae.model_name}: transformers has no list of its {depth} layers")
