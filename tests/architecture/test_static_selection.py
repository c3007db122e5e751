"""Selection in lists of fixed length, and a step that torch.compile leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import activations, make, plain, step_input

from msae_plugin.architecture.kernels.static_selection import static_batch_top_k
from msae_plugin.architecture.selection import Selection, batch_top_k
from msae_plugin.architecture.step_schedule import Budgets

D_SAE, N_TOKENS = 40, 32


def pairs(selection: Selection) -> dict[tuple[int, int], tuple[float, int, bool]]:
    """Value, tier and whether it is active, by token and latent, without padding."""
    columns = (selection.tokens, selection.latents, selection.values, selection.levels)
    rows = zip(*(c.tolist() for c in (*columns, selection.active())), strict=True)
    return {(t, i): (value, tier, on) for t, i, value, tier, on in rows if value > 0}


@pytest.mark.parametrize("scales", [[], [2.0], [0.5, 3.0]])
@pytest.mark.parametrize("room", [None, 0, 1, 200])
@pytest.mark.parametrize("shift", [0.0, -1.5, -9.0])  # plenty, too few, none are positive
@pytest.mark.parametrize("scored", [False, True])
def test_the_static_selection_is_the_other_one(
    scales: list[float], room: int | None, shift: float, scored: bool
) -> None:
    generator = torch.Generator().manual_seed(room or 0)
    hidden_pre = torch.randn(N_TOKENS, D_SAE, generator=generator) + shift
    scores = hidden_pre
    if scored:
        scores = hidden_pre * (1 + torch.rand(D_SAE, generator=generator)) - 0.3
    exact = Budgets.of(5, scales, N_TOKENS, D_SAE)
    # A recorded step has its budgets as tensors, and room for more pairs.
    counts = [torch.tensor(count) for count in exact.pairs]
    budgets = exact
    if room is not None:
        budgets = Budgets(counts, exact.main_level, exact.n_listed + room)
    static = static_batch_top_k(hidden_pre, scores, budgets)
    other = batch_top_k(hidden_pre, scores, 5, scales)
    assert static.values.numel() == int(max([1.0, *scales]) * 5 * N_TOKENS) + (room or 0)
    assert pairs(static) == pairs(other)
    assert int(static.active().sum()) == int(other.active().sum())
    assert static.main_level == other.main_level
    torch.testing.assert_close(static.threshold, other.threshold, atol=0, rtol=0)
    torch.testing.assert_close(static.lowest_score, other.lowest_score, atol=0, rtol=0)


def test_the_static_selection_passes_over_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_pre = torch.randn(N_TOKENS, D_SAE, generator=generator)
    without = hidden_pre.clone()
    hidden_pre[3], without[3] = torch.nan, 0.0
    # As many as there are, and more than are positive.
    for k in (2, D_SAE):
        budgets = Budgets.of(k, [2.0], N_TOKENS, D_SAE)
        found, expected = (static_batch_top_k(pre, pre, budgets) for pre in (hidden_pre, without))
        assert pairs(found) == pairs(expected)
        assert torch.isfinite(found.values).all()
        torch.testing.assert_close(found.threshold, expected.threshold, atol=0, rtol=0)
        torch.testing.assert_close(found.lowest_score, expected.lowest_score, atol=0, rtol=0)


def test_a_compiled_step_runs_as_it_is() -> None:
    # SAELens' runner compiles it with compile_sae=True; Inductor gets the running means wrong.
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    sae = make(**plain()).train()
    step = torch.compile(sae.training_forward_pass, backend=backend)
    step(step_input(activations(N_TOKENS, sae.cfg.d_in, 0), 0)).loss.backward()
    assert sae.W_enc.grad is not None
    assert not graphs
