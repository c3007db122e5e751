"""Edge cases with defined behaviour: sizes, strange batches, schedules, calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from steps import EVERYTHING, activations, make, plain, step_input, to_export_units, train

from msae_plugin import MultiScaleTrainingSAE, RunFailure
from msae_plugin.architecture.mechanisms.normalisation import MultiScaleNormalisation
from msae_plugin.architecture.selection import batch_top_k


def assert_finite_step(
    sae: MultiScaleTrainingSAE, x: torch.Tensor, step: int = 0, dead: torch.Tensor | None = None
) -> None:
    sae.train()
    sae.zero_grad()
    output = sae.training_forward_pass(step_input(x, step, dead, sae.cfg.l1_coefficient))
    for name, loss in output.losses.items():
        assert torch.isfinite(loss), name
    output.loss.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for name, buffer in sae.named_buffers():
        assert torch.isfinite(buffer.float()).all(), name


FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": plain(d_in=8, d_sae=24),
    "default": {"d_in": 8, "d_sae": 24, "k": 3},
    "everything": {"d_in": 8, "d_sae": 24, "k": 3, **EVERYTHING},
    "z-score": plain(d_in=8, d_sae=24, selection="zscore", zscore_z_lr=0.01, norm_scales=[1.0]),
    "firing floor": plain(d_in=8, d_sae=24, firing_floor=0.8, firing_floor_rate=0.1),
    "absolute eps": plain(d_in=8, d_sae=24, norm_scales=[0.5, 1.0], norm_gate=True),
}


def massive() -> torch.Tensor:
    """Ordinary tokens of norm about 140, and one of 25,000."""
    x = activations(32, 8, 0)
    x = 140 * x / x.norm(dim=1, keepdim=True)
    x[7] *= 25_000 / 140
    return x


BATCHES = {
    "zeros": torch.zeros(32, 8),
    "constant": torch.full((32, 8), 3.7),
    "one token": activations(1, 8, 0),
    "equal tokens": activations(1, 8, 0).expand(32, 8).clone(),
    "massive token": massive(),
    "tiny": 1e-12 * activations(32, 8, 0),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_strange_batches_are_finite(flavour: str, batch: str) -> None:
    sae = make(**FLAVOURS[flavour])
    dead = torch.zeros(24, dtype=torch.bool)
    dead[:4] = True
    x = BATCHES[batch]
    assert_finite_step(sae, x, 0, dead)
    train(sae, 6, batch=lambda step: x, l1=sae.cfg.l1_coefficient)
    assert_finite_step(sae, x, 6, dead)
    sae.eval()
    with torch.no_grad():
        assert torch.isfinite(sae(x)).all()
        assert torch.isfinite(sae.encode(torch.zeros(2, 8))).all()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_nan_batch_is_visible_in_the_loss(flavour: str) -> None:
    sae = make(**FLAVOURS[flavour])
    train(sae, 2, l1=sae.cfg.l1_coefficient)
    x = activations(32, 8, 0)
    x[3, 2] = float("nan")
    output = sae.train().training_forward_pass(step_input(x, 2, None, sae.cfg.l1_coefficient))
    assert torch.isnan(output.loss)


def test_one_massive_token_does_not_take_the_whole_budget() -> None:
    """Why [N] exists: without it the massive token wins every place of the batch."""
    x = massive()
    shares = {}
    for name, scales in (("none", []), ("layer", [1.0])):
        sae = make(**plain(d_in=8, d_sae=24, norm_scales=scales)).train()
        with torch.no_grad():
            active = sae.encode(x) > 0
        shares[name] = float(active[7].sum() / active.sum())
    assert shares["layer"] < 0.1
    assert shares["none"] > shares["layer"]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("d_sae", [1, 2, 97])
def test_any_width_trains_and_exports(flavour: str, d_sae: int, tmp_path: Path) -> None:
    fields = {**FLAVOURS[flavour], "d_sae": d_sae, "k": min(3, d_sae)}
    sae = make(**fields)
    train(sae, 7, l1=sae.cfg.l1_coefficient)
    assert_finite_step(sae, activations(16, 8, 1), 8)
    sae.eval()
    sae.save_inference_model(tmp_path)
    x = activations(16, 8, 2)
    loaded = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        latents = to_export_units(sae, sae.encode(x))
        assert latents.shape == (16, d_sae)
        torch.testing.assert_close(loaded.encode(x), latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["default", "everything"])
def test_one_input_dimension_works(fields: dict[str, Any]) -> None:
    sae = make(d_in=1, d_sae=5, k=2, **{**fields, "norm_centre": False})
    dead = torch.tensor([True, False, False, False, True])
    assert_finite_step(sae, torch.randn(9, 1), 0, dead)


def test_k_may_exceed_what_a_prefix_holds() -> None:
    sae = make(d_in=8, d_sae=40, k=30, prefix_fractions=[1 / 40, 0.1], sparsity_scales=[2.0, 8.0])
    assert sae.cfg.prefix_widths == [1, 4, 40]
    x = activations(16, 8, 0)
    output = sae.train().training_forward_pass(step_input(x, 0))
    positive = int((output.hidden_pre > 0).sum())
    assert int((output.feature_acts > 0).sum()) == min(30 * 16, positive)
    assert_finite_step(sae, x)
    # Every budget beyond the positive entries selects all of them: the same reconstruction.
    assert output.losses["mse_loss_at_8k"].item() == pytest.approx(
        0.25 * float(output.losses["mse_loss"]), rel=1e-5
    )


def test_k_falls_linearly_and_stays() -> None:
    sae = make(**plain(d_sae=60, k=3, k_initial_multiplier=4.0, k_anneal_steps=8))
    outputs = train(sae, 12)
    measured = [float((o.feature_acts > 0).sum()) / 64 for o in outputs]
    expected = [3 + 9 * max(0.0, 1 - step / 8) for step in range(12)]
    assert measured == pytest.approx(expected, abs=1 / 64)
    assert [o.metrics["k"] for o in outputs] == pytest.approx(expected)


def test_annealed_threshold_forgets_the_annealing() -> None:
    sae = make(**plain(d_sae=60, k=3, k_initial_multiplier=4.0, k_anneal_steps=20))
    outputs = train(sae, 50)
    cuts = [float(o.feature_acts[o.feature_acts > 0].min()) for o in outputs]
    assert float(outputs[10].metrics["topk_threshold"]) == pytest.approx(cuts[10], rel=1e-4)
    since = cuts[20:]
    assert float(sae.topk_threshold) == pytest.approx(sum(since) / len(since), rel=1e-4)
    assert sum(cuts[:20]) / 20 < 0.7 * sum(since) / len(since)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(st.floats(0.0, 3.0), st.floats(0.2, 6), st.integers(1, 20), st.integers(0, 99))
def test_a_guess_of_the_cut_never_changes_the_ranking(
    guess: float, k: float, n_tokens: int, seed: int
) -> None:
    pre = torch.randn(n_tokens, 11, generator=torch.Generator().manual_seed(seed))
    exact = batch_top_k(pre, pre, k, [0.5, 2.0])
    short = batch_top_k(pre, pre, k, [0.5, 2.0], guess)

    def pairs(found: Any) -> list[tuple[int, ...]]:
        columns = (found.tokens, found.latents, found.levels)
        return sorted(zip(*(c.tolist() for c in columns), strict=True))

    assert pairs(short) == pairs(exact)
    assert torch.equal(short.threshold, exact.threshold)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_zero_decoder_row_folds_without_nan(rescale: bool, tmp_path: Path) -> None:
    sae = make(**plain(rescale_acts_by_decoder_norm=rescale))
    train(sae, 3)
    with torch.no_grad():
        sae.W_dec[4] = 0
    assert_finite_step(sae, activations(16, 6, 0), 3)
    sae.eval()
    x = activations(16, 6, 1)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    with torch.no_grad():
        assert loaded.encode(x)[:, 4].abs().max() < 1e-6
        torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-5)
        loaded.fold_W_dec_norm()
        torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-5)


def test_zero_decoder_initial_norm_trains() -> None:
    assert_finite_step(make(**plain(decoder_init_norm=1e-9)), activations(16, 6, 0))


@pytest.mark.parametrize("flavour", ["plain", "default", "z-score", "everything"])
def test_calibration_reaches_k(flavour: str) -> None:
    fields = {**FLAVOURS[flavour], "revival_every": 0}
    sae = make(**fields)
    train(sae, 20, l1=sae.cfg.l1_coefficient)
    sae.eval()
    batches = [activations(n, 8, 300 + n) for n in (64, 64, 64)]
    report = sae.calibrate_threshold(iter(batches))

    def l0() -> float:
        with torch.no_grad():
            return float((sae.encode(torch.cat(batches)) > 0).sum(-1).float().mean())

    assert report["l0_after"] == pytest.approx(l0(), rel=1e-5)
    assert l0() == pytest.approx(3, abs=0.02)
    assert not sae.training


def test_calibration_weighs_batches_by_their_tokens() -> None:
    sae = make(**plain(d_in=8, d_sae=24))
    train(sae, 20)
    sae.eval()
    batches = [activations(300, 8, 1), 3 * activations(10, 8, 2)]
    report = sae.calibrate_threshold(batches)
    with torch.no_grad():
        l0 = (sae.encode(torch.cat(batches)) > 0).sum(-1).float().mean()
    assert float(l0) == pytest.approx(3, abs=0.02)
    assert report["l0_after"] == pytest.approx(float(l0), rel=1e-4)


@pytest.mark.parametrize("flavour", ["plain", "standardised", "floor", "z-score"])
def test_calibration_admits_everything_positive_when_k_exceeds_it(flavour: str) -> None:
    fields = {
        "plain": {},
        "standardised": {"standardise": 1.0},
        "floor": {"firing_floor": 0.9, "firing_floor_rate": 0.5},
        "z-score": {"selection": "zscore", "zscore_z_lr": 0.1},
    }[flavour]
    sae = make(**plain(k=13, **fields))
    train(sae, 5)
    sae.eval()
    x = activations(64, 6, 9)
    sae.calibrate_threshold([x])
    with torch.no_grad():
        acts, hidden_pre = sae.encode_with_hidden_pre(x)
    assert int((acts > 0).sum()) >= int((hidden_pre > 0).sum()) - 1


def test_calibration_without_batches_is_refused() -> None:
    with pytest.raises(RunFailure, match="at least one batch"):
        make(**plain()).calibrate_threshold([])


def test_fixed_z_is_not_calibrated_away() -> None:
    sae = make(**plain(selection="zscore", zscore_z=1.5))
    train(sae, 5)
    sae.calibrate_threshold([activations(64, 6, 9)])
    assert sae.mechanisms.statistics is not None
    assert float(sae.mechanisms.statistics.z) == 1.5


def test_z_corrects_itself_towards_the_target() -> None:
    sae = make(**plain(d_sae=60, k=3, selection="zscore", zscore_z=0.0, zscore_z_lr=0.05))
    outputs = train(sae, 150, lr=1e-4)
    l0 = [float((o.feature_acts > 0).sum()) / 64 for o in outputs]
    assert l0[0] > 12
    assert sum(l0[-30:]) / 30 == pytest.approx(3, rel=0.2)


def test_z_of_two_fires_a_fixed_share() -> None:
    """The source's rule: about 2.3 % of the dictionary whatever the data."""
    sae = make(**plain(d_in=32, d_sae=400, k=9, selection="zscore", zscore_z=2.0)).train()
    with torch.no_grad():
        x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
        output = sae.training_forward_pass(step_input(x, 0))
    assert float((output.feature_acts > 0).float().mean()) == pytest.approx(0.0228, rel=0.05)


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0]), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["absolute", "relative"]),
    st.integers(0, 9),
)
def test_normalisation_can_be_undone(
    scales: list[float], centre: bool, mode: str, seed: int
) -> None:
    """scale(x) x_hat is the centred token when gain and bias are neutral."""
    cfg = make(
        **plain(norm_scales=scales, norm_centre=centre, norm_eps_mode=mode, norm_eps=0.1)
    ).cfg
    module = MultiScaleNormalisation(cfg, torch.float32, torch.device("cpu"))
    x = activations(10, 6, seed)
    module.update_running_variance(x, 1.0)
    with torch.no_grad():
        x_hat, scale = module(x)
    expected = x - x.mean(-1, keepdim=True) if centre else x
    torch.testing.assert_close(scale * x_hat, expected, rtol=1e-4, atol=1e-5)
    assert scale.shape == (10, 1)


def test_normalisation_makes_latents_equivariant_to_the_norm() -> None:
    sae = make(**plain(norm_scales=[0.5, 1.0], norm_eps=1e-12))
    train(sae, 10)
    sae.eval()
    x = activations(10, 6, 3)
    with torch.no_grad():
        b_dec = sae.b_dec
        doubled = sae.encode(b_dec + 2 * (x - b_dec))
        torch.testing.assert_close(doubled, 2 * sae.encode(x), rtol=1e-4, atol=1e-5)


def test_skip_is_in_forward_only() -> None:
    sae = make(**plain(skip_scale=0.25))
    train(sae, 3)
    sae.eval()
    x = activations(5, 6, 0)
    with torch.no_grad():
        without = sae.decode(sae.encode(x))
        torch.testing.assert_close(sae(x), without + 0.25 * (x - sae.b_dec))


def test_memory_of_the_run_is_in_the_state_dict() -> None:
    """Nothing that decides the next step lives outside: a copy by state dict goes on equally."""
    sae = make(d_in=8, d_sae=24, k=3, **EVERYTHING)
    train(sae, 9, l1=0.1)
    other = make(seed=77, d_in=8, d_sae=24, k=3, **EVERYTHING)
    other.load_state_dict(sae.state_dict())
    for step in range(9, 14):
        torch.manual_seed(step)
        a = train(sae, 1, first_step=step, l1=0.1)[0]
        torch.manual_seed(step)
        b = train(other, 1, first_step=step, l1=0.1)[0]
        assert torch.equal(a.loss, b.loss), step
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_dead_latents_get_gradient_from_auxk_alone() -> None:
    sae = make(**plain())
    with torch.no_grad():
        sae.b_enc[5] = -1e3
    dead = torch.zeros(13, dtype=torch.bool)
    dead[5] = True
    x = activations(16, 6, 0)
    sae.train().training_forward_pass(step_input(x, 0, None)).loss.backward()
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad[5].abs().sum() == 0
    sae.zero_grad()
    sae.training_forward_pass(step_input(x, 0, dead)).loss.backward()
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad[5].abs().sum() > 0


def test_the_bias_has_the_same_gradient_by_one_product_as_token_by_token() -> None:
    # Inputs that want a gradient themselves take the way through every token.
    by_product, by_token = (make(**plain(dtype="float64")).train() for _ in range(2))
    x = activations(32, 6, 0, torch.float64)
    by_product.training_forward_pass(step_input(x, 1)).loss.backward()
    by_token.training_forward_pass(step_input(x.clone().requires_grad_(), 1)).loss.backward()
    for (name, p), q in zip(by_product.named_parameters(), by_token.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q.grad, atol=1e-12, rtol=1e-10, msg=name)
