"""Triton kernels for `decoding.bag_sum` and its gradients, on CUDA devices.

Two kernels do all of it: a weighted sum of rows per bag, and one dot product per pair. The gradient
with respect to the rows is the first kernel again with rows and bags exchanged, the gradient with
respect to the weights is the second. Nothing is atomic, so that results are the same every time.
Sums are accumulated in float32 in the order of the list, as in the fallback.

Import this module only where Triton is installed (`decoding` does, once it sees a CUDA tensor).
"""

# Kernels are not Python functions: their parameters are pointers and have no type in Python.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportArgumentType=false
# No postponed annotations here: torch.library reads them to learn the schema.
from typing import Any

import torch
import triton
import triton.language as tl

# Columns per program: 16 bytes for each thread of 4 warps in float32.
_BLOCK = 512


@triton.jit
def _bag_sum_kernel(rows, row_index, weights, offsets, sums, width, BLOCK: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for pair in range(tl.load(offsets + bag), tl.load(offsets + bag + 1)):
        row = tl.load(row_index + pair).to(tl.int64)
        weight = tl.load(weights + pair).to(tl.float32)
        values = tl.load(rows + row * width + columns, mask=inside, other=0.0)
        total += weight * values.to(tl.float32)
    tl.store(sums + bag * width + columns, total, mask=inside)


@triton.jit
def _pair_dot_kernel(left, left_index, right, right_index, dots, width, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    left_row = left + tl.load(left_index + pair).to(tl.int64) * width
    right_row = right + tl.load(right_index + pair).to(tl.int64) * width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        a = tl.load(left_row + columns, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(right_row + columns, mask=inside, other=0.0).to(tl.float32)
        total += a * b
    tl.store(dots + pair, tl.sum(total, axis=0))


# Opaque to torch.compile: the graph holds one node, and no version of Inductor has to understand
# the kernels.
@torch.library.custom_op("msae_plugin::triton_bag_sum", mutates_args=())
def triton_bag_sum(
    rows: torch.Tensor,
    row_index: torch.Tensor,
    weights: torch.Tensor,
    bag_index: torch.Tensor,
    n_bags: int,
) -> torch.Tensor:
    """`decoding.bag_sum` of float32 or smaller rows by Triton kernels; sums are float32."""
    rows = rows.contiguous()
    width = rows.shape[1]
    sums = torch.empty(n_bags, width, dtype=torch.float32, device=rows.device)
    if sums.numel() == 0:
        return sums
    keys = bag_index.int() if n_bags < 2**31 else bag_index  # half the passes of a radix sort
    sorted_bags, order = torch.sort(keys, stable=True)
    bounds = torch.arange(n_bags + 1, device=keys.device, dtype=keys.dtype)
    offsets = torch.searchsorted(sorted_bags, bounds)
    grid = (n_bags, triton.cdiv(width, _BLOCK))
    _bag_sum_kernel[grid](
        rows, row_index[order], weights[order], offsets, sums, width, BLOCK=_BLOCK
    )
    return sums


@triton_bag_sum.register_fake
def _bag_sum_shape(
    rows: torch.Tensor,
    row_index: torch.Tensor,
    weights: torch.Tensor,
    bag_index: torch.Tensor,
    n_bags: int,
) -> torch.Tensor:
    del row_index, weights, bag_index
    return rows.new_empty(n_bags, rows.shape[1], dtype=torch.float32)


@torch.library.custom_op("msae_plugin::triton_pair_dots", mutates_args=())
def _pair_dots_op(
    left: torch.Tensor, left_index: torch.Tensor, right: torch.Tensor, right_index: torch.Tensor
) -> torch.Tensor:
    dots = torch.zeros(left_index.shape[0], dtype=torch.float32, device=left.device)
    if dots.numel():
        _pair_dot_kernel[(dots.numel(),)](
            left.contiguous(), left_index.contiguous(), right.contiguous(),
            right_index.contiguous(), dots, left.shape[1], BLOCK=_BLOCK,
        )  # fmt: skip
    return dots


@_pair_dots_op.register_fake
def _pair_dots_shape(
    left: torch.Tensor, left_index: torch.Tensor, right: torch.Tensor, right_index: torch.Tensor
) -> torch.Tensor:
    del right, right_index
    return left.new_empty(left_index.shape[0], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    rows, row_index, weights, bag_index, _ = inputs
    ctx.save_for_backward(rows, row_index, weights, bag_index)


def _gradients(ctx: Any, grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, row_index, weights, bag_index = ctx.saved_tensors
    grad_rows = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_rows = triton_bag_sum(grad_sums, bag_index, weights, row_index, rows.shape[0])
        grad_rows = grad_rows.to(rows.dtype)
    if ctx.needs_input_grad[2]:
        grad_weights = _pair_dots_op(rows, row_index, grad_sums, bag_index).to(weights.dtype)
    return grad_rows, None, grad_weights, None, None


torch.library.register_autograd("msae_plugin::triton_bag_sum", _gradients, setup_context=_keep)
