"""Two ranks of half the batch are one rank of the whole batch, in every mechanism."""

from __future__ import annotations

import pytest
import torch
from rank_cases import (
    BATCH,
    CASES,
    D_SAE,
    LR,
    MULTISCALE,
    STEPS,
    Outcome,
    build,
    run_alone,
    run_ranks,
)
from tolerance import rounding_tolerance

from msae_plugin.architecture.peers import peer_section
from msae_plugin.architecture.ranks import ALONE, Ranks
from msae_plugin.common.errors import InputError
from msae_plugin.training.data_parallel import share_batches
from msae_plugin.training.plans import build_sae, plan_saes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome | str]]:
    return run_ranks(2, tmp_path_factory.mktemp("ranks"))


def outcomes(two_ranks: list[dict[str, Outcome | str]], case: str) -> list[Outcome]:
    found = [of_rank.get(case, "an earlier case failed") for of_rank in two_ranks]
    assert all(isinstance(outcome, Outcome) for outcome in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_of_half_the_batch_are_one_of_the_whole(
    two_ranks: list[dict[str, Outcome | str]], case: str
) -> None:
    first, second = outcomes(two_ranks, case)
    alone = run_alone(case)
    # Parameters are float64. Statistics are float32: means over the batch and the steps, and a
    # sketch's products over the latents. They reach Adam's two moments, hence each step's movement.
    relative = rounding_tolerance(BATCH + D_SAE + STEPS, 1.0)
    atol = 2 * STEPS * LR * relative
    for name, value in alone.state.items():
        torch.testing.assert_close(first.state[name], value, rtol=relative, atol=atol, msg=name)
        assert torch.equal(first.state[name], second.state[name]), name
    assert torch.equal(first.dead, alone.dead)
    assert torch.equal(second.dead, alone.dead)
    assert first.calibration == pytest.approx(alone.calibration, rel=1e-5)
    assert second.calibration == first.calibration
    assert len(first.rows) == len(alone.rows) > 0
    for ours, theirs in zip(first.rows, alone.rows, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"tokens_per_second", "step_tokens_per_second"}:
            # The sketch's error is the small difference of float32 numbers of size one.
            atol = 1e-5 if key == "metrics/sketch_error" else 1e-6
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=atol, nan_ok=True), key
    assert second.events == first.events
    assert len(first.events) == len(alone.events)
    assert bool(alone.events) == ("revival_every" in MULTISCALE.get(case, {}))
    for ours, theirs in zip(first.events, alone.events, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            exact = isinstance(value, str)
            assert value == (theirs[key] if exact else pytest.approx(theirs[key], rel=1e-4)), key


@pytest.mark.parametrize("case", CASES)
def test_the_cases_train(case: str) -> None:
    before = build(case)[0].state_dict()
    after = run_alone(case).state
    moved = (after["W_dec"] - before["W_dec"]).abs().max()
    assert moved > 0.05


@pytest.mark.parametrize("peer", ["bottleneck", "c2r", "lista_matryoshka"])
def test_a_peer_that_depends_on_the_batch_is_refused_on_several_ranks(peer: str) -> None:
    section = peer_section(peer, 10)
    plan = plan_saes({peer: {"d_sae": 64, "k": 30, **section}}, ["h"], d_model=8, training_steps=10)
    sae = build_sae(plan[0], 0, "cpu")
    share_batches(sae, peer, ALONE)
    two = Ranks()
    two.count = 2
    with pytest.raises(InputError, match=f"'{section['architecture']}' is not known to train to"):
        share_batches(sae, peer, two)
