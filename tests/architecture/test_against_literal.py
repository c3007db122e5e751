"""Losses and gradients of the package against the equations written out in `literal.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from literal import LiteralSAE
from steps import activations, make, plain, step_input

from msae_plugin import MultiScaleTrainingSAE

N_STEPS = 4


def compare(
    sae: MultiScaleTrainingSAE,
    *,
    n_tokens: int = 7,
    seed: int = 0,
    with_dead: bool = False,
    rtol: float = 1e-9,
    n_steps: int = N_STEPS,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Take steps with both, comparing every loss term and every gradient at each."""
    cfg = sae.cfg
    literal = LiteralSAE(cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(seed)
    for step in range(n_steps):
        sae.train()
        x = activations(n_tokens, cfg.d_in, 100 * seed + step, torch.float64)
        dead = torch.rand(cfg.d_sae, generator=generator) < 0.4 if with_dead else None
        literal.read_parameters(sae)
        given_x = x if shape is None else x.reshape(*shape, cfg.d_in)
        output = sae.training_forward_pass(step_input(given_x, step, dead, cfg.l1_coefficient))
        literal.accept_rings(sae.latent_group.tolist(), step)
        expected = literal.loss(x, step, dead, cfg.l1_coefficient)
        torch.stack(list(expected.values())).sum().backward()
        optimizer.zero_grad()
        output.loss.backward()

        assert set(output.losses) == set(expected), step
        for name, value in expected.items():
            torch.testing.assert_close(
                output.losses[name].detach().double(),
                value.detach(),
                rtol=rtol,
                atol=rtol,
                msg=lambda text, name=name, step=step: f"{name} at step {step}: {text}",
            )
        total = torch.stack(list(expected.values())).sum().detach()
        torch.testing.assert_close(output.loss.detach(), total, rtol=rtol, atol=rtol)
        gradients = literal.gradients()
        largest = max(float(g.abs().max()) for g in gradients.values())
        for name, parameter in sae.named_parameters():
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(
                got,
                gradients[name],
                rtol=100 * rtol,
                atol=rtol * max(largest, 1.0),
                msg=lambda text, name=name, step=step: f"d/d {name} at step {step}: {text}",
            )
        optimizer.step()


CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "not rescaled": {"rescale_acts_by_decoder_norm": False},
    "two more budgets": {"sparsity_scales": [0.5, 2.0]},
    "four budgets above k": {"sparsity_scales": [4.0, 1.5, 2.0, 3.0], "sparsity_scale_weight": 0.7},
    "prefixes": {"prefix_fractions": [0.2, 0.5], "prefix_sort_every": 0},
    "prefixes re-sorted": {"prefix_fractions": [0.2, 0.5], "prefix_sort_every": 2},
    "prefixes detached": {
        "prefix_fractions": [0.2, 0.5],
        "prefix_sort_every": 2,
        "detach_inner_prefixes": True,
        "prefix_weight": 0.3,
    },
    "prefixes detached and budgets": {
        "prefix_fractions": [0.2, 0.5],
        "prefix_sort_every": 1,
        "detach_inner_prefixes": True,
        "sparsity_scales": [0.5, 2.0],
    },
    "k annealed": {"k_anneal_steps": 3, "k_initial_multiplier": 3.0},
    "L1": {"l1_coefficient": 0.3},
    "L1 not rescaled": {"l1_coefficient": 0.3, "rescale_acts_by_decoder_norm": False},
    "skip": {"skip_scale": 0.1},
    "unit decoder": {"unit_norm_decoder": True, "input_normalization": "first_batch"},
    "source initialisation": {"weight_init": "inverse_sqrt_d", "decoder_init_norm": None},
}
# Statistics are kept in float32 whatever the weights: their rounding reaches the losses.
FLOAT32_CASES: dict[str, dict[str, Any]] = {
    "z-score": {"selection": "zscore", "zscore_z": 0.3},
    "z-score that corrects itself": {"selection": "zscore", "zscore_z": 0.3, "zscore_z_lr": 0.2},
    "half standardised": {"standardise": 0.5},
    "fully standardised": {"standardise": 1.0, "sparsity_scales": [2.0]},
    "firing floor": {"firing_floor": 0.7, "firing_floor_rate": 0.3, "sparsity_scales": [2.0]},
    "dense share": {"dense_share_limit": 0.4, "firing_floor_rate": 0.3, "k": 0.2},
    "dense share of a high L0": {
        "dense_share_limit": 0.1,
        "firing_floor_rate": 0.3,
        "d_sae": 40,
        "k": 1,
    },
    "dense share and floor": {
        "k": 0.2,
        "dense_share_limit": 0.6,
        "firing_floor": 0.7,
        "firing_floor_rate": 0.2,
        "sparsity_scales": [2.0],
    },
    "firing floor, k annealed": {
        "firing_floor": 0.9,
        "firing_floor_rate": 0.5,
        "k_anneal_steps": 3,
        "k_initial_multiplier": 2.0,
        "rescale_acts_by_decoder_norm": False,
    },
    "OrtSAE's penalty": {
        "orthogonality_coefficient": 0.3,
        "orthogonality_pairs": "chunks",
        "orthogonality_weighting": "none",
    },
    "penalty every second step": {
        "orthogonality_coefficient": 0.3,
        "orthogonality_pairs": "chunks",
        "orthogonality_weighting": "none",
        "orthogonality_every": 2,
    },
    "neighbours unweighted": {
        "orthogonality_coefficient": 0.3,
        "orthogonality_weighting": "none",
        "neighbour_count": 4,
    },
    "all pairs by co-activation": {"orthogonality_coefficient": 3.0, "neighbour_count": 12},
    "four neighbours by co-activation": {
        "orthogonality_coefficient": 3.0,
        "neighbour_count": 4,
        "neighbour_refresh_every": 99,
        "orthogonality_tau": 0.02,
    },
    "aligned encoder": {"aligned_encoder": True},
    "aligned encoder not rescaled": {
        "aligned_encoder": True,
        "unit_norm_decoder": True,
        "rescale_acts_by_decoder_norm": False,
    },
    "importance": {"importance_power": 0.5, "l1_coefficient": 0.2},
    "importance not rescaled": {
        "importance_power": 1.0,
        "l1_coefficient": 0.2,
        "rescale_acts_by_decoder_norm": False,
    },
    "layer norm": {"norm_scales": [1.0]},
    "root mean square": {"norm_scales": [1.0], "norm_centre": False, "norm_affine": False},
    "four scales": {"norm_scales": [0.1, 0.5, 1.0, 2.0]},
    "four scales, relative eps": {
        "norm_scales": [0.1, 0.5, 1.0, 2.0],
        "norm_eps": 0.2,
        "norm_eps_mode": "relative",
    },
    "gate": {"norm_scales": [0.5, 1.0], "norm_gate": True, "norm_affine": False},
    "attention": {
        "norm_scales": [0.1, 1.0],
        "norm_eps": 0.2,
        "norm_eps_mode": "relative",
        "norm_gate": True,
        "norm_attention": True,
        "attention_d_key": 3,
    },
}


def randomised(sae: MultiScaleTrainingSAE, seed: int = 5) -> MultiScaleTrainingSAE:
    """Parameters away from the zeros and ones at which gradients of some mechanisms vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.3 * noise)
    return sae


@pytest.mark.promise("The SAE computes the equations of docs/method.md.")
@pytest.mark.parametrize("with_dead", [False, True], ids=["all alive", "some dead"])
@pytest.mark.parametrize("name", CASES)
def test_float64_mechanisms_match_the_equations(name: str, with_dead: bool) -> None:
    sae = randomised(make(dtype="float64", **plain(**CASES[name])))
    compare(sae, with_dead=with_dead)


@pytest.mark.parametrize("name", FLOAT32_CASES)
def test_mechanisms_with_float32_statistics_match_the_equations(name: str) -> None:
    sae = randomised(make(dtype="float64", **plain(**FLOAT32_CASES[name])))
    compare(sae, with_dead=True, rtol=2e-6)
    if "dense share" in name:
        floor = sae.mechanisms.firing_floor
        assert floor is not None
        assert float(floor.allowance.min()) < 0, "the limit never acted"


def test_tokens_of_a_3d_batch_are_tokens() -> None:
    sae = randomised(make(dtype="float64", **plain(sparsity_scales=[2.0], prefix_fractions=[0.3])))
    compare(sae, n_tokens=12, shape=(3, 4))


@st.composite
def random_fields(draw: st.DrawFn) -> dict[str, Any]:
    d_sae = draw(st.integers(2, 11))
    batchtopk = draw(st.booleans())
    n_scales = draw(st.integers(0, 3))
    share = st.floats(0.05, 0.95)
    fields: dict[str, Any] = {
        "d_in": draw(st.integers(2, 5)),
        "d_sae": d_sae,
        "k": draw(st.floats(0.3, d_sae)),
        "rescale_acts_by_decoder_norm": draw(st.booleans()),
        "aux_loss_coefficient": draw(st.sampled_from([0.0, 1.0])),
        "selection": "batchtopk" if batchtopk else "zscore",
        "standardise": draw(st.sampled_from([0.0, 0.3, 1.0])) if batchtopk else 0.0,
        "firing_floor": draw(st.sampled_from([0.0, 0.5])) if batchtopk else 0.0,
        "dense_share_limit": draw(st.sampled_from([1.0, 0.5])) if batchtopk else 1.0,
        "zscore_z": draw(st.floats(-1, 1.5)),
        "zscore_z_lr": draw(st.sampled_from([0.0, 0.1])),
        "sparsity_scales": draw(st.lists(st.sampled_from([0.25, 0.5, 2.0, 4.0]), unique=True))
        if batchtopk
        else [],
        "prefix_fractions": draw(st.lists(share, max_size=3)),
        "prefix_sort_every": draw(st.integers(0, 3)),
        "detach_inner_prefixes": draw(st.booleans()),
        "prefix_weight": draw(st.sampled_from([0.25, 1.0])),
        "l1_coefficient": draw(st.sampled_from([0.0, 0.2])),
        "aligned_encoder": draw(st.booleans()),
        "importance_power": draw(st.sampled_from([0.0, 0.5])),
        "skip_scale": draw(st.sampled_from([0.0, 0.1])),
        "orthogonality_coefficient": draw(st.sampled_from([0.0, 0.5])),
        "orthogonality_pairs": "neighbours",
        "orthogonality_weighting": draw(st.sampled_from(["none", "coactivation"])),
        "neighbour_count": draw(st.integers(1, 12)),
        "neighbour_refresh_every": draw(st.sampled_from([1, 99])),
        "norm_scales": [0.5, 1.0, 2.0][:n_scales],
        "norm_eps": 0.05,
        "norm_eps_mode": draw(st.sampled_from(["absolute", "relative"])),
        "norm_centre": draw(st.booleans()),
        "norm_affine": draw(st.booleans()),
        "norm_gate": n_scales > 0 and draw(st.booleans()),
        "norm_attention": n_scales > 1 and draw(st.booleans()),
    }
    if fields["standardise"]:
        fields["firing_floor"] = 0.0
        fields["dense_share_limit"] = 1.0
    # Two coordinates that are centred and divided by their deviation are (1, -1) or (-1, 1): tokens
    # tie but for rounding.
    if n_scales and fields["norm_centre"]:
        fields["d_in"] = max(3, fields["d_in"])
    # Neighbours that are searched anew start their co-activation afresh; the full matrix of the
    # reference does not. With all pairs listed both are the same.
    if fields["neighbour_refresh_every"] == 1:
        fields["neighbour_count"] = 12
    # One token is its own mean and two are one deviation away: z-scores that tie but for rounding.
    statistics = fields["selection"] == "zscore" or fields["standardise"] > 0
    fields["n_tokens"] = draw(st.integers(3 if statistics else 1, 8))
    return fields


@pytest.mark.promise("The SAE computes the equations of docs/method.md.")
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(random_fields(), st.integers(0, 3), st.booleans())
def test_any_combination_matches_the_equations(
    fields: dict[str, Any], seed: int, with_dead: bool
) -> None:
    n_tokens = fields.pop("n_tokens")
    sae = randomised(make(dtype="float64", **fields), seed)
    compare(sae, n_tokens=n_tokens, seed=seed, with_dead=with_dead, rtol=2e-5, n_steps=3)
