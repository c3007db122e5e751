from __future__ import annotations

import pytest
import torch

from msae_plugin.reporting.analyses import (
    coactivation_by_cosine,
    firing_by_scale,
    firing_density,
)


def test_density_by_hand():
    frequencies = torch.tensor([0.0, 1e-10, 0.5, 0.05, 0.05, 1e-9 * 2])
    found = firing_density(frequencies, lowest=-4, bins=4)
    assert found.never == 2
    # Bins of a decade; what fires more rarely than 1e-4 is in the first.
    assert found.edges == pytest.approx([-4, -3, -2, -1, 0])
    assert found.counts == [1, 0, 2, 1]
    assert found.median == pytest.approx(0.05)


def test_nothing_fires():
    found = firing_density(torch.zeros(5))
    assert (found.never, sum(found.counts), found.median) == (5, 0, None)


def test_scales_are_what_each_prefix_adds():
    frequencies = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0, 1.0, 0.0, 0.0])
    found = firing_by_scale(frequencies, [0.25, 0.5])
    assert [(band.first, band.end) for band in found] == [(0, 2), (2, 4), (4, 8)]
    assert [band.active for band in found] == pytest.approx([0.75, 0.25, 1.0])
    assert [band.share for band in found] == pytest.approx([0.375, 0.125, 0.5])
    assert [band.never for band in found] == [0, 0, 3]


@pytest.mark.parametrize("block_elements", [1, 50, 2**20])
def test_coactivation_is_that_of_all_pairs(block_elements):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(40, 12, generator=generator).relu()
    latents[:, 5] = 0
    W_dec = torch.randn(12, 3, generator=generator)
    edges = (-1.0, -0.2, 0.3, 1.0)
    sums, counts, shared = [0.0] * 3, [0] * 3, [0] * 3
    for i in range(12):
        for j in range(i):
            if 5 in (i, j):
                continue  # never fires
            cosine = torch.cosine_similarity(W_dec[i], W_dec[j], dim=0)
            place = 0 if cosine < -0.2 else 1 if cosine < 0.3 else 2
            sums[place] += torch.cosine_similarity(latents[:, i], latents[:, j], dim=0).item()
            counts[place] += 1
            shared[place] += bool((latents[:, i] * latents[:, j]).any())
    found = coactivation_by_cosine(latents, W_dec, edges, block_elements)
    assert [part.pairs for part in found] == counts
    assert [part.coactivation for part in found] == pytest.approx(
        [total / n for total, n in zip(sums, counts, strict=True)], abs=1e-6
    )
    assert [part.together for part in found] == pytest.approx(
        [hits / n for hits, n in zip(shared, counts, strict=True)]
    )


def test_an_empty_bin_has_no_mean():
    found = coactivation_by_cosine(torch.eye(2), torch.eye(2), (-1.0, 0.5, 1.0))
    assert [(part.pairs, part.coactivation) for part in found] == [(1, 0.0), (0, None)]
