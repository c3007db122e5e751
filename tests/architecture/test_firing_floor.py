"""[Z] The firing floor: steps worked out by hand, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from steps import activations, make, plain, train

from msae_plugin import MultiScaleTrainingSAEConfig
from msae_plugin.architecture.mechanisms.firing_floor import FiringFloor, thresholds_at_rate


def test_steps_by_hand() -> None:
    floor = FiringFloor(4, torch.device("cpu"))
    floor.allowance.copy_(torch.tensor([0.0, 0.3, 0.95, 0.05]))
    rates = torch.tensor([0.5, 0.01, 0.01, 0.5])
    floor.follow(rates, floor=0.02, threshold=torch.tensor(1.0), rate=0.1)
    # Above the floor: down a tenth of the cut, not below zero. Below it: up, not above the cut.
    torch.testing.assert_close(floor.allowance, torch.tensor([0.0, 0.4, 1.0, 0.0]))


def test_steps_of_dense_latents_by_hand() -> None:
    floor = FiringFloor(4, torch.device("cpu"))
    floor.allowance.copy_(torch.tensor([0.05, -0.3, -0.3, -0.05]))
    rates = torch.tensor([0.5, 0.2, 0.1, 0.05])  # .7 of .85 on dense latents; .1 is not dense
    floor.follow(rates, 0.0, torch.tensor(1.0), 0.1, dense_share_limit=0.8)
    # Dense: down a tenth of the threshold, below zero too. The others: back to zero, not beyond it.
    torch.testing.assert_close(floor.allowance, torch.tensor([-0.05, -0.4, -0.2, 0.0]))
    floor.follow(rates, 0.0, torch.tensor(1.0), 0.1, dense_share_limit=0.83)
    torch.testing.assert_close(floor.allowance, torch.tensor([0.0, -0.3, -0.1, 0.0]))


@pytest.mark.parametrize(
    ("k", "d_sae", "rate"),
    [
        (32, 2048, 0.1),
        (32, 2304, 0.1),
        (50, 16384, 0.1),
        (64, 2304, 512 / 2304),
        (11, 512, 88 / 512),
    ],
)
def test_what_is_dense_is_rare_in_a_crowded_dictionary(k: float, d_sae: int, rate: float) -> None:
    cfg = MultiScaleTrainingSAEConfig(d_in=8, d_sae=d_sae, k=k)
    assert cfg.dense_rate == pytest.approx(rate)


def test_the_exported_dense_share_is_at_the_limit() -> None:
    """Three directions that half of the tokens have, in a dictionary of thirty-two others."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q

    def tokens(seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        present = torch.rand(512, 32, generator=draw)
        active = present < torch.tensor([0.5] * 3 + [0.03] * 29)
        size = 1 + torch.rand(512, 32, generator=draw)
        return (active * size) @ directions

    share = {}
    for limit in (1.0, 0.4):
        fields = plain(d_in=32, d_sae=128, k=3, dense_share_limit=limit, firing_rate_decay=0.8)
        sae = make(**fields)
        train(sae, 250, batch=tokens)
        sae.calibrate_threshold([tokens(1000 + n) for n in range(4)])
        sae.eval()
        with torch.no_grad():
            fired = (sae.encode(torch.cat([tokens(2000 + n) for n in range(4)])) > 0).float()
        assert abs(float(fired.sum(-1).mean()) - 3) < 0.15
        rates = fired.mean(0)
        dense = rates > 8 * 3 / 128  # eight times the mean rate, here above a tenth
        share[limit] = float(rates[dense].sum() / rates.sum())
    assert share[1.0] > 0.5
    assert share[0.4] < 0.5


def test_an_allowance_shrinks_with_the_threshold() -> None:
    floor = FiringFloor(1, torch.device("cpu"))
    floor.allowance.fill_(2.0)
    floor.follow(torch.zeros(1), floor=0.02, threshold=torch.tensor(0.5), rate=0.1)
    assert float(floor.allowance) == 0.5


def test_a_latent_that_hardly_fires_fires_again() -> None:
    """A latent pushed under the cut by its bias, without AuxK and with the weights at rest."""
    fired = {}
    for name, share in (("without", 0.0), ("with", 0.5)):
        sae = make(
            **plain(
                d_in=8,
                d_sae=24,
                firing_floor=share,
                firing_floor_rate=0.02,
                firing_rate_decay=0.8,
                aux_loss_coefficient=0.0,
            )
        )
        with torch.no_grad():
            # Positive on about a quarter of the tokens, and never among the largest.
            sae.W_enc[:, 0] *= 0.2
            sae.b_enc[0] -= (activations(512, 8, 0) @ sae.W_enc[:, 0]).quantile(0.75)
        train(sae, 100, lr=0.0)
        sae.calibrate_threshold([activations(512, 8, step) for step in range(3)])
        sae.eval()
        with torch.no_grad():
            latents = torch.cat([sae.encode(activations(512, 8, s)) for s in range(77, 81)]) > 0
        fired[name] = float(latents[:, 0].float().mean())
        assert abs(float(latents.sum(-1).float().mean()) - 3) < 0.3
    floor = 0.5 * 3 / 24
    assert fired["without"] < floor / 50
    assert floor / 2 < fired["with"] < 2 * floor


def test_thresholds_never_fall_below_zero_and_only_for_the_rare() -> None:
    sae = make(**plain(d_in=8, d_sae=24, firing_floor=0.5, firing_floor_rate=0.05))
    train(sae, 60)
    threshold = sae.threshold()
    assert threshold.shape == (24,)
    assert float(threshold.min()) >= 0
    frequent = sae.firing_rate > 1.5 * 0.5 * 3 / 24
    assert frequent.any()
    torch.testing.assert_close(
        threshold[frequent], sae.topk_threshold.expand(int(frequent.sum())), rtol=0.2, atol=0.0
    )


def test_thresholds_by_hand() -> None:
    pre = torch.tensor([[1.0, -1.0, 0.5], [3.0, -2.0, 0.1], [2.0, 4.0, -0.3], [0.0, -3.0, -0.2]])
    # A quarter of four tokens is one; a thousandth below it, and at least zero.
    found = thresholds_at_rate(pre.split(3), lambda batch: batch, 0.25)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([3.0, 4.0, 0.5]) * 1023 / 1024)
    found = thresholds_at_rate(pre.split(1), lambda batch: batch, 0.6)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0, 0.1]) * 1023 / 1024)
    assert thresholds_at_rate(pre.split(3), lambda batch: batch, 0.24) is None


def test_rounding_does_not_decide_about_equal_tokens() -> None:
    """Multiples of a few vectors, which a layer norm makes equal but for rounding."""
    generator = torch.Generator().manual_seed(0)
    sae = make(**plain(d_in=8, d_sae=24, firing_floor=0.2, norm_scales=[1.0], norm_eps=1e-12))
    kinds = torch.randn(12, 8, generator=generator)
    sizes = 1 + torch.rand(400, 1, generator=generator)
    x = kinds[torch.randint(12, (400,), generator=generator)] * sizes
    sae.calibrate_threshold([x])
    sae.eval()
    with torch.no_grad():
        rare = (sae.threshold() > 0) & (sae.threshold() < sae.topk_threshold)
        hidden_pre = sae.encode_with_hidden_pre(x)[1][:, rare]
    assert rare.any()
    assert float((hidden_pre / sae.threshold()[rare] - 1).abs().amin()) > 1e-4


def test_tokens_that_are_all_alike_leave_the_floor_out() -> None:
    sae = make(**plain(d_in=8, d_sae=24, firing_floor=0.9))
    report = sae.calibrate_threshold([activations(1, 8, 0).expand(100, 8)])
    assert math.isfinite(report["threshold"])
    assert sae.threshold().isfinite().all()


@given(
    share=st.floats(0.05, 0.95),
    k=st.floats(1, 8),
    splits=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_calibration_leaves_no_latent_below_the_floor(
    share: float, k: float, splits: int, seed: int
) -> None:
    wanted = int(share * k / 24 * 400)
    assume(wanted > 0)
    sae = make(**plain(d_in=8, d_sae=24, k=k, firing_floor=share))
    x = activations(400, 8, seed)
    with torch.no_grad():
        sae.b_enc[::3] -= 1.0
        sae.mechanisms.firing_floor.allowance.uniform_()  # whatever training left
    sae.calibrate_threshold(x.chunk(splits))
    sae.eval()
    with torch.no_grad():
        fired = sae.encode(x) > 0
        positive = sae.encode_with_hidden_pre(x)[1] > 0
    assert (fired.sum(0) >= positive.sum(0).clamp(max=wanted)).all()
    assert int(fired.sum()) == min(round(k * 400), int(positive.sum()))
    # Well above the floor one cut serves all.
    above = fired.sum(0) > 1.2 * wanted + 1
    threshold = sae.threshold()[above]
    torch.testing.assert_close(threshold, sae.topk_threshold.expand_as(threshold))


def test_too_few_tokens_leave_what_training_found() -> None:
    sae = make(**plain(d_in=8, d_sae=24, firing_floor=0.5))
    train(sae, 20)
    before = sae.mechanisms.firing_floor.allowance.clone()
    assert before.any()
    sae.calibrate_threshold([activations(10, 8, 0)])
    assert torch.equal(sae.mechanisms.firing_floor.allowance, before)
