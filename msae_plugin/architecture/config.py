"""Configurations of the `multiscale` architecture, and the refusal of impossible ones.

Every mechanism of docs/method.md has its own group of fields and is off at the value that its
description names. Fields that an exported SAE needs live in the inference configuration; the
training configuration repeats them under the same name, because SAELens copies them by name.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from typing_extensions import override

from msae_plugin.common.errors import InputError

logger = logging.getLogger(__name__)

ARCHITECTURE = "multiscale"

DENSE_RATE = 0.1
"""A latent that fires on more tokens than this is dense. The usual bound of the field."""
# Multiples of the mean rate k / d_sae: where the first is above a tenth, the second is the bound.
_NOT_DENSE_MULTIPLE, _DENSE_MULTIPLE = 6.0, 8.0

_REMOVED = {
    "token_loss_weight": "inverse_norm",
    "orthogonality_weighting": "correlation",
    "revival_source": "error_svd",
}
"""Options of earlier versions."""

InputNormalization = Literal["none", "first_batch"]
NormEpsMode = Literal["absolute", "relative"]


@dataclass
class MultiScaleSAEConfig(JumpReLUSAEConfig):
    """Configuration of an exported multi-scale SAE.

    With `norm_scales` empty and `skip_scale` zero the architecture is SAELens' JumpReLU.

    Args:
        norm_scales (list[float]): Scales s of the input normalisation
            x_hat_s = gain_s (x_c - mu) / sqrt(s var + eps) + bias_s. Empty: no normalisation. One
            scale: layer normalisation. docs/method.md, [N].
        norm_centre (bool): Subtract the mean over d_in of each token before dividing. False gives
            the root-mean-square form.
        norm_affine (bool): Learned gain and bias per scale.
        norm_gate (bool): Token-dependent sigmoid gate on the gain of each scale.
        norm_eps (float): Added to the variance; in units of the squared activations when
            `norm_eps_mode` is absolute, in units of the running mean variance when relative.
        norm_eps_mode (Literal["absolute", "relative"]): absolute makes the scales differ by a
            constant only, so that they fold into one affine map at export; relative makes them
            differ token by token.
        norm_attention (bool): Mixture weights over the scales depend on the token. docs/method.md,
            [A].
        attention_d_key (int | None): Width of queries and keys of the scale attention. None:
            d_in // 4.
        skip_scale (float): Share of the centred input added to the output of `forward`; `decode`
            stays linear and never sees it. 0 disables.
        d_in (int): Width of the activations. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type of the weights. Thresholds stay float32. Inherited from SAEConfig.
        device (str): Device of the weights. Inherited from SAEConfig.
    """

    norm_scales: list[float] = field(default_factory=list)
    norm_centre: bool = True
    norm_affine: bool = True
    norm_gate: bool = False
    norm_eps: float = 1e-6
    norm_eps_mode: NormEpsMode = "absolute"
    norm_attention: bool = False
    attention_d_key: int | None = None
    skip_scale: float = 0.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        validate_inference(self)


@dataclass(kw_only=True)
class MultiScaleTrainingSAEConfig(TrainingSAEConfig):
    """Configuration for training a multi-scale orthogonal SAE.

    The defaults are the `default` preset without the schedules that need the length of the run;
    `msae_plugin.preset` fills those in. Mechanism letters refer to docs/method.md.

    Args:
        k (float): Mean number of active latents per token, and the target L0 of every selection
            rule; d_sae where that is smaller.
        k_initial_multiplier (float): Training starts at this multiple of k. 1 disables the
            schedule.
        k_anneal_steps (int): Steps over which the multiple falls linearly to 1. 0 disables.
        topk_threshold_lr (float): Rate of the running estimate of the selection threshold that the
            exported SAE uses as its threshold.
        rescale_acts_by_decoder_norm (bool): Treat the decoder rows as if they had unit norm, as in
            SAELens' TopK.
        unit_norm_decoder (bool): Project the decoder rows onto unit norm at every step.
        weight_init (Literal["kaiming", "inverse_sqrt_d"]): Initial decoder directions: SAELens'
            uniform Kaiming rule, or normal with standard deviation 1/sqrt(d_in).
        input_normalization (Literal["none", "first_batch"]): Unit in which the SAE is trained.
            first_batch: activations are shifted by the geometric median of the first training batch
            and divided by their median distance from it, so that neither the mean nor the scale of
            the activations matters; folded into the weights at export. docs/method.md, "Input".
        aux_loss_coefficient (float): AuxK: dead latents reconstruct the residual. 0 disables.
        l1_coefficient (float): Weight of the L1 penalty on the latents. 0 disables.
        l1_warm_up_steps (int): Steps over which the L1 weight rises linearly to its value.
        sparsity_scales (list[float]): [S] Further sparsity budgets s * k at which the same
            pre-activations must reconstruct. Empty disables.
        sparsity_scale_weight (float): [S] Weight of the loss at each further budget.
        prefix_fractions (list[float]): [S] Nested prefixes of the dictionary, as shares of d_sae,
            each of which must reconstruct alone. Empty disables.
        prefix_weight (float): [S] Weight of the loss of each prefix.
        detach_inner_prefixes (bool): [S] A prefix learns only from its own loss, not from the
            losses of the wider ones.
        prefix_sort_every (int): [S] Steps between two assignments of latents to prefixes by firing
            rate, most frequent first. 0 keeps the order of the indices.
        firing_rate_decay (float): [S] Decay of the running firing rate.
        statistics_decay (float): [Z], [O], [C], [G] Decay of all other running means.
        selection (Literal["batchtopk", "zscore"]): [Z] Rule that picks the active latents: the
            k * tokens largest of the batch, or a threshold mean + z * std per latent.
        standardise (float): [Z] How far pre-activations are standardised by their running mean
            and standard deviation before BatchTopK ranks them. 0: not at all. 1: fully.
        zscore_z (float): [Z] z, or its initial value when it corrects itself.
        zscore_z_lr (float): [Z] Rate at which z follows the target L0 = k. 0 keeps z fixed.
        firing_floor (float): [Z] Firing rate below which a latent gets a lower threshold of its
            own, as a share of the mean rate k / d_sae. 0 disables: all share one threshold.
        firing_floor_rate (float): [Z] Step by which the threshold of such a latent falls, and rises
            again once it fires often enough, as a share of the common threshold.
        dense_share_limit (float): [Z] Share of the L0 above which latents that fire on more than a
            tenth of the tokens get higher thresholds; where a tenth is less than six times the mean
            rate k / d_sae, those above eight times that rate. 1 disables.
        orthogonality_coefficient (float): [O] Weight of the orthogonality penalty, in units of the
            running variance of the activations. 0 disables.
        orthogonality_pairs (Literal["chunks", "neighbours"]): [O] Pairs of latents that are
            compared: random chunks, drawn anew each time, or lists of nearest decoder neighbours.
        orthogonality_weighting (Literal["none", "coactivation"]): [O] Weight of a pair: OrtSAE's
            unweighted maximum, or the excess of the co-activation cosine over
            `orthogonality_tau`.
        orthogonality_tau (float): [O] Co-activation below which a pair is free.
        orthogonality_chunk_size (int): [O] Latents per chunk; also the rows handled at a time when
            neighbours are searched.
        orthogonality_every (int): [O] The penalty is taken every n-th step with n times its weight.
        neighbour_count (int): [O] Nearest decoder neighbours per latent.
        neighbour_refresh_every (int): [O] Steps between two searches for neighbours.
        sketch_rank (int): [C] Rank of the randomised sketch of the co-activation. 0 disables. With
            `orthogonality_pairs` chunks and a weighting, the weights come from the sketch.
        revival_every (int): [R] Steps between two revivals of dead latents. 0 disables.
        revival_dead_steps (int): [R] Steps without firing after which a latent counts as dead.
        revival_min_cosine (float): [R] Only latents whose largest cosine to a live latent is at
            least this are revived: the interference criterion. 0 revives any dead latent.
        revival_max_fraction (float): [R] Largest share of the dictionary revived at once.
        revival_survival_steps (int): [R] Steps after which the after-life of a revived latent is
            judged.
        aligned_encoder (bool): [E] The encoder is moved before every step so that the product of a
            latent's encoder and decoder direction is 1.
        importance_power (float): [G] Gradients of a latent are multiplied by its relative
            contribution |f| |d| to this power, and its L1 weight by the inverse. 0 disables.
        norm_scales (list[float]): [N] See MultiScaleSAEConfig. Empty: no normalisation.
        norm_centre (bool): [N] See MultiScaleSAEConfig.
        norm_affine (bool): [N] See MultiScaleSAEConfig.
        norm_gate (bool): [N] See MultiScaleSAEConfig.
        norm_eps (float): [N] See MultiScaleSAEConfig.
        norm_eps_mode (Literal["absolute", "relative"]): [N] See MultiScaleSAEConfig.
        norm_attention (bool): [A] See MultiScaleSAEConfig.
        attention_d_key (int | None): [A] See MultiScaleSAEConfig.
        skip_scale (float): See MultiScaleSAEConfig.
        decoder_init_norm (float | None): Norm of the decoder rows at initialisation. None keeps the
            norms of `weight_init`. Inherited from TrainingSAEConfig.
        d_in (int): Width of the activations. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type of the weights. Inherited from SAEConfig.
        device (str): Device of the weights. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Subtract b_dec before encoding. Inherited from SAEConfig.
        normalize_activations (Literal["none", "expected_average_only_in", "covariance_whitening"]):
            SAELens' own scalings, folded into the weights at the end of training. layer_norm and
            constant_norm_rescale keep state between encode and decode and are refused: use
            norm_scales. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): Inherited from SAEConfig.
        metadata (SAEMetadata): Inherited from SAEConfig.
    """

    k: float = 32.0
    k_initial_multiplier: float = 1.0
    k_anneal_steps: int = 0
    topk_threshold_lr: float = 0.01
    rescale_acts_by_decoder_norm: bool = True
    unit_norm_decoder: bool = False
    weight_init: Literal["kaiming", "inverse_sqrt_d"] = "kaiming"
    input_normalization: InputNormalization = "first_batch"
    aux_loss_coefficient: float = 1.0
    l1_coefficient: float = 0.0
    l1_warm_up_steps: int = 0

    sparsity_scales: list[float] = field(default_factory=lambda: [2.0])
    sparsity_scale_weight: float = 0.25
    prefix_fractions: list[float] = field(default_factory=list[float])
    prefix_weight: float = 0.1
    detach_inner_prefixes: bool = False
    prefix_sort_every: int = 100
    firing_rate_decay: float = 0.95
    statistics_decay: float = 0.99

    selection: Literal["batchtopk", "zscore"] = "batchtopk"
    standardise: float = 0.0
    zscore_z: float = 2.0
    zscore_z_lr: float = 0.0
    firing_floor: float = 0.1
    firing_floor_rate: float = 0.1
    dense_share_limit: float = 0.3

    orthogonality_coefficient: float = 0.0
    orthogonality_pairs: Literal["chunks", "neighbours"] = "chunks"
    orthogonality_weighting: Literal["none", "coactivation"] = "none"
    orthogonality_tau: float = 0.1
    orthogonality_chunk_size: int = 512
    orthogonality_every: int = 1
    neighbour_count: int = 8
    neighbour_refresh_every: int = 50

    sketch_rank: int = 0

    revival_every: int = 0
    revival_dead_steps: int = 200
    revival_min_cosine: float = 0.0
    revival_max_fraction: float = 0.05
    revival_survival_steps: int = 1000

    aligned_encoder: bool = False
    importance_power: float = 0.0

    norm_scales: list[float] = field(default_factory=list)
    norm_centre: bool = True
    norm_affine: bool = True
    norm_gate: bool = False
    norm_eps: float = 1e-6
    norm_eps_mode: NormEpsMode = "absolute"
    norm_attention: bool = False
    attention_d_key: int | None = None
    skip_scale: float = 0.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "MultiScaleTrainingSAEConfig":
        """Configuration from a saved one; what came later is off there.

        Raises:
            InputError: It has an option that was removed, because nothing measured spoke for it.
        """
        for name, value in _REMOVED.items():
            require(config_dict.get(name) != value, name, value, "be left out: it was removed")
        before = {"input_normalization": "none", "dense_share_limit": 1.0}
        return super().from_dict({**before, **config_dict})

    @override
    def __post_init__(self) -> None:
        if 1 <= self.d_sae < self.k < math.inf:
            # As in SAELens' batchtopk, whose default k a small dictionary may lie below: all
            # latents may be active. Recipes and presets, where k was chosen, refuse it.
            logger.warning("k=%g exceeds d_sae=%d: k is %d", self.k, self.d_sae, self.d_sae)
            self.k = float(self.d_sae)
        validate_training(self)
        super().__post_init__()

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return MultiScaleSAEConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """Configuration of the export, in which the foldable parts of [N] are already folded."""
        exported = super().get_inference_sae_cfg_dict()
        if self.norm_folds_to_affine:
            exported.update(norm_scales=[1.0], norm_affine=False)
        return exported

    @property
    def norm_folds_to_affine(self) -> bool:
        """Whether the scales differ by constants only and fold into `W_enc` and `b_enc`."""
        return (
            bool(self.norm_scales)
            and self.norm_eps_mode == "absolute"
            and not self.norm_gate
            and not self.norm_attention
        )

    @property
    def prefix_widths(self) -> list[int]:
        """Widths of the nested prefixes, ascending, the whole dictionary last; (n_prefixes,)."""
        inner = {max(1, round(share * self.d_sae)) for share in self.prefix_fractions}
        return [*sorted(width for width in inner if width < self.d_sae), self.d_sae]

    def floor_rate(self, k: float) -> float:
        """[Z] Firing rate below which a latent is helped, at a mean L0 of k."""
        return self.firing_floor * k / self.d_sae

    @property
    def dense_rate(self) -> float:
        """[Z] Firing rate above which a latent counts for `dense_share_limit`.

        At a high L0 or in a small dictionary a tenth is near the mean rate, and latents that fire a
        few times as often are not dense. Measured at L0 64 of 2,304: held to four times the mean
        rate, `default` lost .003 of the explained variance, to six times .001; at eight times
        nothing was held back.
        """
        mean_rate = self.k / self.d_sae
        if mean_rate * _NOT_DENSE_MULTIPLE <= DENSE_RATE:
            return DENSE_RATE
        return mean_rate * _DENSE_MULTIPLE

    def k_at(self, training_step: int) -> float:
        """Target L0 of a training step: linear from `k_initial_multiplier * k` down to k."""
        if self.k_anneal_steps <= 0 or training_step >= self.k_anneal_steps:
            return self.k
        left = 1 - training_step / self.k_anneal_steps
        return self.k * (1 + (self.k_initial_multiplier - 1) * left)


def mechanisms_off() -> dict[str, Any]:
    """Field values under which the architecture is SAELens' BatchTopK (its AuxK stays on)."""
    return {
        "k_initial_multiplier": 1.0,
        "k_anneal_steps": 0,
        "sparsity_scales": [],
        "prefix_fractions": [],
        "selection": "batchtopk",
        "standardise": 0.0,
        "firing_floor": 0.0,
        "dense_share_limit": 1.0,
        "orthogonality_coefficient": 0.0,
        "sketch_rank": 0,
        "revival_every": 0,
        "aligned_encoder": False,
        "importance_power": 0.0,
        "norm_scales": [],
        "norm_attention": False,
        "norm_gate": False,
        "skip_scale": 0.0,
        "l1_coefficient": 0.0,
        "input_normalization": "none",
    }


def require(condition: bool, field_name: str, value: object, demand: str) -> None:
    """Raise unless a condition of a field holds; `demand` completes "<field> must ...".

    Raises:
        InputError: It does not (a ValueError; exit status 2 on the command line).
    """
    if not condition:
        raise InputError(f"{field_name} must {demand}; got {value!r}")


MultiScaleConfig = MultiScaleSAEConfig | MultiScaleTrainingSAEConfig


def _check(cfg: MultiScaleConfig, name: str, condition: bool, demand: str) -> None:
    require(condition, name, getattr(cfg, name), demand)


def _check_choice(cfg: MultiScaleConfig, name: str, choices: tuple[str, ...]) -> None:
    _check(cfg, name, getattr(cfg, name) in choices, f"be one of {', '.join(choices)}")


def validate_inference(cfg: MultiScaleConfig) -> None:
    """Check the fields that training and inference share.

    Raises:
        InputError: Naming the first impossible field.
    """
    check = partial(_check, cfg)
    check("d_in", cfg.d_in >= 1, "be at least 1")
    check("d_sae", cfg.d_sae >= 1, "be at least 1")
    if cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        raise InputError(
            f"normalize_activations={cfg.normalize_activations!r} keeps the statistics of encode "
            "for one decode and breaks the second: use norm_scales=[1.0] (with norm_centre=False "
            "for the norm alone) instead"
        )
    check(
        "normalize_activations",
        not (cfg.norm_scales and cfg.normalize_activations == "covariance_whitening"),
        "not be combined with norm_scales: a whitening cannot be folded through a per-token "
        "normalisation",
    )
    check(
        "norm_scales",
        all(math.isfinite(s) and s > 0 for s in cfg.norm_scales),
        "hold positive numbers",
    )
    check("norm_eps", math.isfinite(cfg.norm_eps) and cfg.norm_eps > 0, "be positive")
    _check_choice(cfg, "norm_eps_mode", ("absolute", "relative"))
    check(
        "norm_attention",
        not cfg.norm_attention or len(cfg.norm_scales) > 1,
        f"be False unless norm_scales holds at least two scales (it holds {len(cfg.norm_scales)})",
    )
    check(
        "norm_gate",
        not cfg.norm_gate or bool(cfg.norm_scales),
        "be False when norm_scales is empty",
    )
    check(
        "attention_d_key",
        cfg.attention_d_key is None or cfg.attention_d_key >= 1,
        "be at least 1, or None for d_in // 4",
    )
    check("skip_scale", 0 <= cfg.skip_scale < 1, "be in [0, 1)")


# By what is demanded of a field alone.
_BOUNDS: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "be at least 1": (lambda value: value >= 1, (
        "k_initial_multiplier", "orthogonality_chunk_size", "orthogonality_every",
        "neighbour_count", "neighbour_refresh_every", "revival_dead_steps",
        "revival_survival_steps",
    )),
    "not be negative": (lambda value: value >= 0, (
        "k_anneal_steps", "l1_warm_up_steps", "prefix_sort_every", "sketch_rank", "revival_every",
    )),
    "be finite and not negative": (lambda value: 0 <= value < math.inf, (
        "aux_loss_coefficient", "l1_coefficient", "sparsity_scale_weight", "prefix_weight",
        "orthogonality_coefficient", "importance_power", "zscore_z_lr", "firing_floor",
        "firing_floor_rate",
    )),
    "be a decay in [0, 1)": (
        lambda value: 0 <= value < 1, ("firing_rate_decay", "statistics_decay")
    ),
    "be in (0, 1]": (
        lambda value: 0 < value <= 1, ("topk_threshold_lr", "revival_max_fraction")
    ),
    "be in [0, 1]": (lambda value: 0 <= value <= 1, ("standardise",)),
    "be a share in [0, 1]": (lambda value: 0 <= value <= 1, ("dense_share_limit",)),
    "be in [-1, 1]": (lambda value: -1 <= value <= 1, ("orthogonality_tau",)),
    "be a cosine in [-1, 1]": (lambda value: -1 <= value <= 1, ("revival_min_cosine",)),
}  # fmt: skip


def validate_training(cfg: MultiScaleTrainingSAEConfig) -> None:
    """Check every field of a training configuration.

    Raises:
        InputError: Naming the first impossible field.
    """
    check = partial(_check, cfg)
    validate_inference(cfg)
    check("k", math.isfinite(cfg.k) and cfg.k > 0, "be positive")
    _check_choice(cfg, "weight_init", ("kaiming", "inverse_sqrt_d"))
    _check_choice(cfg, "input_normalization", ("none", "first_batch"))
    check(
        "input_normalization",
        cfg.input_normalization == "none" or cfg.apply_b_dec_to_input or not cfg.norm_scales,
        "be 'none' with norm_scales unless apply_b_dec_to_input: the shift folds into b_dec",
    )
    for demand, (holds, names) in _BOUNDS.items():
        for name in names:
            check(name, holds(getattr(cfg, name)), demand)
    _validate_scales(cfg)
    _validate_orthogonality(cfg)


def _validate_scales(cfg: MultiScaleTrainingSAEConfig) -> None:
    check = partial(_check, cfg)
    check(
        "sparsity_scales",
        all(math.isfinite(s) and s > 0 and s != 1 for s in cfg.sparsity_scales),
        "hold positive multiples of k other than 1",
    )
    check(
        "sparsity_scales",
        len(set(cfg.sparsity_scales)) == len(cfg.sparsity_scales),
        "not repeat a scale",
    )
    check(
        "prefix_fractions",
        all(0 < share < 1 for share in cfg.prefix_fractions),
        "hold shares of d_sae between 0 and 1 (the whole dictionary is always there)",
    )
    check(
        "prefix_weight",
        cfg.prefix_weight > 0 or not (cfg.detach_inner_prefixes and cfg.prefix_fractions),
        "be positive with detach_inner_prefixes, or the inner prefixes would learn from no loss",
    )
    _check_choice(cfg, "selection", ("batchtopk", "zscore"))
    check(
        "sparsity_scales",
        cfg.selection == "batchtopk" or not cfg.sparsity_scales,
        "be empty with selection='zscore', which has no budget to scale",
    )
    check(
        "k_initial_multiplier",
        cfg.selection == "batchtopk" or cfg.k_initial_multiplier == 1 or cfg.zscore_z_lr > 0,
        "be 1 with a fixed z-score threshold, which does not follow k",
    )
    check(
        "standardise",
        cfg.selection == "batchtopk" or cfg.standardise == 0,
        "be 0 with selection='zscore', which standardises fully by itself",
    )
    check("zscore_z", math.isfinite(cfg.zscore_z), "be finite")
    check("firing_floor", cfg.firing_floor < 1, "be below 1, the mean firing rate")
    ranked = cfg.selection == "batchtopk" and cfg.standardise == 0
    because = "unless selection='batchtopk' and standardise=0: standardised latents fire equally "
    because += "often by themselves"
    check("firing_floor", cfg.firing_floor == 0 or ranked, f"be 0 {because}")
    check("dense_share_limit", cfg.dense_share_limit == 1 or ranked, f"be 1 {because}")


def _validate_orthogonality(cfg: MultiScaleTrainingSAEConfig) -> None:
    check = partial(_check, cfg)
    _check_choice(cfg, "orthogonality_pairs", ("chunks", "neighbours"))
    _check_choice(cfg, "orthogonality_weighting", ("none", "coactivation"))
    if cfg.orthogonality_coefficient == 0 or cfg.orthogonality_pairs == "neighbours":
        return
    check(
        "sketch_rank",
        cfg.orthogonality_weighting == "none" or cfg.sketch_rank > 0,
        "be positive when chunks are weighted by co-activation, which comes from the sketch",
    )
