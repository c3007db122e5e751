"""[O]: the chunked and listed penalties against a naive d_sae x d_sae computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msae_plugin.architecture.mechanisms.orthogonality import (
    NeighbourCoactivation,
    chunk_penalty,
    coactivation_weights,
    nearest_in_chunks_penalty,
    nearest_neighbours,
    pair_penalty,
    random_chunks,
)

CPU = torch.device("cpu")


def decoder(d_sae: int, d_in: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64)
    # A common direction gives overlaps of both signs and different sizes.
    return (rows + 0.5 * rows[:1]).requires_grad_()


def cosines(W_dec: torch.Tensor) -> torch.Tensor:
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    return unit @ unit.T - torch.eye(len(unit), dtype=W_dec.dtype)


def compare(mine: torch.Tensor, reference: torch.Tensor, W_dec: torch.Tensor) -> None:
    torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)
    (got,) = torch.autograd.grad(mine, W_dec)
    (expected,) = torch.autograd.grad(reference, W_dec)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(2, 6), st.integers(1, 12), st.integers(0, 99))
def test_weighted_chunks_match_the_naive_sum(
    d_sae: int, d_in: int, chunk_size: int, seed: int
) -> None:
    W_dec = decoder(d_sae, d_in, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(d_sae, d_sae, generator=generator, dtype=torch.float64)
    chunks = random_chunks(d_sae, chunk_size, CPU)
    assert sorted(torch.cat(chunks).tolist()) == list(range(d_sae))
    assert max(len(c) for c in chunks) <= chunk_size
    mine = chunk_penalty(W_dec, chunks, lambda chunk: weights[chunk][:, chunk].clone())
    together = torch.zeros(d_sae, d_sae, dtype=torch.float64)
    for chunk in chunks:
        together[chunk[:, None], chunk] = 1
    together.fill_diagonal_(0)
    total = (together * weights * cosines(W_dec).clamp(min=0) ** 2).sum()
    share_of_pairs = float(together.sum()) / (d_sae * (d_sae - 1))
    if share_of_pairs == 0:
        assert mine.item() == 0
        return
    compare(mine, total / d_sae / share_of_pairs, W_dec)


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(2, 6), st.integers(2, 12), st.integers(0, 99))
def test_unweighted_chunks_match_ortsae(d_sae: int, d_in: int, chunk_size: int, seed: int) -> None:
    W_dec = decoder(d_sae, d_in, seed)
    chunks = random_chunks(d_sae, chunk_size, CPU)
    per_chunk = []
    for chunk in chunks:
        own = cosines(W_dec)[chunk][:, chunk]
        if len(chunk) == 1:
            per_chunk.append((0 * W_dec).sum())
            continue
        off_diagonal = own.masked_fill(torch.eye(len(chunk), dtype=torch.bool), -9.0)
        per_chunk.append((off_diagonal.max(dim=1).values ** 2).mean())
    compare(nearest_in_chunks_penalty(W_dec, chunks), torch.stack(per_chunk).mean(), W_dec)


def test_chunks_estimate_the_whole_sum_without_bias() -> None:
    d_sae = 24
    W_dec = decoder(d_sae, 6).detach()
    weights = torch.rand(d_sae, d_sae, dtype=torch.float64)
    whole = (weights * cosines(W_dec).clamp(min=0) ** 2).fill_diagonal_(0).sum() / d_sae
    torch.manual_seed(0)
    draws = torch.stack(
        [
            chunk_penalty(W_dec, random_chunks(d_sae, 7, CPU), lambda c: weights[c][:, c].clone())
            for _ in range(400)
        ]
    )
    standard_error = draws.std() / 400**0.5
    assert abs(draws.mean() - whole) < 4 * standard_error
    assert standard_error < 0.05 * whole


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(1, 40), st.integers(0, 99))
def test_listed_pairs_match_the_naive_sum(d_sae: int, n_pairs: int, seed: int) -> None:
    W_dec = decoder(d_sae, 4, seed)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(d_sae, (n_pairs,), generator=generator)
    second = (first + torch.randint(1, d_sae, (n_pairs,), generator=generator)) % d_sae
    weights = torch.rand(n_pairs, generator=generator, dtype=torch.float64)
    squares = cosines(W_dec)[first, second].clamp(min=0) ** 2
    compare(pair_penalty(W_dec, first, second, weights), (weights * squares).sum() / d_sae, W_dec)


def test_gradient_leaves_norms_alone_and_spreads_directions() -> None:
    W_dec = decoder(10, 4)
    everyone = [torch.arange(10)]
    penalty = chunk_penalty(W_dec, everyone, lambda c: torch.ones(len(c), len(c)).double())
    (gradient,) = torch.autograd.grad(penalty, W_dec)
    along = (gradient * W_dec).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(10).double(), rtol=0, atol=1e-12)
    moved = (W_dec - 0.1 * gradient).detach()
    after = chunk_penalty(moved, everyone, lambda c: torch.ones(len(c), len(c)).double())
    assert after < penalty


@pytest.mark.parametrize("kind", ["chunks", "pairs"])
def test_zero_rows_give_no_nan(kind: str) -> None:
    W_dec = torch.randn(5, 3)
    W_dec[2] = 0
    W_dec.requires_grad_()
    if kind == "chunks":
        penalty = nearest_in_chunks_penalty(W_dec, [torch.arange(5)])
    else:
        _, listed = nearest_neighbours(W_dec, 2, 2)
        first = torch.arange(5).repeat_interleave(2)
        penalty = pair_penalty(W_dec, first, listed.flatten(), torch.ones(10))
    penalty.backward()
    assert torch.isfinite(penalty)
    assert W_dec.grad is not None
    assert torch.isfinite(W_dec.grad).all()


@settings(max_examples=20)
@given(st.integers(2, 20), st.integers(1, 25), st.integers(1, 25), st.integers(0, 9))
def test_neighbours_are_the_nearest_whatever_the_block(
    d_sae: int, count: int, rows_at_a_time: int, seed: int
) -> None:
    W_dec = decoder(d_sae, 5, seed).detach()
    found, index = nearest_neighbours(W_dec, count, rows_at_a_time)
    gram = cosines(W_dec)
    for i in range(d_sae):
        others = sorted((j for j in range(d_sae) if j != i), key=lambda j, i=i: -float(gram[i, j]))[
            :count
        ]
        assert index[i].tolist() == others
        torch.testing.assert_close(found[i], gram[i, others])


def test_co_activation_of_listed_pairs_is_the_exact_running_mean() -> None:
    """Through a change of neighbours: pairs that stay keep their past, new ones start afresh."""
    generator = torch.Generator().manual_seed(0)
    d_sae, rate, n_tokens = 7, 0.2, 30
    tracker = NeighbourCoactivation(d_sae, 3, CPU)
    first_decoder = decoder(d_sae, 4, 1).detach()
    second_decoder = first_decoder + 0.8 * decoder(d_sae, 4, 2).detach()
    # For each pair the batches that it was listed for, newest first with weights rate (1-rate)^age.
    history: dict[tuple[int, int], list[torch.Tensor]] = {}
    squares = torch.zeros(d_sae)
    for step in range(8):
        if step in (0, 4):
            tracker.refresh(first_decoder if step == 0 else second_decoder, 3)
            listed = {(i, j) for i in range(d_sae) for j in tracker.neighbours[i].tolist()}
            kept = listed & set(history)
            history = {pair: history.get(pair, []) for pair in listed}
            if step == 4:
                assert kept
                assert kept != listed
        acts = torch.rand(n_tokens, d_sae, generator=generator)
        acts = acts * (torch.rand(n_tokens, d_sae, generator=generator) < 0.5)
        tokens, latents = acts.nonzero(as_tuple=True)
        tracker.update(acts, acts[tokens, latents], tokens, latents, rate)
        squares = squares + rate * ((acts**2).mean(0) - squares)
        for (i, j), batches in history.items():
            batches.append((acts[:, i] * acts[:, j]).mean())
    cosine = tracker.normalised()
    for i in range(d_sae):
        for slot, j in enumerate(tracker.neighbours[i].tolist()):
            batches = history[i, j][::-1]
            weights = torch.tensor([rate * (1 - rate) ** age for age in range(len(batches))])
            moment = float((torch.stack(batches) * weights).sum() / weights.sum())
            expected = moment / float((squares[i] * squares[j]).sqrt())
            assert float(cosine[i, slot]) == pytest.approx(expected, rel=1e-4)


def test_independent_latents_are_co_active() -> None:
    generator = torch.Generator().manual_seed(0)
    tracker = NeighbourCoactivation(4, 3, CPU)
    acts = torch.rand(20_000, 4, generator=generator)
    tokens, latents = acts.nonzero(as_tuple=True)
    tracker.update(acts, acts[tokens, latents], tokens, latents, 1.0)
    # E[u]^2 / E[u^2] = 3/4 for uniform u.
    expected = torch.full((4, 3), 0.75)
    torch.testing.assert_close(tracker.normalised(), expected, rtol=0, atol=0.02)


def test_weights_stay_between_zero_and_one() -> None:
    weights = coactivation_weights(torch.tensor([-1.0, 0.1, 0.5, 7.0]), 0.1)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, 0.4, 1.0]))
