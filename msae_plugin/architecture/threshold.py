"""The cut of the exported SAE: followed during training, calibrated at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from msae_plugin.architecture.selection import batch_top_k

# Scores kept per batch at first, as a multiple of k: room for batches denser than the average.
_KEPT_MULTIPLE = 2.0


@torch.no_grad()
def calibrated_cut(
    batches: Sequence[torch.Tensor],
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
        The cut, halfway between the last score kept and the first one dropped; low enough to admit
        all when no more than k latents per token are positive; None when there was no batch.
    """
    if not batches:
        return None
    multiple = _KEPT_MULTIPLE
    while True:
        kept: list[torch.Tensor] = []
        # Scores below the last one kept of a batch that had more are not known.
        known_down_to = float("-inf")
        n_tokens = 0
        for batch in batches:
            hidden_pre = hidden_pre_of(batch)
            scores = scores_of(hidden_pre)
            chosen = batch_top_k(hidden_pre, scores, multiple * k, [])
            kept.append(scores[chosen.tokens, chosen.latents].float())
            if kept[-1].numel() < int((hidden_pre > 0).sum()):
                known_down_to = max(known_down_to, float(chosen.lowest_score))
            n_tokens += hidden_pre.shape[0]
        cut = _cut_among(torch.cat(kept), round(k * n_tokens))
        if not cut < known_down_to:
            return cut
        multiple *= 2


def _cut_among(scores: torch.Tensor, n_wanted: int) -> float:
    scores = torch.sort(scores, descending=True).values
    if scores.numel() == 0:
        return 0.0
    if scores.numel() <= n_wanted:
        # Scores that are not standardised are positive; others are admitted down to the last.
        below = torch.nextafter(scores[-1], scores.new_tensor(-torch.inf))
        return min(0.0, float(below))
    return float((scores[n_wanted - 1] + scores[n_wanted]) / 2) if n_wanted else float("inf")
