"""Configurations: what is refused and how, and that every field does something."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from steps import activations, make, plain, train

from msae_plugin import (
    InputError,
    MultiScaleSAEConfig,
    MultiScaleTrainingSAEConfig,
    preset,
    preset_names,
    preset_summary,
)

BASE: dict[str, Any] = {"d_in": 6, "d_sae": 40, "k": 3}
NAN, INF = float("nan"), float("inf")

IMPOSSIBLE: dict[str, list[Any]] = {
    "d_in": [0],
    "d_sae": [0],
    "k": [0, -1, NAN],
    "k_initial_multiplier": [0.5, NAN],
    "k_anneal_steps": [-1],
    "topk_threshold_lr": [0, 1.5],
    "weight_init": ["normal"],
    "input_normalization": ["median"],
    "aux_loss_coefficient": [-1, NAN, INF],
    "l1_coefficient": [-0.1],
    "l1_warm_up_steps": [-1],
    "sparsity_scales": [[0.0], [1.0], [-2.0], [2.0, 2.0], [INF]],
    "sparsity_scale_weight": [-1],
    "prefix_fractions": [[0.0], [1.0], [NAN]],
    "prefix_weight": [-1],
    "prefix_sort_every": [-1],
    "firing_rate_decay": [1.0],
    "selection": ["topk"],
    "standardise": [1.1],
    "firing_floor": [1.0, -0.1],
    "firing_floor_rate": [INF],
    "dense_share_limit": [1.1, NAN],
    "zscore_z": [INF],
    "zscore_z_lr": [-1],
    "statistics_decay": [-0.1, 1.0, 2],
    "orthogonality_coefficient": [-1],
    "orthogonality_pairs": ["all"],
    "orthogonality_weighting": ["cosine"],
    "sketch_rank": [-1],
    "orthogonality_tau": [2.0],
    "orthogonality_chunk_size": [0],
    "orthogonality_every": [0],
    "neighbour_count": [0],
    "neighbour_refresh_every": [0],
    "revival_every": [-1],
    "revival_dead_steps": [0],
    "revival_min_cosine": [1.5],
    "revival_max_fraction": [0],
    "revival_survival_steps": [0],
    "importance_power": [-1],
    "norm_scales": [[0.0], [1.0, NAN]],
    "norm_eps": [0],
    "norm_eps_mode": ["auto"],
    "norm_attention": [True],
    "norm_gate": [True],
    "attention_d_key": [0],
    "skip_scale": [1.0, -0.1],
    "normalize_activations": ["layer_norm"],
}
# Values that others make impossible.
TOGETHER: list[tuple[str, dict[str, Any]]] = [
    (
        "k_initial_multiplier",
        {"selection": "zscore", "k_initial_multiplier": 2, "sparsity_scales": []},
    ),
    ("sparsity_scales", {"selection": "zscore", "sparsity_scales": [2.0]}),
    (
        "prefix_weight",
        {"prefix_fractions": [0.5], "prefix_weight": 0.0, "detach_inner_prefixes": True},
    ),
    ("standardise", {"standardise": 0.5, "selection": "zscore", "sparsity_scales": []}),
    ("firing_floor", {"firing_floor": 0.1, "standardise": 0.5}),
    ("firing_floor", {"firing_floor": 0.1, "selection": "zscore", "sparsity_scales": []}),
    ("dense_share_limit", {"firing_floor": 0.0, "standardise": 0.5}),
    ("sketch_rank", {"orthogonality_coefficient": 1.0, "orthogonality_weighting": "coactivation"}),
    ("norm_attention", {"norm_attention": True, "norm_scales": [1.0]}),
    (
        "normalize_activations",
        {"normalize_activations": "covariance_whitening", "norm_scales": [1.0]},
    ),
]
REFUSED = [
    (name, {name: value}) for name, values in IMPOSSIBLE.items() for value in values
] + TOGETHER


@pytest.mark.parametrize(
    ("name", "values"), REFUSED, ids=[f"{n}-{i}" for i, (n, _) in enumerate(REFUSED)]
)
def test_impossible_settings_are_refused_in_one_line(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as info:
        MultiScaleTrainingSAEConfig(**{**BASE, **values})
    message = str(info.value)
    assert message.startswith(name)
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("values", [v for n, v in REFUSED if n.startswith(("norm", "skip"))])
def test_inference_configs_are_checked_too(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        MultiScaleSAEConfig(d_in=6, d_sae=40, **values)


def test_three_fields_are_enough() -> None:
    cfg = MultiScaleTrainingSAEConfig(d_in=6, d_sae=40, k=3)
    assert cfg.sparsity_scales == [2.0]
    assert cfg.prefix_widths == [40]


def test_lists_are_not_shared_between_configs() -> None:
    a, b = MultiScaleTrainingSAEConfig(**BASE), MultiScaleTrainingSAEConfig(**BASE)
    a.sparsity_scales.append(9.0)
    assert b.sparsity_scales == [2.0]
    first = preset("nested", **BASE, training_steps=10)
    first.prefix_fractions.clear()
    assert preset("nested", **BASE, training_steps=10).prefix_fractions


@settings(max_examples=40)
@given(
    st.integers(1, 500),
    st.lists(st.floats(0.001, 0.999), max_size=6),
)
def test_prefix_widths_ascend_to_the_whole_dictionary(d_sae: int, shares: list[float]) -> None:
    cfg = MultiScaleTrainingSAEConfig(d_in=2, d_sae=d_sae, k=1, prefix_fractions=shares)
    widths = cfg.prefix_widths
    assert widths[-1] == d_sae
    assert widths == sorted(set(widths))
    assert widths[0] >= 1


@pytest.mark.parametrize("name", preset_names())
def test_configs_survive_json(name: str) -> None:
    cfg = preset(name, **BASE, training_steps=100)
    again = TrainingSAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg
    exported = json.loads(json.dumps(cfg.get_inference_sae_cfg_dict()))
    inference = SAEConfig.from_dict(exported)
    assert isinstance(inference, MultiScaleSAEConfig)
    assert SAEConfig.from_dict(json.loads(json.dumps(inference.to_dict()))) == inference
    shared = {f.name for f in fields(MultiScaleSAEConfig)}
    assert shared <= {f.name for f in fields(MultiScaleTrainingSAEConfig)}


# ---- every field does something ----------------------------------------------------------------

# For each field a base in which it matters, and a value that differs.
PENALTY = {
    "orthogonality_coefficient": 3.0,
    "orthogonality_pairs": "neighbours",
    "orthogonality_weighting": "coactivation",
    "orthogonality_tau": 0.0,
    "neighbour_count": 3,
}
SCORED = {"selection": "zscore", "zscore_z": 0.5}
REVIVED = {"revival_every": 3, "revival_dead_steps": 2, "k": 1, "revival_max_fraction": 0.5}
SCALES = {"norm_scales": [0.5, 2.0], "norm_eps": 0.1, "norm_eps_mode": "relative"}
NESTED = {"prefix_fractions": [0.3], "prefix_sort_every": 2}
EFFECTS: dict[str, tuple[dict[str, Any], Any]] = {
    "d_in": ({}, 5),
    "d_sae": ({}, 14),
    "k": ({}, 2.0),
    "k_initial_multiplier": ({"k_anneal_steps": 4}, 2.0),
    "k_anneal_steps": ({"k_initial_multiplier": 2.0}, 4),
    "topk_threshold_lr": ({}, 0.9),
    "rescale_acts_by_decoder_norm": ({}, False),
    "unit_norm_decoder": ({}, True),
    "weight_init": ({}, "inverse_sqrt_d"),
    "input_normalization": ({}, "first_batch"),
    "aux_loss_coefficient": ({}, 0.0),
    "l1_coefficient": ({}, 0.5),
    "l1_warm_up_steps": ({"l1_coefficient": 0.5}, 7),
    "sparsity_scales": ({}, [2.0]),
    "sparsity_scale_weight": ({"sparsity_scales": [2.0]}, 0.9),
    "prefix_fractions": ({}, [0.3]),
    "prefix_weight": (NESTED, 0.9),
    "detach_inner_prefixes": (NESTED, True),
    "prefix_sort_every": (NESTED, 0),
    "firing_rate_decay": ({**NESTED, "prefix_fractions": [0.2, 0.5]}, 0.0),
    "statistics_decay": ({**SCORED, "k": 3}, 0.0),
    "selection": ({"zscore_z": 0.5}, "zscore"),
    "standardise": ({}, 0.5),
    "firing_floor": ({"k": 3}, 0.9),
    "firing_floor_rate": ({"k": 3, "firing_floor": 0.9}, 0.5),
    "dense_share_limit": ({"k": 3}, 0.2),
    "zscore_z": (SCORED, 1.0),
    "zscore_z_lr": (SCORED, 0.1),
    "orthogonality_coefficient": (PENALTY, 1.0),
    "orthogonality_pairs": ({**PENALTY, "sketch_rank": 4}, "chunks"),
    "orthogonality_weighting": (PENALTY, "none"),
    "orthogonality_tau": (PENALTY, 0.3),
    "orthogonality_chunk_size": (
        {**PENALTY, "orthogonality_pairs": "chunks", "orthogonality_weighting": "none"},
        4,
    ),
    "orthogonality_every": (PENALTY, 2),
    "neighbour_count": (PENALTY, 1),
    "neighbour_refresh_every": (PENALTY, 2),
    "sketch_rank": (
        {**PENALTY, "orthogonality_pairs": "chunks", "sketch_rank": 1},
        9,
    ),
    "revival_every": (REVIVED, 4),
    "revival_dead_steps": (REVIVED, 1),
    "revival_min_cosine": (REVIVED, 0.95),
    "revival_max_fraction": (REVIVED, 0.01),
    "revival_survival_steps": (REVIVED, 2),
    "aligned_encoder": ({}, True),
    "importance_power": ({}, 0.5),
    "norm_scales": ({}, [1.0]),
    "norm_centre": (SCALES, False),
    "norm_affine": (SCALES, False),
    "norm_gate": (SCALES, True),
    "norm_eps": (SCALES, 0.5),
    "norm_eps_mode": (SCALES, "absolute"),
    "norm_attention": (SCALES, True),
    "attention_d_key": ({**SCALES, "norm_attention": True}, 5),
    "skip_scale": ({}, 0.1),
    "decoder_init_norm": ({}, 0.5),
    "dtype": ({}, "float64"),
    "apply_b_dec_to_input": ({}, False),
}
# Read by SAELens, not by us: where tensors lie, host scalings, and what is written beside them.
SAELENS_OWN = {"device", "normalize_activations", "reshape_activations", "metadata"}


def test_the_table_of_effects_is_complete() -> None:
    names = {f.name for f in fields(MultiScaleTrainingSAEConfig)}
    assert names == set(EFFECTS) | SAELENS_OWN


def outcome(values: dict[str, Any]) -> list[Any]:
    """Everything that eight steps leave behind: losses, weights, buffers, events."""
    torch.manual_seed(0)
    sae = make(**values)
    coefficient = sae.get_coefficients().get("l1")
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    dead[:2] = True
    outputs = []
    for step in range(8):
        l1 = 0.0
        if coefficient is not None and not isinstance(coefficient, float):
            l1 = coefficient.value * min(1.0, (step + 1) / max(coefficient.warm_up_steps, 1))
        torch.manual_seed(step)
        outputs += train(
            sae,
            1,
            first_step=step,
            l1=l1,
            dead=lambda _: dead,
            batch=lambda s: activations(32, sae.cfg.d_in, s, sae.dtype),
        )
    losses = [(name, float(v)) for o in outputs for name, v in sorted(o.losses.items())]
    state = {name: (t.dtype, t.tolist()) for name, t in sae.state_dict().items()}
    events = sae.pop_events()
    sae.eval()
    with torch.no_grad():
        x = activations(20, sae.cfg.d_in, 99, sae.dtype)
        return [losses, state, events, sae(x).tolist()]


@pytest.mark.parametrize("name", EFFECTS)
def test_every_field_changes_a_run(name: str) -> None:
    context, value = EFFECTS[name]
    base = plain(**context)
    assert base.get(name, getattr(MultiScaleTrainingSAEConfig(**base), name)) != value
    assert outcome({**base, name: value}) != outcome(base)


def test_a_run_repeats_itself() -> None:
    """The comparison above means something: equal settings give equal runs."""
    assert outcome(plain(**REVIVED)) == outcome(plain(**REVIVED))


# ---- presets -----------------------------------------------------------------------------------


def test_the_named_presets_are_there() -> None:
    names = preset_names()
    assert names[:3] == ["default", "nested", "features"]
    assert [f"source-run-{n}" for n in range(1, 11)] == [n for n in names if "run" in n]
    for name in names:
        summary = preset_summary(name)
        assert summary
        assert "\n" not in summary


def test_schedules_follow_the_length_of_the_run() -> None:
    cfg = preset("nested", d_in=8, d_sae=512, k=8, training_steps=1000)
    assert (cfg.k_anneal_steps, cfg.k_initial_multiplier) == (400, 2.0)
    assert [cfg.k_at(s) for s in (0, 200, 400, 999)] == pytest.approx([16, 12, 8, 8])
    assert preset("nested", d_in=8, d_sae=8, k=5, training_steps=9).k_initial_multiplier == 1.6


def test_overrides_win_over_the_preset() -> None:
    cfg = preset("nested", **BASE, training_steps=10, prefix_weight=0.25, k_anneal_steps=0)
    assert (cfg.prefix_weight, cfg.k_anneal_steps) == (0.25, 0)


def test_a_dictionary_smaller_than_the_default_k_is_all_active_at_most() -> None:
    """SAELens' own command line with `--d_in 8 --d_sae 16` and no k."""
    assert MultiScaleTrainingSAEConfig(d_in=8, d_sae=16).k == 16


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("defualt", {}, "did you mean 'default'"),
        ("nothing like it", {}, "known: default"),
        ("default", {"prefix_wieght": 1}, "did you mean 'prefix_weight'"),
        ("default", {"training_steps": 0}, "training_steps must be at least 1"),
        ("default", {"k": 99}, "k must not exceed d_sae=40"),
    ],
)
def test_wrong_presets_are_refused_in_one_line(
    name: str, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as info:
        preset(name, **{**BASE, "training_steps": 10, **arguments})
    assert words in str(info.value)
    assert "\n" not in str(info.value)


def test_each_run_of_the_source_adds_to_the_one_before() -> None:
    """Runs 3 and 10 add options of the trainer; every other run changes the SAE."""
    configs = [
        preset(f"source-run-{n}", **BASE, training_steps=10).get_training_architecture_details()
        | preset(f"source-run-{n}", **BASE, training_steps=10).get_inference_sae_cfg_dict()
        for n in range(1, 11)
    ]
    for config in configs:
        config.pop("metadata")
    changed = [a != b for a, b in pairwise(configs)]
    assert changed == [True, False, True, True, True, True, True, True, False]


def test_a_saved_option_that_was_removed_is_named_and_its_default_is_not() -> None:
    saved = MultiScaleTrainingSAEConfig(d_in=4, d_sae=8, k=2).to_dict()
    assert MultiScaleTrainingSAEConfig.from_dict({**saved, "token_loss_weight": "none"}).k == 2
    with pytest.raises(InputError, match="revival_source must be left out"):
        MultiScaleTrainingSAEConfig.from_dict({**saved, "revival_source": "error_svd"})
