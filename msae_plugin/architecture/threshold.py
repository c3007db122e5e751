"""The cut of the exported SAE: followed during training, calibrated at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from msae_plugin.architecture.selection import batch_top_k

# Scores kept per batch, as a multiple of k: room for batches that are denser than the average.
_KEPT_MULTIPLE = 2.0


@torch.no_grad()
def calibrated_cut(
    batches: Iterable[torch.Tensor],
    hidden_pre_of: Callable[[torch.Tensor], torch.Tensor],
    scores_of: Callable[[torch.Tensor], torch.Tensor],
    k: float,
) -> float | None:
    """Score above which exactly k latents per token are active on average.

    Args:
        batches: Activation batches, each (n_tokens, d_in).
        hidden_pre_of: Maps a batch to its pre-activations (n_tokens, d_sae).
        scores_of: Maps pre-activations to the scores that are compared with the cut.
        k: Mean number of active latents wanted.

    Returns:
        The cut, halfway between the last score kept and the first one dropped; zero when no more
        than k latents per token are positive; None when there was no batch.
    """
    kept: list[torch.Tensor] = []
    n_tokens = 0
    for batch in batches:
        hidden_pre = hidden_pre_of(batch)
        scores = scores_of(hidden_pre)
        chosen = batch_top_k(hidden_pre, scores, _KEPT_MULTIPLE * k, [])
        kept.append(scores[chosen.tokens, chosen.latents].float())
        n_tokens += hidden_pre.shape[0]
    if not kept:
        return None
    scores = torch.sort(torch.cat(kept), descending=True).values
    n_wanted = round(k * n_tokens)
    if scores.numel() <= n_wanted:
        return 0.0
    return float((scores[n_wanted - 1] + scores[n_wanted]) / 2) if n_wanted else float("inf")
