"""[C]: the streaming sketch against the co-activation matrix it never forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msae_plugin.architecture.mechanisms.sketch import CoactivationSketch

CPU = torch.device("cpu")


def low_rank_acts(n_tokens: int, d_sae: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    left = torch.rand(n_tokens, rank, generator=generator)
    loadings = torch.rand(rank, d_sae, generator=torch.Generator().manual_seed(7))
    return left @ loadings


def filled(sketch: CoactivationSketch, true_rank: int, seed: int) -> torch.Tensor:
    """Feed three batches; returns the exact running co-activation in float64."""
    generator = torch.Generator().manual_seed(seed)
    d_sae = sketch.diagonal.numel()
    exact = torch.zeros(d_sae, d_sae, dtype=torch.float64)
    for step in range(3):
        rate = max(0.4, 1 / (step + 1))
        acts = low_rank_acts(50, d_sae, true_rank, generator)
        sketch.update(acts, rate)
        exact = (1 - rate) * exact + rate * (acts.double().T @ acts.double()) / 50
    return exact


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(6, 30), st.integers(0, 50))
def test_exact_when_the_rank_suffices(true_rank: int, more: int, d_sae: int, seed: int) -> None:
    torch.manual_seed(seed)
    sketch = CoactivationSketch(d_sae, true_rank + more, CPU)
    exact = filled(sketch, true_rank, seed)
    factors = sketch.factors()
    assert factors.shape == (d_sae, min(true_rank + more, d_sae))
    error = (factors @ factors.T - exact).norm() / exact.norm()
    assert error < 1e-3
    assert sketch.relative_error(factors) < 1e-3
    torch.testing.assert_close(sketch.diagonal.double(), exact.diagonal(), rtol=1e-5, atol=1e-7)
    chosen = torch.tensor([0, d_sae - 1, 3])
    spread = exact.diagonal()[chosen].sqrt()
    cosine = exact[chosen][:, chosen] / (spread[:, None] * spread)
    torch.testing.assert_close(
        sketch.normalised(factors, chosen).double(), cosine, rtol=0, atol=2e-3
    )


def test_reported_error_is_the_true_error() -> None:
    """Eight probes estimate the Frobenius norm; over many sketches the estimate is unbiased."""
    ratios = []
    for seed in range(20):
        torch.manual_seed(seed)
        sketch = CoactivationSketch(40, 3, CPU)
        generator = torch.Generator().manual_seed(seed)
        acts = torch.rand(200, 40, generator=generator) * (
            torch.rand(200, 40, generator=generator) < 0.2
        )
        sketch.update(acts, 1.0)
        exact = acts.T @ acts / 200
        factors = sketch.factors()
        true = (factors @ factors.T - exact).norm() / exact.norm()
        reported = sketch.relative_error(factors)
        assert true > 0.1  # full rank data: three directions cannot be enough
        assert 0.4 < reported / true < 2.5
        ratios.append(float(reported / true))
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.2)


def test_near_the_best_possible_rank() -> None:
    torch.manual_seed(0)
    sketch = CoactivationSketch(60, 5, CPU)
    generator = torch.Generator().manual_seed(0)
    strengths = torch.logspace(0, -3, 60)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator)).Q
    acts = torch.randn(500, 60, generator=generator) * strengths @ basis
    sketch.update(acts, 1.0)
    exact = acts.T @ acts / 500
    values = torch.linalg.eigvalsh(exact).flip(0)
    best = values[5:].norm()
    factors = sketch.factors()
    achieved = (factors @ factors.T - exact).norm()
    assert best <= achieved * (1 + 1e-4)
    assert achieved < 3 * best


def test_nothing_seen_gives_zero_and_no_nan() -> None:
    sketch = CoactivationSketch(5, 2, CPU)
    sketch.update(torch.zeros(4, 5), 1.0)
    factors = sketch.factors()
    assert torch.equal(factors, torch.zeros(5, 2))
    assert sketch.relative_error(factors) == 0
    assert torch.equal(sketch.normalised(factors, torch.arange(5)), torch.zeros(5, 5))


def test_a_rank_above_the_width_is_capped() -> None:
    torch.manual_seed(0)
    sketch = CoactivationSketch(3, 32, CPU)
    exact = filled(sketch, 3, 0)
    factors = sketch.factors()
    torch.testing.assert_close((factors @ factors.T).double(), exact, rtol=1e-3, atol=1e-3)


def test_sketch_stays_float32_under_autocast() -> None:
    torch.manual_seed(0)
    plain, autocast = CoactivationSketch(20, 4, CPU), CoactivationSketch(20, 4, CPU)
    autocast.load_state_dict(plain.state_dict())
    acts = torch.rand(30, 20)
    plain.update(acts, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        autocast.update(acts, 1.0)
    assert torch.equal(plain.sample, autocast.sample)
