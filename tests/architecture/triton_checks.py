"""Checks of the Triton kernels that need a process of their own; see test_triton_decoding.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# The module needs torch and Triton only: loaded by itself, without SAELens, it is there in seconds.
_FILE = Path(__file__).parents[2] / "msae_plugin/architecture/triton_decoding.py"
_SPEC = importlib.util.spec_from_file_location("triton_decoding", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
triton_decoding = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(triton_decoding)
triton_bag_sum = triton_decoding.triton_bag_sum

# Sums of at most 12 products of numbers of order one, in float32.
TOLERANCE = 1e-5


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
    @settings(max_examples=12, deadline=None, database=None)
    @given(problems())
    def test_forward_and_gradients(problem: tuple[int, int, int, int, int]) -> None:
        n_rows, n_bags, width, n_pairs, seed = problem
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(n_rows, width, generator=generator)
        weights = torch.randn(n_pairs, generator=generator)
        row_index = torch.randint(n_rows, (n_pairs,), generator=generator)
        bags = torch.randint(n_bags, (n_pairs,), generator=generator)
        upstream = torch.randn(n_bags, width, generator=generator)

        exact_rows, exact_weights = (
            rows.double().requires_grad_(),
            weights.double().requires_grad_(),
        )
        expected = dense(exact_rows, row_index, exact_weights, bags, n_bags)
        expected.backward(upstream.double())
        rows.requires_grad_()
        weights.requires_grad_()
        result = triton_bag_sum(rows, row_index, weights, bags, n_bags)
        result.backward(upstream)

        def compare(found: torch.Tensor | None, exact: torch.Tensor | None) -> None:
            assert found is not None
            assert exact is not None
            assert found.dtype == torch.float32
            # Dot products are sums over the width, up to 513.
            torch.testing.assert_close(
                found.double(), exact, atol=TOLERANCE * max(1, width / 12) ** 0.5, rtol=TOLERANCE
            )

        compare(result, expected)
        compare(rows.grad, exact_rows.grad)
        compare(weights.grad, exact_weights.grad)

    @staticmethod
    def test_not_contiguous_and_half_precision_rows() -> None:
        rows = torch.randn(6, 4).T.bfloat16()
        index = torch.tensor([3, 0, 3])
        weights, bags = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1, 1, 0])
        result = triton_bag_sum(rows, index, weights, bags, 2)
        expected = dense(rows.double(), index, weights.double(), bags, 2)
        torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)

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
