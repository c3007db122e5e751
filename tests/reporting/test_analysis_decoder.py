from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msae_plugin.evaluation.heldout import max_decoder_cosines, mean_max_decoder_cosine
from msae_plugin.reporting.analyses import decoder_diversity, effective_rank


def decoder(rows: int = 60, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def components(W_dec: torch.Tensor, threshold: float) -> list[int]:
    """Connected components by walking the whole graph."""
    directions = torch.nn.functional.normalize(W_dec, dim=1)
    linked = (directions @ directions.T) > threshold
    left, sizes = set(range(len(W_dec))), []
    while left:
        todo, members = [left.pop()], 1
        while todo:
            for other in linked[todo.pop()].nonzero().flatten().tolist():
                if other in left:
                    left.remove(other)
                    todo.append(other)
                    members += 1
        sizes.append(members)
    return sorted(sizes, reverse=True)


@pytest.mark.parametrize("block_elements", [1, 60 * 7, 2**22])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
def test_clusters_are_the_connected_components_whatever_the_block(block_elements, threshold):
    found = decoder_diversity(decoder(), [threshold], block_elements)
    expected = components(decoder(), threshold)
    assert found.clusters[0].sizes == expected
    assert found.clusters[0].largest == expected[0]
    assert found.clusters[0].single == expected.count(1)


def test_a_chain_is_one_cluster_although_its_ends_are_far_apart():
    angles = torch.arange(0, 8) * (math.pi / 7)  # 26 degrees apart, cosine .9; the ends opposite
    chain = torch.stack([angles.cos(), angles.sin()], dim=1)[torch.tensor([0, 7, 3, 5, 1, 6, 2, 4])]
    assert decoder_diversity(chain, [0.89]).clusters[0].sizes == [8]
    assert decoder_diversity(chain, [0.91]).clusters[0].sizes == [1] * 8


def test_the_overlap_is_that_of_the_evaluation():
    W_dec = decoder()
    found = decoder_diversity(W_dec, block_elements=100)
    assert found.mean_max_cosine == pytest.approx(mean_max_decoder_cosine(W_dec), abs=1e-6)
    torch.testing.assert_close(found.max_cosines, max_decoder_cosines(W_dec))


def test_rows_of_zeros_are_counted_and_left_out():
    W_dec = torch.cat([decoder(10), torch.zeros(2, 12)])
    found, without = decoder_diversity(W_dec), decoder_diversity(decoder(10))
    assert (found.zero_rows, found.d_sae, found.d_in) == (2, 12, 12)
    assert found.clusters == without.clusters
    assert found.effective_rank == without.effective_rank
    assert found.norms[0] == 0


def test_effective_rank_by_hand():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 4)) == pytest.approx(1)
    # Singular values 3 and 1: shares 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.tensor([[3.0, 0, 0], [0, 1, 0]])) == pytest.approx(expected)
    assert effective_rank(torch.zeros(3, 4)) == 0


def test_effective_rank_is_that_of_the_singular_values_in_chunks():
    matrix = decoder(30, 8)
    shares = torch.linalg.svdvals(matrix.double())
    shares /= shares.sum()
    expected = (-(shares * shares.log()).sum()).exp().item()
    assert effective_rank(matrix, rows_at_a_time=7) == pytest.approx(expected, rel=1e-9)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_no_tensor_grows_with_the_square_of_the_dictionary():
    W_dec = decoder(2000, 8)
    with Largest() as largest:
        decoder_diversity(W_dec, [0.95], block_elements=2000 * 8)
    assert largest.numbers <= 2000 * 8 * 2  # the similarities of a block; its pairs, two indices


def test_a_broken_decoder_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        decoder_diversity(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match=r"\(d_sae, d_in\)"):
        decoder_diversity(torch.ones(3))


def test_one_direction_overlaps_nothing():
    found = decoder_diversity(torch.ones(1, 4))
    assert found.mean_max_cosine == 0
    assert [clusters.sizes for clusters in found.clusters] == [[1], [1]]
