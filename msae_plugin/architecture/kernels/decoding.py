"""Linear maps over active latents only.

An SAE step is dominated by dense products in which all but k of d_sae columns are zero. Here the
active (token, latent) pairs are listed once and every product runs over the list. Measured on one
CPU core at 2048 tokens, d_in 576, d_sae 4608, k 32: decoding forward and backward takes 41 ms
against 524 ms dense, to the same result within float32 rounding.

The sums over the list are torch's `embedding_bag` or, on CUDA, the kernels of `triton_decoding.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.autograd.function import FunctionCtx
from torch.nn.functional import embedding_bag

from msae_plugin.common.errors import InputError

DecodeKernel = Literal["auto", "embedding_bag", "triton"]


@dataclass(frozen=True)
class MachineSettings:
    """How a step is computed on a CUDA device; no result depends on it but by float32 rounding.

    Args:
        decode_kernel: What sums decoder rows over the active latents, and their gradients: torch's
            own kernel, or ours in Triton. "auto" takes what was measured to be faster at this d_in,
            ours where steps are recorded. docs/performance.md.
        cuda_graphs: Record a step once and replay it, instead of starting its operations one by
            one each time. What a step returns beside its loss is overwritten by the next one. Steps
            that cannot be recorded run as they are. docs/performance.md.
    """

    decode_kernel: DecodeKernel = "auto"
    cuda_graphs: bool = True


# Measured on an H100 (docs/performance.md): a step that is not recorded takes .84 of the time with
# the kernels at d_in 2304 and 1.07 at 576, where starting them is what takes time.
_TRITON_FROM_WIDTH = 1024

_TRITON_IS_THERE = find_spec("triton") is not None


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    # embedding_bag has no bf16 gradient for its weights, and sums of many bf16 terms are coarse.
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def bag_sum(
    rows: torch.Tensor,  # (n_rows, width) vectors that are summed
    row_index: torch.Tensor,  # (n_pairs,) row of each pair
    weights: torch.Tensor,  # (n_pairs,) weight of each pair
    bag_index: torch.Tensor,  # (n_pairs,) bag of each pair, in [0, n_bags), in any order
    n_bags: int,
    kernel: DecodeKernel = "auto",
) -> torch.Tensor:
    """(n_bags, width) weighted sums of rows, in at least float32 and differentiable.

    Pairs are in any order; empty bags give zeros. `kernel` computes the sums and their gradients;
    `auto` takes ours on CUDA devices where rows are long.
    """
    rows, weights = _at_least_float32(rows), _at_least_float32(weights)
    dtype = torch.promote_types(rows.dtype, weights.dtype)
    rows, weights = rows.to(dtype), weights.to(dtype)
    if kernel == "triton" or (kernel == "auto" and _triton_pays(rows)):
        return _triton_bag_sum(rows, row_index, weights, bag_index, n_bags)
    if row_index.numel() == 0:
        # embedding_bag refuses an empty list; the products keep the graph connected.
        return rows.new_zeros(n_bags, rows.shape[1]) + 0 * rows.sum() + 0 * weights.sum()
    # Sorting takes 6 ms in 32 bits and 10 in 64 (131,072 pairs, one CPU core).
    keys = bag_index.int() if n_bags < 2**31 else bag_index
    sorted_bags, order = torch.sort(keys, stable=True)
    offsets = torch.searchsorted(
        sorted_bags, torch.arange(n_bags, device=sorted_bags.device, dtype=sorted_bags.dtype)
    )
    with torch.autocast(rows.device.type, enabled=False):
        return embedding_bag(
            row_index[order], rows, offsets, mode="sum", per_sample_weights=weights[order]
        )


def triton_runs_on(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels take a tensor of this device and dtype here."""
    return _TRITON_IS_THERE and tensor.device.type == "cuda" and tensor.dtype != torch.float64


def _triton_pays(rows: torch.Tensor) -> bool:
    return triton_runs_on(rows) and rows.shape[1] >= _TRITON_FROM_WIDTH


def _triton_bag_sum(
    rows: torch.Tensor,
    row_index: torch.Tensor,
    weights: torch.Tensor,
    bag_index: torch.Tensor,
    n_bags: int,
) -> torch.Tensor:
    if rows.device.type != "cuda" or rows.dtype != torch.float32:
        raise InputError(
            "decode_kernel='triton' needs float32 (or smaller) weights on a CUDA device; got "
            f"{rows.dtype} on {rows.device}: use decode_kernel='embedding_bag'"
        )
    try:
        # Triton comes with torch's CUDA builds only.
        from msae_plugin.architecture.kernels.triton_decoding import triton_bag_sum
    except ImportError as error:
        raise InputError(
            "decode_kernel='triton' needs the package triton, which is not installed: "
            "use decode_kernel='embedding_bag'"
        ) from error
    return triton_bag_sum(rows, row_index, weights, bag_index, n_bags)


class _ActivePreActivations(torch.autograd.Function):
    """Values of (x_hat @ W_enc + b_enc) at chosen pairs, with gradients over these pairs only."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        x_hat: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        values: torch.Tensor,
        tokens: torch.Tensor,
        latents: torch.Tensor,
        centre: torch.Tensor | None,
        kernel: DecodeKernel,
    ) -> torch.Tensor:
        del centre
        ctx.save_for_backward(x_hat, W_enc, b_enc, tokens, latents)
        ctx.kernel = kernel  # pyright: ignore[reportAttributeAccessIssue]
        return values.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_values: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x_hat, W_enc, b_enc, tokens, latents = ctx.saved_tensors
        grad_x = grad_W = grad_b = grad_centre = None
        if ctx.needs_input_grad[0]:
            columns = W_enc.T.contiguous()
            grad_x = bag_sum(columns, latents, grad_values, tokens, x_hat.shape[0], ctx.kernel)
            grad_x = grad_x.to(x_hat.dtype)
        if ctx.needs_input_grad[1]:
            n_latents = W_enc.shape[1]
            grad_columns = bag_sum(x_hat, tokens, grad_values, latents, n_latents, ctx.kernel)
            grad_W = grad_columns.T.to(W_enc.dtype).contiguous()
        sums = torch.zeros_like(b_enc, dtype=grad_values.dtype).index_add_(0, latents, grad_values)
        if ctx.needs_input_grad[2]:
            grad_b = sums.to(b_enc.dtype)
        if ctx.needs_input_grad[6]:
            grad_centre = -(W_enc @ sums.to(W_enc.dtype))
        return grad_x, grad_W, grad_b, None, None, None, grad_centre, None


def active_preactivations(
    x_hat: torch.Tensor,  # (n_tokens, d_in) encoder input
    W_enc: torch.Tensor,  # (d_in, d_sae) encoder
    b_enc: torch.Tensor,  # (d_sae,) encoder bias
    values: torch.Tensor,
    tokens: torch.Tensor,  # (n_pairs,) token of each pair
    latents: torch.Tensor,  # (n_pairs,) latent of each pair
    kernel: DecodeKernel = "auto",
    centre: torch.Tensor | None = None,
) -> torch.Tensor:
    """(n_pairs,) entries of `x_hat @ W_enc + b_enc`, already computed, with their gradient.

    A centre (d_in,) is what was subtracted from constant inputs to give x_hat. Its gradient is one
    product with W_enc; through x_hat, which then has none, it would be a sum over all pairs.
    """
    if centre is not None:
        x_hat = x_hat.detach()
    result = _ActivePreActivations.apply(
        x_hat, W_enc, b_enc, values, tokens, latents, centre, kernel
    )
    assert isinstance(result, torch.Tensor)
    return result


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, tensor: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad_output * factor, None


def scale_gradient(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, whose gradient will be multiplied by a factor that broadcasts to it."""
    result = _ScaleGradient.apply(tensor, factor)
    assert isinstance(result, torch.Tensor)
    return result
