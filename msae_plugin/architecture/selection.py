"""[S], [Z] Which latents are active: BatchTopK at several budgets, or per-latent thresholds.

One ranking serves all sparsity scales: the pairs are sorted once, and the budget of every scale is
a prefix of the list (docs/method.md, "Sparsity scales").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from msae_plugin.architecture.ranks import ALONE, Ranks


@dataclass
class Selection:
    """Active pairs of a batch."""

    # (n_pairs,) pre-activations at the pairs, positive, without gradient; zero at padding, which is
    # never active (static_selection.py)
    values: torch.Tensor
    tokens: torch.Tensor  # (n_pairs,) token of each pair, long
    latents: torch.Tensor  # (n_pairs,) latent of each pair, long
    levels: torch.Tensor  # (n_pairs,) index of the smallest budget that includes the pair, long
    # Level of the budget k itself: pairs with `levels <= main_level` are the latents
    main_level: int
    # Smallest score among the pairs of the budget k; a zero-dimensional tensor, +inf when nothing
    # is active
    threshold: torch.Tensor
    lowest_score: torch.Tensor  # Smallest score among all pairs, likewise
    padded: bool = False  # Whether there may be padding
    _active: torch.Tensor | None = field(default=None, init=False, repr=False)

    def active(self) -> torch.Tensor:
        """(n_pairs,) bool: the pairs within the budget k, without padding."""
        if self._active is None:
            within = self.levels <= self.main_level
            self._active = within & (self.values > 0) if self.padded else within
        return self._active

    def without_padding(self, per_pair: torch.Tensor) -> torch.Tensor:
        """(n_pairs,) numbers of the pairs: zero at padding, to which no gradient passes."""
        return per_pair.masked_fill(self.values <= 0, 0) if self.padded else per_pair


def pair_budgets(
    k: float, sparsity_scales: Sequence[float], n_tokens: int, d_sae: int
) -> tuple[list[int], int]:
    """Pairs that k and every s * k allow in a batch, ascending, and which of them is k's own."""
    multiples = sorted({1.0, *sparsity_scales})
    budgets = [min(int(s * k * n_tokens), n_tokens * d_sae) for s in multiples]
    return budgets, multiples.index(1.0)


def batch_top_k(
    hidden_pre: torch.Tensor,  # (n_tokens, d_sae) pre-activations
    scores: torch.Tensor,
    k: float,
    sparsity_scales: Sequence[float],
    candidate_threshold: float = 0.0,
    ranks: Ranks = ALONE,
) -> Selection:
    """Rank the positive pre-activations of a batch and keep k and every s * k (BatchTopK).

    int(k * n_tokens) pairs are kept, as in SAELens' BatchTopK, capped at the number of entries. The
    pairs of all ranks are ranked together, and each keeps those of its own tokens. Scores are the
    pre-activations themselves unless standardised. `candidate_threshold` is a guess below the final
    one that shortens the ranking; where too few entries lie above it, all are ranked.
    """
    n_tokens, d_sae = hidden_pre.shape
    budgets, main_level = pair_budgets(k, sparsity_scales, n_tokens * ranks.count, d_sae)
    flat_pre, flat_scores = hidden_pre.flatten(), scores.flatten()
    candidates = _candidates(flat_pre, flat_scores, budgets[-1], candidate_threshold, ranks)
    candidate_scores, start = ranks.concatenated(flat_scores[candidates])
    n_kept = min(budgets[-1], candidate_scores.numel())
    top_scores, positions = torch.topk(candidate_scores, n_kept)
    order = torch.arange(n_kept, device=positions.device)
    levels = torch.bucketize(order, torch.tensor(budgets, device=positions.device), right=True)
    if ranks.count > 1:
        own = (positions >= start) & (positions < start + candidates.numel())
        positions, levels = positions[own] - start, levels[own]
    chosen = candidates[positions]
    infinity = scores.new_tensor(torch.inf)
    n_main = min(budgets[main_level], n_kept)
    return Selection(
        values=flat_pre[chosen],
        tokens=chosen // hidden_pre.shape[1],
        latents=chosen % hidden_pre.shape[1],
        levels=levels,
        main_level=main_level,
        threshold=top_scores[n_main - 1] if n_main else infinity,
        lowest_score=top_scores[-1] if n_kept else infinity,
    )


def _candidates(
    flat_pre: torch.Tensor,
    flat_scores: torch.Tensor,
    n_needed: int,
    candidate_threshold: float,
    ranks: Ranks,
) -> torch.Tensor:
    """Indices of all positive entries, or of those above the guess when they suffice."""
    positive = flat_pre > 0
    if candidate_threshold > 0:
        above = (positive & (flat_scores > candidate_threshold)).nonzero().squeeze(1)
        if _on_all(above.numel(), ranks) >= n_needed:
            return above
    candidates = positive.nonzero().squeeze(1)
    if ranks.count > 1 and candidates.numel() > n_needed:
        # No more can be among the best of all ranks: what is sent stays within the budget.
        candidates = candidates[torch.topk(flat_scores[candidates], n_needed).indices]
    return candidates


def _on_all(count: int, ranks: Ranks) -> int:
    return count if ranks.count == 1 else int(ranks.sum(torch.tensor(count)))


def above_threshold(
    hidden_pre: torch.Tensor, threshold: torch.Tensor, ranks: Ranks = ALONE
) -> Selection:
    """Keep the positive pre-activations (n_tokens, d_sae) above a threshold per latent.

    Compared in float32 whatever their dtype. The selection has a single level.
    """
    tokens, latents = ((hidden_pre > threshold) & (hidden_pre > 0)).nonzero(as_tuple=True)
    values = hidden_pre[tokens, latents]
    infinity = hidden_pre.new_tensor(torch.inf)
    lowest = ranks.smallest(values.min() if values.numel() else infinity)
    return Selection(
        values=values,
        tokens=tokens,
        latents=latents,
        levels=torch.zeros_like(tokens),
        main_level=0,
        threshold=lowest,
        lowest_score=lowest,
    )


def running_rate(rate: float, n_observations: int) -> float:
    """Weight of the next value in a running mean that starts as the plain mean of what was seen.

    A running mean that starts at zero is biased for 1/rate steps: SAELens' threshold exports five
    times the intended L0 after 500 steps. Here the rate never falls below 1 / (observations + 1).
    """
    return max(rate, 1.0 / (n_observations + 1))
