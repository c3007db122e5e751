"""The training step under torch.compile: one graph, the same numbers, no wait for the device."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from steps import activations, make, plain, step_input
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from msae_plugin import MultiScaleTrainingSAE
from msae_plugin.architecture.kernels.compiling import COMPILES_RIGHT_FROM, compiled_from
from msae_plugin.architecture.kernels.static_selection import static_batch_top_k
from msae_plugin.architecture.selection import Selection, batch_top_k
from msae_plugin.architecture.step_schedule import Budgets

D_IN, D_SAE, N_TOKENS = 12, 40, 32
DEFAULT: dict[str, Any] = {
    "sparsity_scales": [2.0],
    "prefix_fractions": [0.25, 0.5],
    "orthogonality_coefficient": 0.1,
    "orthogonality_pairs": "chunks",
    "orthogonality_weighting": "none",
    "orthogonality_chunk_size": 20,
    "firing_floor": 0.3,
}


def twins(**fields: Any) -> tuple[MultiScaleTrainingSAE, MultiScaleTrainingSAE]:
    # In float64, where two kernels' rounding cannot be mistaken for an error.
    values = plain(d_in=D_IN, d_sae=D_SAE, k=4, dtype="float64", **fields)
    return make(**values).train(), make(**values).train()


def pairs(selection: Selection) -> dict[tuple[int, int], tuple[float, int]]:
    """Value and tier by token and latent, without padding."""
    columns = (selection.tokens, selection.latents, selection.values, selection.tiers)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {(t, i): (value, tier) for t, i, value, tier in rows if value > 0}


@pytest.mark.parametrize("scales", [[], [2.0], [0.5, 3.0]])
@pytest.mark.parametrize("shift", [0.0, -1.5, -9.0])  # plenty, too few, none are positive
def test_the_static_selection_is_the_other_one(scales: list[float], shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_pre = torch.randn(N_TOKENS, D_SAE, generator=generator) + shift
    scores = hidden_pre * (1 + torch.rand(D_SAE, generator=generator)) - 0.3
    static = static_batch_top_k(hidden_pre, scores, Budgets.of(5, scales, N_TOKENS, D_SAE))
    other = batch_top_k(hidden_pre, scores, 5, scales)
    assert static.values.numel() == int(max([1.0, *scales]) * 5 * N_TOKENS)
    assert pairs(static) == pairs(other)
    assert int(static.active().sum()) == int(other.active().sum())
    assert static.main_tier == other.main_tier
    torch.testing.assert_close(static.cut, other.cut, atol=0, rtol=0)
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
        torch.testing.assert_close(found.cut, expected.cut, atol=0, rtol=0)
        torch.testing.assert_close(found.lowest_score, expected.lowest_score, atol=0, rtol=0)


class Refuses(TorchDispatchMode):
    """Fails at operations that make a GPU's host wait for a value."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        assert name not in self.WAITS, name
        if name in ("index", "index_put_", "index_put"):
            # A boolean index is a `nonzero` inside.
            assert all(i is None or i.dtype != torch.bool for i in args[1]), name
        return func(*args, **(kwargs or {}))


def refusing(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
    """A torch.compile backend that runs the graph operation by operation, refusing the waits."""

    def run(*args: Any) -> Any:
        with Refuses():
            return graph(*args)

    return run


# Step and number of dead latents. Each new step number may compile anew, which takes seconds.
SAME_STEP = ((3, 0), (3, 3), (3, 30))
MANY_STEPS = ((0, 0), (1, 0), (2, 0), (5, 3), (8, 30), (9, 0))


def compare_steps(
    compiled: MultiScaleTrainingSAE, eager: MultiScaleTrainingSAE, backend: Any, steps: Any
) -> None:
    step_of = torch.compile(compiled.training_forward_pass, fullgraph=True, backend=backend)
    for step, n_dead in steps:
        dead = torch.arange(D_SAE) < n_dead
        x = activations(N_TOKENS, D_IN, step, torch.float64)
        for sae, function in ((compiled, step_of), (eager, eager.training_forward_pass)):
            sae.zero_grad()
            torch.manual_seed(step)
            output = function(step_input(x, step, dead))
            output.loss.backward()
            if sae is compiled:
                found = output
        assert found.losses.keys() == output.losses.keys()
        for name, loss in output.losses.items():
            torch.testing.assert_close(found.losses[name], loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.feature_acts, output.feature_acts, atol=1e-5, rtol=1e-5)
        for (name, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=name)
    for (name, b), c in zip(compiled.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(b, c, atol=1e-6, rtol=1e-5, msg=name)


needs_new_torch = pytest.mark.skipif(
    torch.__version__ < COMPILES_RIGHT_FROM, reason="this torch compiles in-place sums wrong"
)


@needs_new_torch
def test_one_graph_without_waiting() -> None:
    compiled, eager = twins(**DEFAULT, aux_loss_coefficient=0.0)
    compare_steps(compiled, eager, refusing, SAME_STEP[:1])


@needs_new_torch
@pytest.mark.slow
def test_one_graph_with_auxk() -> None:
    compiled, eager = twins(**DEFAULT, aux_loss_coefficient=1.0)
    compare_steps(compiled, eager, "aot_eager", SAME_STEP)


@needs_new_torch
@pytest.mark.slow
def test_one_graph_whatever_the_step_with_everything_that_has_static_shapes() -> None:
    compiled, eager = twins(
        **DEFAULT,
        aux_loss_coefficient=1.0,
        norm_scales=[0.5, 1.0],
        norm_eps=0.1,
        norm_eps_mode="relative",
        importance_power=0.5,
        token_loss_weight="inverse_norm",
        k_initial_multiplier=2.0,
        k_anneal_steps=7,
    )
    compare_steps(compiled, eager, "aot_eager", MANY_STEPS)


def test_the_refusal_refuses() -> None:
    with pytest.raises(AssertionError, match="nonzero"), Refuses():
        torch.ones(3).nonzero()
    with pytest.raises(AssertionError, match="index"), Refuses():
        torch.ones(3)[torch.ones(3) > 0]


@needs_new_torch
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductors_own_kernels_leave_the_same_behind() -> None:
    # `aot_eager` runs torch's kernels: what Inductor makes of sums in place shows here alone.
    fields = {**DEFAULT, "orthogonality_chunk_size": D_SAE, "prefix_sort_every": 0}
    compiled, eager = twins(**fields, aux_loss_coefficient=0.0)
    compare_steps(compiled, eager, "inductor", ((1, 0), (2, 0), (3, 0)))


@pytest.mark.parametrize(("installed", "compiles"), [("2.12.1+cu130", False), ("2.14.0", True)])
def test_an_old_torch_runs_a_compiled_step_as_it_is(installed: str, compiles: bool) -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    @compiled_from(COMPILES_RIGHT_FROM, TorchVersion(installed))
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert float(torch.compile(doubled, backend=backend)(torch.ones(()))) == 2
    assert len(graphs) == int(compiles)
