"""Refusals of impossible settings: one line that names the field, before anything is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from msae_plugin.common.errors import InputError

if TYPE_CHECKING:
    from msae_plugin.architecture.config import MultiScaleSAEConfig, MultiScaleTrainingSAEConfig


def require(condition: bool, field_name: str, value: object, demand: str) -> None:
    """Raise unless the condition holds.

    Args:
        condition: What must be true of the field.
        field_name: Name of the configuration field, named in the message.
        value: What the field holds.
        demand: What it must be instead, completing "<field> must ...".

    Raises:
        InputError: The condition does not hold (a ValueError; exit status 2 on the command line).
    """
    if not condition:
        raise InputError(f"{field_name} must {demand}; got {value!r}")


def _require_choice(field_name: str, value: object, choices: tuple[str, ...]) -> None:
    require(value in choices, field_name, value, f"be one of {', '.join(choices)}")


def _require_decay(field_name: str, value: float) -> None:
    require(0 <= value < 1, field_name, value, "be a decay in [0, 1)")


def validate_inference(cfg: MultiScaleSAEConfig | MultiScaleTrainingSAEConfig) -> None:
    """Check the fields that training and inference share.

    Raises:
        InputError: Naming the first impossible field.
    """
    require(cfg.d_in >= 1, "d_in", cfg.d_in, "be at least 1")
    require(cfg.d_sae >= 1, "d_sae", cfg.d_sae, "be at least 1")
    if cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        raise InputError(
            f"normalize_activations={cfg.normalize_activations!r} keeps the statistics of encode "
            "for one decode and breaks the second: use norm_scales=[1.0] (with norm_centre=False "
            "for the norm alone) instead"
        )
    require(
        not (cfg.norm_scales and cfg.normalize_activations == "covariance_whitening"),
        "normalize_activations",
        cfg.normalize_activations,
        "not be combined with norm_scales: a whitening cannot be folded through a per-token "
        "normalisation",
    )
    require(
        all(math.isfinite(s) and s > 0 for s in cfg.norm_scales),
        "norm_scales",
        cfg.norm_scales,
        "hold positive numbers",
    )
    require(
        math.isfinite(cfg.norm_eps) and cfg.norm_eps > 0, "norm_eps", cfg.norm_eps, "be positive"
    )
    _require_choice("norm_eps_mode", cfg.norm_eps_mode, ("absolute", "relative"))
    require(
        not cfg.norm_attention or len(cfg.norm_scales) > 1,
        "norm_attention",
        cfg.norm_attention,
        f"be False unless norm_scales holds at least two scales (it holds {len(cfg.norm_scales)})",
    )
    require(
        not cfg.norm_gate or bool(cfg.norm_scales),
        "norm_gate",
        cfg.norm_gate,
        "be False when norm_scales is empty",
    )
    require(
        cfg.attention_d_key is None or cfg.attention_d_key >= 1,
        "attention_d_key",
        cfg.attention_d_key,
        "be at least 1, or None for d_in // 4",
    )
    require(0 <= cfg.skip_scale < 1, "skip_scale", cfg.skip_scale, "be in [0, 1)")


def validate_training(cfg: MultiScaleTrainingSAEConfig) -> None:
    """Check every field of a training configuration.

    Raises:
        InputError: Naming the first impossible field.
    """
    validate_inference(cfg)
    require(math.isfinite(cfg.k) and cfg.k > 0, "k", cfg.k, "be positive")
    require(cfg.k <= cfg.d_sae, "k", cfg.k, f"not exceed d_sae={cfg.d_sae}")
    require(
        cfg.k_initial_multiplier >= 1,
        "k_initial_multiplier",
        cfg.k_initial_multiplier,
        "be at least 1",
    )
    require(cfg.k_anneal_steps >= 0, "k_anneal_steps", cfg.k_anneal_steps, "not be negative")
    require(
        0 < cfg.topk_threshold_lr <= 1, "topk_threshold_lr", cfg.topk_threshold_lr, "be in (0, 1]"
    )
    _require_choice("weight_init", cfg.weight_init, ("kaiming", "inverse_sqrt_d"))
    _require_choice("input_normalization", cfg.input_normalization, ("none", "first_batch"))
    _require_choice("decode_kernel", cfg.decode_kernel, ("auto", "embedding_bag", "triton"))
    require(
        cfg.decode_kernel != "triton" or cfg.device.startswith("cuda"),
        "decode_kernel",
        cfg.decode_kernel,
        f"be 'auto' on device {cfg.device!r}: the Triton kernels run on CUDA devices",
    )
    require(
        cfg.input_normalization == "none" or cfg.apply_b_dec_to_input or not cfg.norm_scales,
        "input_normalization",
        cfg.input_normalization,
        "be 'none' with norm_scales unless apply_b_dec_to_input: the shift folds into b_dec",
    )
    _require_choice("token_loss_weight", cfg.token_loss_weight, ("none", "inverse_norm"))
    for name in (
        "aux_loss_coefficient",
        "l1_coefficient",
        "sparsity_scale_weight",
        "prefix_weight",
        "orthogonality_coefficient",
        "importance_power",
        "zscore_z_lr",
        "firing_floor",
        "firing_floor_rate",
    ):
        value = getattr(cfg, name)
        require(0 <= value < math.inf, name, value, "be finite and not negative")
    for name in ("l1_warm_up_steps", "prefix_sort_every", "sketch_rank", "revival_every"):
        require(getattr(cfg, name) >= 0, name, getattr(cfg, name), "not be negative")
    for name in ("firing_rate_decay", "zscore_decay", "coactivation_decay", "importance_decay"):
        _require_decay(name, getattr(cfg, name))
    _validate_scales(cfg)
    _validate_orthogonality(cfg)
    _validate_revival(cfg)


def _validate_scales(cfg: MultiScaleTrainingSAEConfig) -> None:
    require(
        all(math.isfinite(s) and s > 0 and s != 1 for s in cfg.sparsity_scales),
        "sparsity_scales",
        cfg.sparsity_scales,
        "hold positive multiples of k other than 1",
    )
    require(
        len(set(cfg.sparsity_scales)) == len(cfg.sparsity_scales),
        "sparsity_scales",
        cfg.sparsity_scales,
        "not repeat a scale",
    )
    require(
        all(0 < share < 1 for share in cfg.prefix_fractions),
        "prefix_fractions",
        cfg.prefix_fractions,
        "hold shares of d_sae between 0 and 1 (the whole dictionary is always there)",
    )
    require(
        cfg.prefix_weight > 0 or not (cfg.detach_inner_prefixes and cfg.prefix_fractions),
        "prefix_weight",
        cfg.prefix_weight,
        "be positive with detach_inner_prefixes, or the inner prefixes would learn from no loss",
    )
    _require_choice("selection", cfg.selection, ("batchtopk", "zscore"))
    require(
        cfg.selection == "batchtopk" or not cfg.sparsity_scales,
        "sparsity_scales",
        cfg.sparsity_scales,
        "be empty with selection='zscore', which has no budget to scale",
    )
    require(
        cfg.selection == "batchtopk" or cfg.k_initial_multiplier == 1 or cfg.zscore_z_lr > 0,
        "k_initial_multiplier",
        cfg.k_initial_multiplier,
        "be 1 with a fixed z-score threshold, which does not follow k",
    )
    require(0 <= cfg.standardise <= 1, "standardise", cfg.standardise, "be in [0, 1]")
    require(
        cfg.selection == "batchtopk" or cfg.standardise == 0,
        "standardise",
        cfg.standardise,
        "be 0 with selection='zscore', which standardises fully by itself",
    )
    require(math.isfinite(cfg.zscore_z), "zscore_z", cfg.zscore_z, "be finite")
    require(
        cfg.firing_floor < 1, "firing_floor", cfg.firing_floor, "be below 1, the mean firing rate"
    )
    require(
        cfg.firing_floor == 0 or (cfg.selection == "batchtopk" and cfg.standardise == 0),
        "firing_floor",
        cfg.firing_floor,
        "be 0 unless selection='batchtopk' and standardise=0: standardised latents fire equally "
        "often by themselves",
    )


def _validate_orthogonality(cfg: MultiScaleTrainingSAEConfig) -> None:
    _require_choice("orthogonality_pairs", cfg.orthogonality_pairs, ("chunks", "neighbours"))
    _require_choice(
        "orthogonality_weighting",
        cfg.orthogonality_weighting,
        ("none", "coactivation", "correlation"),
    )
    for name in (
        "orthogonality_chunk_size",
        "orthogonality_every",
        "neighbour_count",
        "neighbour_refresh_every",
    ):
        require(getattr(cfg, name) >= 1, name, getattr(cfg, name), "be at least 1")
    require(
        -1 <= cfg.orthogonality_tau <= 1,
        "orthogonality_tau",
        cfg.orthogonality_tau,
        "be in [-1, 1]",
    )
    if cfg.orthogonality_coefficient == 0 or cfg.orthogonality_pairs == "neighbours":
        return
    require(
        cfg.orthogonality_weighting != "correlation",
        "orthogonality_weighting",
        cfg.orthogonality_weighting,
        "be 'none' or 'coactivation' with orthogonality_pairs='chunks': the sketch holds no means",
    )
    require(
        cfg.orthogonality_weighting == "none" or cfg.sketch_rank > 0,
        "sketch_rank",
        cfg.sketch_rank,
        "be positive when chunks are weighted by co-activation, which comes from the sketch",
    )


def _validate_revival(cfg: MultiScaleTrainingSAEConfig) -> None:
    _require_choice("revival_source", cfg.revival_source, ("error_samples", "error_svd"))
    require(
        cfg.revival_dead_steps >= 1, "revival_dead_steps", cfg.revival_dead_steps, "be at least 1"
    )
    require(
        cfg.revival_survival_steps >= 1,
        "revival_survival_steps",
        cfg.revival_survival_steps,
        "be at least 1",
    )
    require(
        -1 <= cfg.revival_min_cosine <= 1,
        "revival_min_cosine",
        cfg.revival_min_cosine,
        "be a cosine in [-1, 1]",
    )
    require(
        0 < cfg.revival_max_fraction <= 1,
        "revival_max_fraction",
        cfg.revival_max_fraction,
        "be in (0, 1]",
    )
