"""[O] OrtSAE's penalty (arXiv 2509.22033): the largest cosine of each latent within its chunk.

    penalty = mean over chunks of mean_i max_j cos(d_i, d_j)^2

With c_i the cosine to the nearest latent j(i), n the norms and s the share of a latent in the mean,
the gradient with respect to row i is a weighted sum of few decoder rows:

    a_i d_j(i) / (n_i n_j) + sum over i' with j(i') = i of a_i' d_i' / (n_i n_i') - b_i d_i / n_i^2
    a_i = 2 s c_i,   b_i = a_i c_i + sum over these i' of a_i' c_i'

Hence one `bag_sum` over three pairs per latent, made when the gradient is asked for. Written out
over directions and norms it was twelve passes over the decoder and a fifth of a bf16 step on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from msae_plugin.architecture.kernels.decoding import DecodeKernel, bag_sum

# Numbers per block of cosines on a GPU: 16 MiB of float32.
_BLOCK_SIZE = 2**22


def chunks_together(
    chunks: Sequence[torch.Tensor], device: torch.device
) -> list[list[torch.Tensor]]:
    """Chunks that are handled together: of equal size, one at a time on a CPU.

    A CPU keeps one chunk in its cache; a GPU would spend the time on starting kernels.

    Args:
        chunks: Index tensors, each (n_in_chunk,).
        device: Where the decoder is.

    Returns:
        The chunks in groups, in their order.
    """
    groups: list[list[torch.Tensor]] = []
    for chunk in chunks:
        size = chunk.numel()
        room = 1 if device.type == "cpu" else max(1, _BLOCK_SIZE // max(1, size * size))
        if groups and groups[-1][0].numel() == size and len(groups[-1]) < room:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


class _NearestInChunks(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        W_dec: torch.Tensor,
        cosine: torch.Tensor,
        nearest: torch.Tensor,
        share: torch.Tensor,
        norms: torch.Tensor,
        kernel: DecodeKernel,
    ) -> torch.Tensor:
        ctx.save_for_backward(W_dec, cosine, nearest, share, norms)
        ctx.kernel = kernel  # pyright: ignore[reportAttributeAccessIssue]
        return (share * cosine.square()).sum().to(W_dec.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        W_dec, cosine, nearest, share, norms = ctx.saved_tensors
        slope = 2 * grad_output.to(cosine.dtype) * share * cosine
        along = slope * cosine
        # Not `along.index_add(0, nearest, along)`: Inductor adds in place while it still reads.
        along = along + torch.zeros_like(along).index_add(0, nearest, along)
        across = slope / (norms * norms[nearest])
        own = torch.arange(nearest.numel(), device=nearest.device)
        gradient = bag_sum(
            W_dec,
            torch.cat([nearest, own, own]),
            torch.cat([across, across, -along / norms.square()]),
            torch.cat([own, nearest, own]),
            own.numel(),
            ctx.kernel,
        )
        return gradient.to(W_dec.dtype), None, None, None, None, None


def nearest_in_chunks_penalty(
    W_dec: torch.Tensor, chunks: Sequence[torch.Tensor], kernel: DecodeKernel = "auto"
) -> torch.Tensor:
    """OrtSAE's penalty.

    Args:
        W_dec: (d_sae, d_in) decoder.
        chunks: A partition of the latents, each (n_in_chunk,). A chunk of one latent has no pair
            and adds nothing.
        kernel: As in `decoding.bag_sum`.

    Returns:
        Zero-dimensional, differentiable in W_dec. Zero rows have no direction: cosine 0.
    """
    with torch.no_grad(), torch.autocast(W_dec.device.type, enabled=False):
        rows = W_dec if W_dec.dtype == torch.float64 else W_dec.float()
        norms = rows.norm(dim=-1).clamp(min=1e-8)
        cosine, share = torch.zeros_like(norms), torch.zeros_like(norms)
        nearest = torch.arange(norms.numel(), device=norms.device)
        for group in chunks_together(chunks, W_dec.device):
            members = torch.stack(group)  # (n_together, n_in_chunk)
            if members.shape[1] == 1:
                continue
            own_rows, own_norms = rows[members], norms[members]
            cosines = own_rows @ own_rows.mT
            cosines /= own_norms[..., None]
            cosines /= own_norms[:, None]
            cosines.diagonal(dim1=-2, dim2=-1).fill_(-2)
            largest, at = cosines.max(dim=-1)
            cosine[members] = largest
            nearest[members] = members.gather(1, at)
            # Not `share[members] = number`: that copies the number to the device at each step.
            share.index_fill_(0, members.flatten(), 1 / (len(chunks) * members.shape[1]))
    result = _NearestInChunks.apply(W_dec, cosine, nearest, share, norms, kernel)
    assert isinstance(result, torch.Tensor)
    return result
