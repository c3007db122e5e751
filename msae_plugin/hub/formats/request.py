"""What an export for another tool is made of, and what several of them need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import nn
from transformers import AutoModel

from msae_plugin.common.errors import InputError
from msae_plugin.evaluation.evaluate import model_for
from msae_plugin.models.loading import read_config, resolve_model
from msae_plugin.saes.find import StoredSAE, find_saes
from msae_plugin.saes.load import EvaluatedSAE, load_saes
from msae_plugin.saes.run_record import read_run_record


@dataclass(frozen=True)
class ExportRequest:
    """What `msae export` was asked for.

    Args:
        run: A run, one SAE of it, or any folder of SAELens.
        repo: `user/name` on the Hub where the SAEs are published; None before.
        evaluation: Output of `msae eval` on them.
        latents: Of these.
        coefficient: How far a latent is pushed along its unit direction, in units of the
            activations.
        text: What text is read, as data.source in a recipe; the run's own by default.
        windows: How many windows of it.
    """

    run: Path
    repo: str | None = None
    evaluation: Path | None = None
    latents: tuple[int, ...] = ()
    coefficient: float = 10.0
    text: str | None = None
    windows: int = 256

    @cached_property
    def saes(self) -> list[StoredSAE]:
        """The SAEs, with distinct names that are safe in a path."""
        return find_saes(self.run)

    @property
    def data(self) -> Mapping[str, Any]:
        """`data` of the run's recipe; only what was asked for, without one."""
        for folder in (self.run, *self.run.resolve().parents[:2]):
            found = ((read_run_record(folder) or {}).get("config") or {}).get("data")
            if found and self.text in (None, found["source"]):
                return found
        return {"source": self.text} if self.text else {}


def plain_folder(sae: StoredSAE, tool: str) -> Path:
    """The folder that SAELens loads without this package.

    Raises:
        InputError: There is none.
    """
    folder = sae.twin or sae.folder
    if sae.twin is None and sae.architecture == "multiscale":
        why = (sae.report or {}).get("twin_obstacle") or "it was exported without one"
        raise InputError(f"{tool} cannot load {sae.name}, which has no jumprelu twin: {why}")
    return folder


def loaded(sae: StoredSAE) -> EvaluatedSAE:
    """The SAE with decoder rows of unit norm."""
    return load_saes([str(sae.folder)])[0]


def hf_module(sae: EvaluatedSAE) -> str:
    """The module whose output the SAE reads, as the base model of transformers names it.

    Raises:
        InputError: It does not read the residual stream behind a layer, or the model is not known.
    """
    if not sae.hook_name.endswith("hook_resid_post"):
        raise InputError(
            f"SAE {sae.reference!r} reads {sae.hook_name}, which is no module's output in "
            "transformers: export one of a residual stream (hook_resid_post)"
        )
    config = read_config(resolve_model(model_for(None, [sae])).folder)
    depth = int(config.get_text_config().num_hidden_layers)
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return f"{name}.{sae.layer}"
    raise InputError(f"{sae.model_name}: no list of its {depth} layers is found in transformers")


@torch.no_grad()
def dense_latents(sae: SAE[Any], activations: torch.Tensor) -> torch.Tensor:
    """(..., d_in) to (..., d_sae), dense."""
    latents = sae.encode(activations.to(sae.device))
    return latents.to_dense() if latents.is_sparse else latents
