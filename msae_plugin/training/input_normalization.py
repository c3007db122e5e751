"""`input_normalization: first_batch` for architectures of SAELens, by our trainer.

A multiscale SAE brings it (`architecture/input_units.py`). So that a comparison gives every method
the same help, the trainer centres and scales the activations of any other SAE in the same way, and
folds both into its weights when training is over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file
from typing_extensions import override

from msae_plugin.architecture.input_units import estimate_units
from msae_plugin.architecture.ranks import Ranks
from msae_plugin.common.errors import InputError

_CENTRE_FILE = "activation_centre.safetensors"


class CentringScaler(ActivationScaler):
    """SAELens' scaler, which subtracts a centre (d_in,) first: (x - centre) * scaling_factor."""

    centre: torch.Tensor | None = None  # (d_in,); None until it is estimated

    @torch.no_grad()
    def estimate(self, activations: torch.Tensor, ranks: Ranks) -> None:
        """Take centre and factor from the first batch (n_tokens, d_in) of all ranks."""
        if self.centre is None:
            shift, scale = estimate_units(ranks.concatenated(activations)[0])
            self.centre, self.scaling_factor = shift, 1 / float(scale)

    @override
    def scale(self, acts: torch.Tensor) -> torch.Tensor:
        if self.centre is not None:
            acts = (acts - self.centre.to(acts.device)).to(acts.dtype)
        return super().scale(acts)

    @override
    def unscale(self, acts: torch.Tensor) -> torch.Tensor:
        acts = super().unscale(acts)
        if self.centre is None:
            return acts
        return (acts + self.centre.to(acts.device)).to(acts.dtype)

    @override
    def save(self, file_path: str) -> None:
        super().save(file_path)
        if self.centre is not None:
            save_file({"centre": self.centre.contiguous()}, Path(file_path).parent / _CENTRE_FILE)

    @override
    def load(self, file_path: str | Path) -> None:
        super().load(file_path)
        centre = Path(file_path).parent / _CENTRE_FILE
        self.centre = load_file(centre)["centre"] if centre.exists() else None


def check_can_be_centred(cfg: Any, where: str) -> None:
    """Refuse a configuration into whose weights the centre does not fold."""
    if cfg.normalize_activations != "none":
        raise InputError(
            f"'{where}' sets input_normalization and normalize_activations: leave one out"
        )
    if not cfg.apply_b_dec_to_input:
        raise InputError(
            f"'{where}.input_normalization' folds into b_dec, which this SAE does not subtract: "
            "set apply_b_dec_to_input to true"
        )


@torch.no_grad()
def fold_centre(sae: TrainingSAE[Any], scaler: ActivationScaler) -> None:
    """Let the SAE take raw activations; its scaling factor is folded in already."""
    if isinstance(scaler, CentringScaler) and scaler.centre is not None:
        sae.b_dec.add_(scaler.centre.to(sae.b_dec))
        scaler.centre = None
