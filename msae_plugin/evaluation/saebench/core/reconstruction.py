"""The reconstruction metrics of core for many SAEs: batch outside, SAE inside.

SAEBench's `get_recons_loss` runs the model three times per batch and SAE: unchanged, with zeros,
with the SAE. Only the third depends on the SAE, and of it only the layers after the hook. The
formulas are SAEBench's; `tests/evaluation/saebench/test_core.py` compares the numbers with its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sae_lens import SAE

from msae_plugin.evaluation.outcomes import Reporter, ScoreResult, failure
from msae_plugin.evaluation.saebench.core.model_side import CoreModelSide, Predictions

HEAD_HOOKS = ("hook_q", "hook_k", "hook_v", "hook_z")


def has_heads(hook_name: str) -> bool:
    """Whether the hook gives (batch, seq, heads, d_head)."""
    return any(part in hook_name for part in HEAD_HOOKS)


def sae_input(activations: torch.Tensor, hook_name: str, head: int | None) -> torch.Tensor:
    """The SAE's input from a hook's activations, (batch, seq, d_in), as in SAEBench."""
    if head is not None:
        return activations[:, :, head]
    return activations.flatten(-2, -1) if has_heads(hook_name) else activations


def written_back(
    activations: torch.Tensor,
    reconstruction: torch.Tensor,
    keep: torch.Tensor,
    hook_name: str,
    head: int | None,
) -> torch.Tensor:
    """The hook's activations with the SAE's reconstruction in them.

    Args:
        activations: What the hook gave.
        reconstruction: (batch, seq, d_in).
        keep: (batch, seq) bool, positions where the reconstruction is written.
        hook_name: The hook.
        head: A single head, or None.
    """
    if head is not None:
        written = activations.clone()
        written[:, :, head] = torch.where(keep[..., None], reconstruction, activations[:, :, head])
        return written
    if has_heads(hook_name):
        shaped = reconstruction.reshape(activations.shape)
        return torch.where(keep[..., None, None], shaped, activations)
    return torch.where(keep[..., None], reconstruction, activations)


def not_special(tokens: torch.Tensor, ignored: set[int]) -> torch.Tensor:
    """(batch, seq) bool: tokens that are none of the ignored ones."""
    return ~torch.isin(tokens, torch.tensor(sorted(ignored), device=tokens.device))


@torch.no_grad()
def measure_reconstruction(
    side: CoreModelSide,
    saes: Mapping[str, SAE[Any]],
    ignored: set[int],
    *,
    exclude_special_tokens: bool,
    report: Reporter,
) -> tuple[dict[str, list[dict[str, torch.Tensor]]], dict[str, ScoreResult]]:
    """The results of `get_recons_loss` for every batch and SAE.

    Returns:
        By SAE a dictionary per batch, of (prompts, context) or (prompts, context - 1) tensors: the
        names of SAEBench, and `kl_..._float32`; and the SAEs that failed.
    """
    found: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in saes}
    failed: dict[str, ScoreResult] = {}
    for index in range(side.n_reconstruction):
        clean, ce_clean, zeros = side.clean(index)
        activations = side.activations(index)
        tokens = side.batch(index)
        keep = (
            not_special(tokens, ignored)
            if exclude_special_tokens
            else torch.ones_like(tokens, dtype=torch.bool)
        )
        for name, sae in saes.items():
            if name in failed:
                continue
            report("core: reconstruction", index * len(saes), side.n_reconstruction * len(saes))
            try:
                values = _reconstructed(sae, activations, keep, side.hook_name)
                predictions = side.predictions_with(index, clean, values)
            # Whatever one SAE raises is its own outcome: the others go on.
            except Exception as error:  # noqa: BLE001
                failed[name] = failure(error)
                del found[name]
                continue
            found[name].append(_metrics(ce_clean, zeros, predictions))
    return found, failed


def _reconstructed(
    sae: SAE[Any], activations: torch.Tensor, keep: torch.Tensor, hook_name: str
) -> torch.Tensor:
    head: int | None = sae.cfg.metadata.hook_head_index
    read = sae_input(activations, hook_name, head).to(sae.device)
    reconstruction = sae.decode(sae.encode(read)).to(activations)
    return written_back(activations, reconstruction, keep, hook_name, head)


def _metrics(
    ce_clean: torch.Tensor, zeros: Predictions, with_sae: Predictions
) -> dict[str, torch.Tensor]:
    return {
        "kl_div_with_sae": with_sae.kl,
        "kl_div_with_ablation": zeros.kl,
        "ce_loss_with_sae": with_sae.ce,
        "ce_loss_without_sae": ce_clean,
        "ce_loss_with_ablation": zeros.ce,
        "kl_div_with_sae_float32": with_sae.kl_float32,
        "kl_div_with_ablation_float32": zeros.kl_float32,
    }


def masked_mean(
    per_batch: Sequence[torch.Tensor], tokens: Sequence[torch.Tensor], ignored: set[int]
) -> float:
    """Mean over the positions whose token is not special, of all batches together.

    Args:
        per_batch: (prompts, context) per batch.
        tokens: The tokens, of the same shape.
        ignored: Special tokens.
    """
    kept = [
        values.double()[not_special(batch, ignored)]
        for values, batch in zip(per_batch, tokens, strict=True)
    ]
    return float(torch.cat(kept).mean())
