"""Export of a trained SAE, for this package and as a plain JumpReLU SAE.

Law: the export gives the latents and reconstructions of the trained SAE in evaluation mode, to
float32 rounding, with latents in `export_order()` and a decoder of unit norm.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from safetensors.torch import save_file

from msae_plugin.architecture.config import MultiScaleConfig
from msae_plugin.architecture.float32_buffers import add_remainders
from msae_plugin.architecture.training_base import MultiScaleTrainingBase
from msae_plugin.common.errors import InputError

_EXACT_EXPORT_TENSORS = {
    "threshold": torch.float32,
    "normalisation.running_variance": torch.float32,
}


@torch.no_grad()
def exported_tensors(sae: MultiScaleTrainingBase) -> dict[str, torch.Tensor]:
    """State dict of the inference SAE: decoder rows of unit norm, (d_sae,) float32 thresholds."""
    folded = _folded_weights(sae)
    normalisation = sae.mechanisms.normalisation
    if normalisation is not None:
        for name, tensor in normalisation.state_dict().items():
            if name == "running_variance" or not sae.cfg.norm_folds_to_affine:
                folded[f"normalisation.{name}"] = tensor.clone()
    add_remainders(folded, _EXACT_EXPORT_TENSORS)
    return folded


def _folded_weights(sae: MultiScaleTrainingBase) -> dict[str, torch.Tensor]:
    dtype = torch.promote_types(sae.dtype, torch.float32)
    W_enc, b_enc = sae.W_enc.to(dtype), sae.b_enc.to(dtype)
    W_dec, norm = sae.W_dec.to(dtype), sae.get_W_dec_norm().to(dtype)
    threshold = sae.threshold().to(dtype).expand(sae.cfg.d_sae)
    if not sae.cfg.rescale_acts_by_decoder_norm:
        threshold = threshold * norm  # its pre-activations have not yet been multiplied by norms
    W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    normalisation = sae.mechanisms.normalisation
    if normalisation is not None and sae.cfg.norm_folds_to_affine:
        gain, bias, constant = (part.to(W_enc) for part in normalisation.affine())
        b_enc = (b_enc + bias @ W_enc) / constant
        W_enc = gain[:, None] * W_enc / constant
        threshold = threshold / constant
    b_dec = sae.b_dec.detach()
    if sae.input_units is not None:
        unit, shift = sae.input_units.scale.to(dtype), sae.input_units.shift.to(dtype)
        b_enc, threshold = b_enc * unit, threshold * unit
        if not sae.cfg.apply_b_dec_to_input:
            b_enc = b_enc - shift @ W_enc
        b_dec = sae.decoder_bias().detach()
    order = sae.export_order()
    return {
        "W_enc": W_enc[:, order].to(sae.dtype).contiguous(),
        "b_enc": b_enc[order].to(sae.dtype).contiguous(),
        "W_dec": W_dec[order].to(sae.dtype).contiguous(),
        "b_dec": b_dec.clone(),
        "threshold": threshold[order].to(torch.float32).contiguous(),
    }


def jumprelu_export_obstacle(cfg: MultiScaleConfig) -> str | None:
    """Why a configuration has no JumpReLU export, in one line; None when it has one."""
    if cfg.norm_scales:
        return (
            f"norm_scales={cfg.norm_scales} divides each token by its own norm, which JumpReLU "
            "cannot express"
        )
    if cfg.skip_scale:
        return f"skip_scale={cfg.skip_scale} adds the input in forward, which JumpReLU does not"
    return None


def save_jumprelu_export(sae: MultiScaleTrainingBase, path: Path) -> None:
    """Write a checkpoint that SAELens loads without this package, with equal latents."""
    obstacle = jumprelu_export_obstacle(sae.cfg)
    if obstacle is not None:
        raise InputError(f"no jumprelu copy: {obstacle}")
    path.mkdir(parents=True, exist_ok=True)
    save_file(_folded_weights(sae), path / SAE_WEIGHTS_FILENAME)
    exported: dict[str, Any] = sae.cfg.get_inference_sae_cfg_dict()
    config = JumpReLUSAEConfig(
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        dtype=sae.cfg.dtype,
        device=sae.cfg.device,
        apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        normalize_activations=sae.cfg.normalize_activations,
        reshape_activations=sae.cfg.reshape_activations,
    ).to_dict()
    config["metadata"] = exported["metadata"]
    (path / SAE_CFG_FILENAME).write_text(json.dumps(config), encoding="utf-8")
