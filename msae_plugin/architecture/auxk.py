"""AuxK: dead latents reconstruct what the live ones miss (Gao et al. 2024, appendix A.2)."""

from __future__ import annotations

import torch

from msae_plugin.architecture.step_schedule import DeadLatents, EncoderInput


def auxk_loss(
    given: EncoderInput,
    residual: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    dead: DeadLatents,
) -> torch.Tensor:
    """Squared error of the k_aux = d_in // 2 strongest dead latents on the residual.

    Only the dead columns of the encoder are computed, so that the cost is proportional to the
    number of dead latents, of which there is at least one. The scale of the loss falls with that
    number, as in SAELens. The residual (n_tokens, d_in), input minus reconstruction, is a constant.
    """
    latents = dead.latents
    most = max(given.x_hat.shape[1] // 2, 1)
    k_aux = min(most, latents.numel())
    hidden_pre = given.x_hat @ W_enc[:, latents] + b_enc[latents]
    norm = given.decoder_norm
    scores = hidden_pre if norm is None else hidden_pre * norm.detach()[latents]
    padding = None
    if dead.count is not None:
        padding = torch.arange(latents.numel(), device=latents.device) >= dead.count
        scores = scores.masked_fill(padding, -torch.inf)
    top = scores.topk(k_aux, dim=-1, sorted=False).indices
    acts = torch.zeros_like(hidden_pre).scatter(-1, top, hidden_pre.gather(-1, top))
    if padding is not None:
        acts = acts.masked_fill(padding, 0)
    if given.token_scale is not None:
        acts = acts * given.token_scale
    error = (acts @ W_dec[latents] - residual.detach()).pow(2).sum(dim=-1).mean()
    if dead.count is not None:
        return (dead.count / most).clamp(max=1.0).to(error.dtype) * error
    return min(latents.numel() / most, 1.0) * error
