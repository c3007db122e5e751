"""Cross-entropy and KL divergence over a large vocabulary in bounded memory."""

from __future__ import annotations

import torch

# A block of log-probabilities holds at most this many float32 values: 64 MiB.
BLOCK_ELEMENTS = 2**24


def predicting_positions(kept: torch.Tensor) -> torch.Tensor:
    """Flat indices of the kept positions that predict a next token.

    Args:
        kept: (batch, seq) bool.

    Returns:
        (n,) long indices into (batch * seq); the last position of a window predicts nothing.
    """
    predicting = kept.clone()
    predicting[:, -1] = False
    return predicting.flatten().nonzero().squeeze(1)


@torch.no_grad()
def summed_losses(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    reference_logits: torch.Tensor | None = None,
) -> tuple[float, float]:
    """Sums over positions of the next-token cross-entropy and of KL(reference || logits), in nats.

    Both are computed from float32 log-probabilities whatever the dtype of the logits (a softmax in
    bfloat16 gives infinities in the KL), a block of positions at a time, and summed in float64.

    Args:
        logits: (batch, seq, vocabulary).
        tokens: (batch, seq) long.
        positions: (n,) flat positions from `predicting_positions`.
        reference_logits: (batch, seq, vocabulary) of the unchanged model; None for no KL.

    Returns:
        (cross-entropy sum, KL sum); the KL sum is 0 without a reference.
    """
    vocabulary = logits.shape[-1]
    flat = logits.reshape(-1, vocabulary)
    reference = None if reference_logits is None else reference_logits.reshape(-1, vocabulary)
    flat_tokens = tokens.flatten().to(logits.device)
    cross_entropy = kl = 0.0
    for block in positions.to(logits.device).split(max(1, BLOCK_ELEMENTS // vocabulary)):
        log_probs = flat[block].float().log_softmax(-1)
        targets = flat_tokens[block + 1]
        cross_entropy -= log_probs.gather(1, targets[:, None]).double().sum().item()
        if reference is not None:
            reference_log_probs = reference[block].float().log_softmax(-1)
            per_token = (reference_log_probs.exp() * (reference_log_probs - log_probs)).sum(-1)
            kl += per_token.double().sum().item()
    return cross_entropy, kl
