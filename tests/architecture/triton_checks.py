"""Checks of the Triton kernels that need a process of their own; see test_triton_decoding.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import rounding_tolerance

# The module needs torch and Triton only: loaded by itself, without SAELens, it is there in seconds.
_FILE = Path(__file__).parents[2] / "msae_plugin/architecture/kernels/triton_decoding.py"
_SPEC = importlib.util.spec_from_file_location("triton_decoding", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
triton_decoding = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(triton_decoding)
triton_bag_sum = triton_decoding.triton_bag_sum


def dense(
    rows: torch.Tensor, row_index: torch.Tensor, weights: torch.Tensor, bags: torch.Tensor, n: int
) -> torch.Tensor:
    matrix = torch.zeros(n, rows.shape[0], dtype=torch.float64)
    return matrix.index_put((bags, row_index), weights, accumulate=True) @ rows


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    sizes = st.integers(1, 5)
    # Widths around a block of columns, and lists that are empty.
    width = draw(st.sampled_from([1, 5, 512, 513]))
    return draw(sizes), draw(sizes), width, draw(st.integers(0, 12)), draw(st.integers(0, 99))


class TestInterpreted:
    @staticmethod
    @settings(max_examples=12, deadline=None, database=None, derandomize=True)
    @given(problems())
    def test_forward_and_gradients(problem: tuple[int, int, int, int, int]) -> None:
        n_rows, n_bags, width, n_pairs, seed = problem
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(n_rows, width, generator=generator)
        weights = torch.randn(n_pairs, generator=generator)
        row_index = torch.randint(n_rows, (n_pairs,), generator=generator)
        bags = torch.randint(n_bags, (n_pairs,), generator=generator)
        upstream = torch.randn(n_bags, width, generator=generator)

        def sums(*numbers: torch.Tensor) -> list[torch.Tensor]:
            """The bags and both gradients, in float64."""
            own_rows, own_weights, own_upstream = (n.double() for n in numbers)
            own_rows.requires_grad_()
            own_weights.requires_grad_()
            bag_sums = dense(own_rows, row_index, own_weights, bags, n_bags)
            inputs = (own_rows, own_weights)
            return [bag_sums, *torch.autograd.grad(bag_sums, inputs, own_upstream)]

        exact = sums(rows, weights, upstream)
        bounds = sums(rows.abs(), weights.abs(), upstream.abs())
        rows.requires_grad_()
        weights.requires_grad_()
        result = triton_bag_sum(rows, row_index, weights, bags, n_bags)
        result.backward(upstream)

        lengths = (n_pairs, n_pairs, width)
        found = (result, rows.grad, weights.grad)
        for got, wanted, bound, n_terms in zip(found, exact, bounds, lengths, strict=True):
            assert got is not None
            assert got.dtype == torch.float32
            atol = rounding_tolerance(n_terms, bound)
            torch.testing.assert_close(got.double(), wanted, atol=atol, rtol=0)

    @staticmethod
    def test_not_contiguous_and_half_precision_rows() -> None:
        rows = torch.randn(6, 4).T.bfloat16()
        index = torch.tensor([3, 0, 3])
        weights, bags = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1, 1, 0])
        result = triton_bag_sum(rows, index, weights, bags, 2)
        expected = dense(rows.double(), index, weights.double(), bags, 2)
        bound = dense(rows.double().abs(), index, weights.double().abs(), bags, 2)
        atol = rounding_tolerance(2, bound)
        torch.testing.assert_close(result.double(), expected, atol=atol, rtol=0)

    @staticmethod
    def test_inside_torch_compile() -> None:
        index, bags = torch.tensor([3, 0, 3]), torch.tensor([1, 1, 0])
        rows, weights = torch.randn(4, 6).requires_grad_(), torch.randn(3).requires_grad_()

        def loss() -> torch.Tensor:
            return triton_bag_sum(rows, index, weights, bags, 2).square().sum()

        expected = torch.autograd.grad(loss(), (rows, weights))
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for found, exact in zip(
            torch.autograd.grad(compiled(), (rows, weights)), expected, strict=True
        ):
            torch.testing.assert_close(found, exact)


class TestCompiled:
    @staticmethod
    def test_machine_code_for_compute_capability_9() -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kernels = (
            (triton_decoding._bag_sum_kernel, "rows row_index weights offsets sums"),
            (triton_decoding._pair_dot_kernel, "left left_index right right_index dots"),
        )
        for kernel, pointers in kernels:
            signature = {
                name: "*i64" if name.endswith(("index", "offsets")) else "*fp32"
                for name in pointers.split()
            }
            source = ASTSource(
                fn=kernel,
                signature={**signature, "width": "i32", "BLOCK": "constexpr"},
                constexprs={"BLOCK": triton_decoding._BLOCK},
            )
            code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
            assert len(code["cubin"]) > 1000
