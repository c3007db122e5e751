"""[R]: who is revived, where to, what the optimiser forgets, and what is reported of it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from steps import activations, make, plain, step_input, train
from tolerance import rounding_tolerance

from msae_plugin import MultiScaleTrainingSAE
from msae_plugin.architecture.mechanisms.revival import (
    RevivalRecord,
    interference,
    new_directions,
    reset_optimizer_rows,
    revival_candidates,
)

CPU = torch.device("cpu")


def kill(sae: MultiScaleTrainingSAE) -> MultiScaleTrainingSAE:
    with torch.no_grad():
        sae.b_enc[-4:] = -1e3
    return sae


def with_dead_latents(**fields: object) -> MultiScaleTrainingSAE:
    """A SAE whose last latents can never fire: their bias is far below every cut."""
    return kill(make(**plain(revival_every=5, revival_dead_steps=3, **fields)))


def test_dead_latents_are_revived_once_the_window_is_over_and_not_before() -> None:
    sae = with_dead_latents(revival_max_fraction=1.0)
    train(sae, 5)  # steps 0..4: the first revival is due at step 5
    assert sae.pop_events() == []
    train(sae, 1, first_step=5)
    events = sae.pop_events()
    assert {e["latent"] for e in events} >= {9, 10, 11, 12}
    assert all(e["event"] == "revival" and e["step"] == 5 for e in events)
    assert sae.pop_events() == []
    fields = {"latent", "old_neighbour", "old_cosine", "source", "distance_travelled"}
    for event in json.loads(json.dumps(events)):
        assert fields <= set(event)
        assert event["old_neighbour"] not in {e["latent"] for e in events}


def test_revived_latents_point_at_the_error_with_the_norms_of_the_living() -> None:
    sae = with_dead_latents(revival_max_fraction=1.0)
    train(sae, 5)
    record = sae.mechanisms.revivals
    assert record is not None
    dead = record.dead(3)
    norms_before = sae.W_enc.norm(dim=0).detach().clone(), sae.W_dec.norm(dim=1).detach().clone()
    x = activations(64, 6, 5)
    sae.train()
    with torch.no_grad():
        errors = x - sae.decode(sae.encode(x))
    sae.training_forward_pass(step_input(x, 5))  # no optimiser step
    directions = errors / errors.norm(dim=1, keepdim=True)
    for latent in dead.nonzero().flatten().tolist():
        row = sae.W_dec[latent].detach()
        cosines = directions @ (row / row.norm())
        assert cosines.max() == pytest.approx(1.0, abs=1e-5)
        torch.testing.assert_close(
            sae.W_enc[:, latent].detach() / sae.W_enc[:, latent].norm(), row / row.norm()
        )
        assert sae.b_enc[latent] == 0
        assert sae.W_enc[:, latent].norm().item() == pytest.approx(
            float(norms_before[0][~dead].mean()), rel=1e-5
        )
        assert row.norm().item() == pytest.approx(float(norms_before[1][~dead].mean()), rel=1e-5)


def test_optimiser_forgets_exactly_the_revived_rows() -> None:
    sae = with_dead_latents(revival_max_fraction=1.0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    sae.attach_optimizer(optimizer)
    # Noise in every gradient, so that the dead rows have moments to forget.
    for step in range(5):
        sae.train()
        sae.training_forward_pass(step_input(activations(64, 6, step), step)).loss.backward()
        for parameter in sae.parameters():
            assert parameter.grad is not None
            parameter.grad += 0.01 * torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        kill(sae)
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in sae.named_parameters()}
    sae.training_forward_pass(step_input(activations(64, 6, 5), 5))
    revived = sorted(e["latent"] for e in sae.pop_events())
    assert revived == [9, 10, 11, 12]
    live = [i for i in range(13) if i not in revived]
    by_latent = {name: optimizer.state[p]["exp_avg"] for name, p in sae.named_parameters()}
    for name, rows in (("W_dec", 0), ("b_enc", 0), ("W_enc", 1)):
        moments, old = by_latent[name].movedim(rows, 0), before[name].movedim(rows, 0)
        assert (old[revived] != 0).all(), name
        assert (moments[revived] == 0).all(), name
        assert torch.equal(moments[live], old[live]), name
    assert torch.equal(by_latent["b_dec"], before["b_dec"])


def test_optimisers_without_row_shaped_state_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.state[weight]["something"] = torch.ones(2)
    reset_optimizer_rows(optimizer, torch.tensor([1]), [(weight, 0)])
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert momentum[1].abs().sum() == 0
    assert (momentum[[0, 2, 3]] == 1).all()
    assert torch.equal(optimizer.state[weight]["something"], torch.ones(2))


def test_without_an_optimiser_it_works_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    sae = with_dead_latents(revival_max_fraction=1.0)
    with caplog.at_level(logging.WARNING, logger="msae_plugin"):
        for step in range(16):
            sae.train()
            kill(sae)
            sae.training_forward_pass(step_input(activations(64, 6, step), step))
    assert len([e for e in sae.pop_events() if e["step"] >= 10]) > 0
    said = [r for r in caplog.records if "attach_optimizer" in r.getMessage()]
    assert len(said) == 1


def test_only_interfering_latents_are_revived_the_worst_first() -> None:
    record = RevivalRecord(5, CPU)
    record.steps_since_fired[:] = torch.tensor([0, 0, 9, 9, 9])
    W_dec = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.6, 0, 0.8], [0, 0.9, 0.19**0.5], [0, 0, 2]])
    latents, neighbours, cosines = revival_candidates(record, W_dec, 5, 0.3, 10)
    assert latents.tolist() == [3, 2]
    assert neighbours.tolist() == [1, 0]
    torch.testing.assert_close(cosines, torch.tensor([0.9, 0.6]))
    assert revival_candidates(record, W_dec, 5, 0.3, 1)[0].tolist() == [3]
    assert revival_candidates(record, W_dec, 5, 0.0, 10)[0].tolist() == [3, 2, 4]
    assert revival_candidates(record, W_dec, 10, 0.0, 10)[0].tolist() == []


def test_interference_is_the_largest_cosine_to_the_living() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(20, 4, generator=generator)
    # Two norms and the product of the unit vectors.
    atol = rounding_tolerance(3 * 4 + 4, 1.0)
    dead = torch.rand(20, generator=generator) < 0.4
    cosines, neighbours = interference(W_dec, dead, rows_at_a_time=3)
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    for slot, i in enumerate(dead.nonzero().flatten().tolist()):
        best = max((j for j in range(20) if not dead[j]), key=lambda j, i=i: unit[i] @ unit[j])
        assert neighbours[slot] == best
        assert cosines[slot].item() == pytest.approx(float(unit[i] @ unit[best]), abs=atol)
    nobody_alive, _ = interference(W_dec, torch.ones(20, dtype=torch.bool))
    assert (nobody_alive == -1).all()


def test_error_samples_are_drawn_by_their_squared_error() -> None:
    torch.manual_seed(0)
    errors = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    drawn = torch.cat([new_directions(errors, 1) for _ in range(2000)])
    shares = drawn.mean(dim=0)
    torch.testing.assert_close(shares, torch.tensor([0.9, 0.1, 0.0]), rtol=0, atol=0.03)
    assert new_directions(errors, 5).shape[0] == 2  # one has no error
    assert new_directions(torch.zeros(4, 3), 2).shape == (0, 3)


def test_outcomes_follow_after_the_survival_window() -> None:
    sae = with_dead_latents(revival_max_fraction=0.2, revival_survival_steps=10)
    train(sae, 31, lr=1e-3)
    events = sae.pop_events()
    revivals = {(e["latent"], e["step"]) for e in events if e["event"] == "revival"}
    outcomes = [e for e in events if e["event"] == "outcome"]
    assert outcomes
    for outcome in outcomes:
        assert outcome["step"] - outcome["revived_at"] >= 10
        assert (outcome["latent"], outcome["revived_at"]) in revivals
        assert 0 <= outcome["firing_rate"] <= 1
        # What never fired cannot have survived.
        assert outcome["survived"] <= (outcome["firing_rate"] > 0)
    per_step: dict[int, int] = {}
    for _, step in revivals:
        per_step[step] = per_step.get(step, 0) + 1
    assert max(per_step.values()) <= int(0.2 * 13)


def test_the_after_life_counts_from_the_revival() -> None:
    record = RevivalRecord(3, CPU)
    for _ in range(4):
        record.observe(torch.tensor([5, 9, 0]))
    record.mark_revived(torch.tensor([1, 2]), 4)
    for _ in range(4):
        record.observe(torch.tensor([5, 2, 0]))
    assert record.judge(7, 4, 3, 10) == []
    outcomes = {e["latent"]: e for e in record.judge(8, 4, 3, 10)}
    assert {latent: e["firing_rate"] for latent, e in outcomes.items()} == {1: 0.2, 2: 0.0}
    assert {latent: e["survived"] for latent, e in outcomes.items()} == {1: True, 2: False}
    assert record.judge(20, 4, 3, 10) == []  # judged once
    summary = record.summary(8)
    assert (summary["revivals_total"], summary["revival_survival_rate"]) == (2.0, 0.5)


def test_revival_brings_latents_back_to_life() -> None:
    """The point of it: the same run leaves fewer latents dead with revival than without."""

    def dead_after(revival_every: int) -> int:
        sae = make(
            **plain(
                d_sae=60,
                k=2,
                aux_loss_coefficient=0.0,
                revival_every=revival_every,
                revival_dead_steps=20,
                revival_max_fraction=0.2,
            )
        )
        train(sae, 150, lr=3e-3)
        fired = torch.zeros(60, dtype=torch.bool)
        sae.train()
        with torch.no_grad():
            for seed in range(1000, 1010):
                fired |= (sae.encode(activations(64, 6, seed)) > 0).any(dim=0)
        return int((~fired).sum())

    assert dead_after(20) < dead_after(0) - 5


def test_metrics_count_what_happened() -> None:
    sae = with_dead_latents(revival_max_fraction=1.0, revival_survival_steps=5)
    outputs = train(sae, 21)
    events = sae.pop_events()
    n_revivals = sum(e["event"] == "revival" for e in events)
    outcomes = [e for e in events if e["event"] == "outcome"]
    metrics = outputs[20].metrics
    assert metrics["revivals_total"] == n_revivals
    assert metrics["reactivation_frequency"] == pytest.approx(1000 * n_revivals / 20)
    survived = sum(e["survived"] for e in outcomes)
    assert metrics["revival_survival_rate"] == pytest.approx(survived / len(outcomes))
