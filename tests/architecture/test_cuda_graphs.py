"""Replayed steps are the steps, whatever changes between them.

Recording itself needs a GPU (test_on_gpu.py). Here the recorder is a literal one: it keeps the
buffers of a recording and runs the step on them, so that everything around it is the real thing.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from steps import activations, make, plain, step_input
from tolerance import rounding_tolerance

from msae_plugin import MultiScaleTrainingSAE
from msae_plugin.architecture.kernels import replay, static_selection
from msae_plugin.architecture.kernels.cuda_graphs import RecordedSteps, StepFunction
from msae_plugin.architecture.kernels.decoding import MachineSettings
from msae_plugin.architecture.losses import auxk_loss
from msae_plugin.architecture.step_schedule import (
    DeadLatents,
    EncoderInput,
    StepInputs,
    StepSchedule,
)
from msae_plugin.common.errors import RunFailure

D_IN, D_SAE, N_TOKENS = 12, 40, 32
DEFAULT: dict[str, Any] = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "k": 4,
    "sparsity_scales": [0.5, 2.0],
    "prefix_fractions": [0.25, 0.5],
    "prefix_sort_every": 5,
    "orthogonality_coefficient": 0.1,
    "orthogonality_pairs": "chunks",
    "orthogonality_weighting": "none",
    "orthogonality_chunk_size": D_SAE,
    "firing_floor": 0.3,
    "aux_loss_coefficient": 1.0,
    "k_initial_multiplier": 2.0,
    "k_anneal_steps": 64,
}


class LiteralRecording:
    """Buffers that are overwritten by each replay, as those of a CUDA graph are."""

    def __init__(
        self,
        function: StepFunction,
        inputs: Sequence[torch.Tensor],
        numbers: torch.Tensor,
        parameters: Sequence[torch.Tensor],
        pool: Any,
    ) -> None:
        del pool
        self.function = function
        self.leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        self.inputs = [tensor.clone() for tensor in inputs]
        self.numbers = numbers.clone()
        self.loss_gradient = torch.ones((), dtype=parameters[0].dtype)
        self.outputs: Any = None
        self.gradients: Any = [torch.full_like(p, torch.nan) for p in parameters]

    def forward(self) -> None:
        with torch.enable_grad():
            fresh = self.function(self.inputs, self.numbers, self.leaves)
        self.loss = fresh.loss
        if self.outputs is None:
            self.outputs = fresh.detached()
            return
        assert self.outputs.names == fresh.names
        self.outputs.terms.copy_(fresh.terms)
        self.outputs.loss.copy_(fresh.loss.detach())
        for held, new in zip(self.outputs.others, fresh.others, strict=True):
            held.copy_(new.detach())

    def backward(self) -> None:
        found = torch.autograd.grad(self.loss, self.leaves, self.loss_gradient, allow_unused=True)
        for held, new in zip(self.gradients, found, strict=True):
            held.copy_(new)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on a CPU take the form that they have on a GPU, and may be recorded."""
    monkeypatch.setattr(static_selection, "needs_static_shapes", lambda _: True)
    allowed = replay._can_be_recorded

    def on_gpu(sae: MultiScaleTrainingSAE, sae_in: torch.Tensor) -> bool:
        class OnGpu:
            device = torch.device("cuda")
            requires_grad = sae_in.requires_grad

        return allowed(sae, OnGpu())  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(replay, "_can_be_recorded", on_gpu)


def two_saes(**fields: Any) -> tuple[MultiScaleTrainingSAE, MultiScaleTrainingSAE]:
    # In float64: a hundred steps of Adam enlarge what float32 rounds differently in two kernels.
    values = plain(**{**DEFAULT, "dtype": "float64", **fields})
    replayed, eager = make(**values).train(), make(**values).train()
    eager.machine = MachineSettings(cuda_graphs=False)
    replayed.recorded_steps = RecordedSteps(LiteralRecording)
    return replayed, eager


def dead_mask(n_dead: int) -> torch.Tensor:
    return torch.arange(D_SAE) % 3 < (n_dead > 0) if n_dead > 14 else torch.arange(D_SAE) < n_dead


def step_of(sae: MultiScaleTrainingSAE, step: int, n_dead: int = 0, **more: Any) -> Any:
    torch.manual_seed(step)
    x = activations(N_TOKENS, D_IN, step, torch.float64)
    return sae.training_forward_pass(step_input(x, step, dead_mask(n_dead), **more))


def after_steps(**fields: Any) -> MultiScaleTrainingSAE:
    """An SAE after steps that are recorded where they may be."""
    sae, _ = two_saes(k_anneal_steps=0, **fields)
    for step in range(1, 8):
        step_of(sae, step).loss.backward()
    return sae


def same_state(one: MultiScaleTrainingSAE, other: MultiScaleTrainingSAE) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"orthogonality_every": 3},
        {"unit_norm_decoder": True, "skip_scale": 0.1},
        {"revival_every": 7, "revival_dead_steps": 2, "k": 2, "sparsity_scales": []},
        {"prefix_fractions": [], "firing_floor": 0.0, "rescale_acts_by_decoder_norm": False},
        {"detach_inner_prefixes": True, "l1_coefficient": 0.1, "aux_loss_coefficient": 0.0},
    ],
)
def test_a_run_of_replays_is_the_run(fields: dict[str, Any]) -> None:
    replayed, eager = two_saes(**fields)
    made: list[LiteralRecording] = []

    def record(*given: Any) -> LiteralRecording:
        made.append(LiteralRecording(*given))
        return made[-1]

    replayed.recorded_steps = RecordedSteps(record)
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-2) for sae in (replayed, eager)]
    for step in range(100):
        # Dead latents come and go.
        n_dead = 0 if step < 15 else (step % 4) if step < 80 else 15
        outputs: list[Any] = []
        for sae, optimizer in zip((replayed, eager), optimizers, strict=True):
            output = step_of(sae, step, n_dead, l1=sae.cfg.l1_coefficient * min(1, step / 20))
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(output)
        found, expected = outputs
        assert list(found.losses) == list(expected.losses)
        for name, value in expected.losses.items():
            torch.testing.assert_close(found.losses[name], value.detach(), atol=1e-5, rtol=1e-4)
        for name in ("loss", "sae_out", "feature_acts", "hidden_pre"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-4, msg=name
            )
        same_state(replayed, eager)
    # One in each eighth of the fall of k, once the L1 weight has risen; those after it are kept.
    assert len(made) > 6
    assert 1 <= replayed.recorded_steps.count <= 4
    assert eager.recorded_steps.count == 0


@pytest.mark.usefixtures("recording")
def test_gradients_of_several_steps_add_up() -> None:
    replayed, eager = two_saes(k_anneal_steps=0)
    for first in range(1, 30, 3):
        for sae in (replayed, eager):
            sae.zero_grad(set_to_none=first % 2 == 1)
            for step in range(first, first + 3):
                (step_of(sae, step).loss / 3).backward()
        for p, q in zip(replayed.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5)
    assert replayed.recorded_steps.count == 1


@pytest.mark.usefixtures("recording")
def test_losses_may_be_held_while_further_steps_are_taken() -> None:
    replayed, _ = two_saes(k_anneal_steps=0)
    held, values = [], []
    for step in range(1, 12):
        output = step_of(replayed, step)
        output.loss.backward()
        held.append([output.loss, *output.losses.values()])
        values.append([float(value) for value in held[-1]])
    assert [[float(value) for value in row] for row in held] == values
    assert len({row[0] for row in values}) == len(values)


@pytest.mark.usefixtures("recording")
def test_a_backward_pass_after_the_next_step_is_refused() -> None:
    replayed = after_steps()
    first, second = step_of(replayed, 8), step_of(replayed, 9)
    with pytest.raises(RunFailure, match=r"before the next step, or set cuda_graphs=False"):
        first.loss.backward()
    second.loss.backward(retain_graph=True)
    with pytest.raises(RunFailure, match="once per step"):
        second.loss.backward()


@pytest.mark.usefixtures("recording")
def test_what_a_recording_depends_on_makes_another() -> None:
    replayed, eager = two_saes(k_anneal_steps=0, prefix_sort_every=0)
    steps = replayed.recorded_steps

    def run(first: int) -> None:
        for step in range(first, first + 5):
            found, expected = (step_of(sae, step) for sae in (replayed, eager))
            torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
            found.loss.backward()

    run(1)
    assert steps.count == 1
    for sae in (replayed, eager):
        sae.cfg.prefix_weight = 1.0
    run(6)
    assert steps.count == 2
    # Other memory of the same weights.
    replayed.W_dec = torch.nn.Parameter(replayed.W_dec.detach().clone())
    with torch.no_grad():
        replayed.W_dec.mul_(1.5)
        eager.W_dec.mul_(1.5)
    run(11)
    assert steps.count == 3
    for step in range(20, 60):
        for sae in (replayed, eager):
            sae.cfg.prefix_weight = 1.0 + step // 5
        step_of(replayed, step)
    assert steps.count == 4


@pytest.mark.usefixtures("recording")
def test_hooks_gradients_of_the_input_and_no_grad_are_served() -> None:
    replayed = after_steps()
    seen: list[torch.Tensor] = []
    replayed.hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts))
    step_of(replayed, 8)
    assert len(seen) == 1
    replayed.reset_hooks()
    with torch.no_grad():
        assert not step_of(replayed, 9).loss.requires_grad
    x = activations(N_TOKENS, D_IN, 10, torch.float64).requires_grad_()
    replayed.training_forward_pass(step_input(x, 10, dead_mask(0))).loss.backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.usefixtures("recording")
def test_copies_and_exports_leave_recordings_behind() -> None:
    replayed = after_steps()
    replayed.zero_grad()
    assert replayed.recorded_steps.count == 1
    assert copy.deepcopy(replayed).recorded_steps.count == 0
    assert pickle.loads(pickle.dumps(replayed.recorded_steps)).count == 0
    assert "recorded" not in " ".join(replayed.state_dict())
    # Training is over when the threshold is calibrated.
    replayed.calibrate_threshold([activations(N_TOKENS, D_IN, 0, torch.float64)])
    assert replayed.recorded_steps.count == 0


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("kind", [RuntimeError, TypeError])
def test_what_cannot_be_recorded_runs_as_it_is(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise kind("operation not permitted when stream is capturing\nat somewhere")

    replayed, eager = two_saes(k_anneal_steps=0)
    replayed.recorded_steps = RecordedSteps(fails)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 10):
            found, expected = (step_of(sae, step) for sae in (replayed, eager))
            torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
            found.loss.backward()
    assert [record.getMessage() for record in caplog.records] == [
        "the step cannot be recorded as a CUDA graph and runs as it is: "
        "operation not permitted when stream is capturing"
    ]


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize(
    "fields",
    [
        {"norm_scales": [1.0]},
        {"standardise": 0.5, "firing_floor": 0.0},
        {"importance_power": 0.5},
        {"sketch_rank": 4},
        {"orthogonality_pairs": "neighbours"},
        {"orthogonality_pairs": "neighbours", "orthogonality_weighting": "coactivation"},
    ],
)
def test_mechanisms_off_the_presets_are_not_recorded(fields: dict[str, Any]) -> None:
    assert after_steps(**fields).recorded_steps.count == 0


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert after_steps().recorded_steps.count == 0


@pytest.mark.parametrize("n_dead", [1, 3, 7, 30])
@pytest.mark.parametrize("scaled", [False, True])
def test_auxk_over_a_padded_list_is_auxk(n_dead: int, scaled: bool) -> None:
    generator = torch.Generator().manual_seed(n_dead)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).double()

    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[torch.randperm(D_SAE, generator=generator)[:n_dead]] = True
    # A latent that is not dead and stands in the padding: latent 0.
    mask[0] = False
    scale = random(N_TOKENS, 1).abs() if scaled else None
    norm = random(D_SAE).abs() if scaled else None
    x_hat, residual = random(N_TOKENS, D_IN), random(N_TOKENS, D_IN)
    weights = [random(D_IN, D_SAE), random(D_SAE), random(D_SAE, D_IN)]
    listed = DeadLatents.listed(mask)
    assert listed is not None
    latents, count = replay.padded(listed)
    assert latents.numel() == D_SAE
    results: list[list[torch.Tensor]] = []
    padded = DeadLatents(mask, latents, torch.tensor(float(count), dtype=torch.float64))
    for dead in (listed, padded):
        own = [tensor.clone().requires_grad_() for tensor in weights]
        loss = auxk_loss(EncoderInput(x_hat, scale, norm), residual, *own, dead)
        loss.backward()
        results.append([loss.detach(), *(tensor.grad for tensor in own)])  # pyright: ignore[reportArgumentType]
    # The loss and gradients of all latents, summed from absolute values: bounds of sum(|terms|).
    own = [tensor.abs().requires_grad_() for tensor in weights]
    acts = x_hat.abs() @ own[0] + own[1]
    errors = (acts if scale is None else acts * scale) @ own[2] + residual.abs()
    bound = errors.pow(2).sum(-1).mean()
    bound.backward()
    bounds = [bound.detach(), *(tensor.grad for tensor in own)]
    # Encoded, decoded, squared and averaged; and back.
    terms = 2 * (D_IN + D_SAE + D_IN + N_TOKENS)
    for found, expected, magnitude in zip(*reversed(results), bounds, strict=True):
        assert magnitude is not None
        atol = rounding_tolerance(terms, magnitude, torch.float64)
        torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_lists_of_the_dead_come_in_few_lengths() -> None:
    lengths: set[int] = set()
    for n_dead in range(1, 1000):
        listed = DeadLatents.listed(torch.arange(1000) < n_dead)
        assert listed is not None
        padded, count = replay.padded(listed)
        assert count == n_dead
        assert padded[:count].tolist() == list(range(n_dead))
        lengths.add(padded.numel())
    assert lengths == {64, 128, 256, 512, 1000}
    assert DeadLatents.listed(torch.zeros(5, dtype=torch.bool)) is None


def test_room_for_pairs_takes_few_values_and_is_enough() -> None:
    falls = {"k_initial_multiplier": 2.5, "k_anneal_steps": 1000}
    cfg = make(**plain(**{**DEFAULT, **falls})).cfg
    rooms = [replay.room_for_pairs(cfg, step, N_TOKENS) for step in range(1500)]
    needed = [StepSchedule.at(cfg, step, N_TOKENS).budgets.n_listed for step in range(1500)]
    assert all(room >= need for room, need in zip(rooms, needed, strict=True))
    assert len(set(rooms)) == 9
    assert rooms[1000:] == needed[1000:]
    assert max(room / need for room, need in zip(rooms, needed, strict=True)) < 1.2


def test_the_numbers_come_back() -> None:
    cfg = make(**plain(**DEFAULT)).cfg
    schedule = StepSchedule.at(cfg, 7, N_TOKENS)
    numbers = torch.tensor(schedule.numbers(), dtype=torch.float64)
    again = schedule.with_numbers(numbers, 999)
    assert again.numbers() == pytest.approx(schedule.numbers(), rel=1e-6)
    assert [int(count) for count in again.budgets.pairs] == list(schedule.budgets.pairs)
    assert again.budgets.n_listed == 999
    assert StepInputs(torch.zeros(1, 1), None).l1_coefficient == 0
