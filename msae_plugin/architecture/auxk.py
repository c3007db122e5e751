"""AuxK: dead latents reconstruct what the live ones miss (Gao et al. 2024, appendix A.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shortest padded list of dead latents; the others are twice, four times as long, and so on.
_SHORTEST_LIST = 64


@dataclass(frozen=True)
class DeadLatents:
    """The latents that AuxK trains.

    Attributes:
        mask: (d_sae,) bool, which latents are dead.
        latents: (n_listed,) their indices, long, and padding behind them.
        count: How many there are, where the list is padded: a zero-dimensional tensor. None
            where the list is as long as they are many.
    """

    mask: torch.Tensor
    latents: torch.Tensor
    count: torch.Tensor | None = None

    @classmethod
    def listed(cls, mask: torch.Tensor) -> DeadLatents | None:
        """A list as long as there are dead latents, or None when there are none."""
        latents = mask.nonzero().squeeze(1)
        return cls(mask, latents) if latents.numel() else None

    def padded(self) -> tuple[torch.Tensor, int]:
        """The list in one of few lengths, and the number of dead latents in it."""
        n_dead, length = self.latents.numel(), _SHORTEST_LIST
        while length < n_dead:
            length *= 2
        padded = self.latents.new_zeros(min(length, self.mask.numel()))
        padded[:n_dead] = self.latents
        return padded, n_dead


def auxk_loss(
    x_hat: torch.Tensor,
    token_scale: torch.Tensor | None,
    residual: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    dead: DeadLatents,
    token_weight: torch.Tensor | None,
    decoder_norm: torch.Tensor | None,
) -> torch.Tensor:
    """Squared error of the k_aux = d_in // 2 strongest dead latents on the residual.

    Only the dead columns of the encoder are computed, so that the cost is proportional to the
    number of dead latents. The scale of the loss falls with that number, as in SAELens.

    Args:
        x_hat: (n_tokens, d_in) encoder input.
        token_scale: (n_tokens, 1) factor that undoes the normalisation, or None.
        residual: (n_tokens, d_in) input minus reconstruction; treated as a constant.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        W_dec: (d_sae, d_in).
        dead: The dead latents, in a list that is not empty.
        token_weight: (n_tokens,) weight of each token's error, or None.
        decoder_norm: (d_sae,) norms by which pre-activations are ranked, or None. The norms cancel
            in the reconstruction and decide only which latents are strongest.

    Returns:
        Zero-dimensional loss, in the units of the squared error per token.
    """
    latents = dead.latents
    most = max(x_hat.shape[1] // 2, 1)
    k_aux = min(most, latents.numel())
    hidden_pre = x_hat @ W_enc[:, latents] + b_enc[latents]
    scores = hidden_pre if decoder_norm is None else hidden_pre * decoder_norm[latents]
    padding = None
    if dead.count is not None:
        padding = torch.arange(latents.numel(), device=latents.device) >= dead.count
        scores = scores.masked_fill(padding, -torch.inf)
    top = scores.topk(k_aux, dim=-1, sorted=False).indices
    acts = torch.zeros_like(hidden_pre).scatter(-1, top, hidden_pre.gather(-1, top))
    if padding is not None:
        acts = acts.masked_fill(padding, 0)
    if token_scale is not None:
        acts = acts * token_scale
    error = _mean_error(acts @ W_dec[latents], residual.detach(), token_weight)
    if dead.count is not None:
        return (dead.count / most).clamp(max=1.0).to(error.dtype) * error
    return min(latents.numel() / most, 1.0) * error


def _mean_error(
    decoded: torch.Tensor, residual: torch.Tensor, token_weight: torch.Tensor | None
) -> torch.Tensor:
    errors = (decoded - residual).pow(2).sum(dim=-1)
    if token_weight is not None:
        errors = errors * token_weight
    return errors.mean()
