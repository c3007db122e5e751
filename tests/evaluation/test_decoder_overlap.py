from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import rounding_tolerance

from msae_plugin.evaluation import heldout
from msae_plugin.evaluation.heldout import mean_max_decoder_cosine


def naive(W_dec: torch.Tensor) -> float:
    rows = W_dec.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-2)
    return cosines.max(dim=1).values.mean().item()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(d_sae=st.integers(2, 60), d_in=st.integers(1, 12), block=st.integers(1, 400))
def test_blocks_give_what_the_whole_matrix_gives(d_sae, d_in, block):
    generator = torch.Generator().manual_seed(d_sae * 100 + d_in)
    W_dec = torch.randn(d_sae, d_in, generator=generator) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heldout, "OVERLAP_BLOCK_ELEMENTS", block)
        # Two norms and the product of the unit vectors; the mean adds numbers of at most one.
        atol = rounding_tolerance(3 * (d_in + 2) + d_sae, 1.0)
        assert mean_max_decoder_cosine(W_dec) == pytest.approx(naive(W_dec), abs=atol)


def test_orthogonal_rows_do_not_overlap_and_pairs_do():
    assert mean_max_decoder_cosine(torch.eye(5)) == pytest.approx(0, abs=1e-7)
    assert mean_max_decoder_cosine(torch.eye(5).repeat(2, 1)) == pytest.approx(1)


def test_rows_of_zeros_and_single_rows_are_no_neighbours():
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert mean_max_decoder_cosine(W_dec) == pytest.approx(2**-0.5)
    assert mean_max_decoder_cosine(torch.ones(1, 4)) == 0.0


def test_no_block_holds_more_than_its_budget(monkeypatch):
    monkeypatch.setattr(heldout, "OVERLAP_BLOCK_ELEMENTS", 2**12)
    sizes: list[int] = []
    original = torch.Tensor.__matmul__

    def recorded(self, other):
        product = original(self, other)
        sizes.append(product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", recorded)
    mean_max_decoder_cosine(torch.randn(500, 4))
    assert sizes
    assert max(sizes) <= 2**12
