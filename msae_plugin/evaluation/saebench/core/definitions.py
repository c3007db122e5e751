"""What the numbers of the core evaluation mean."""

from __future__ import annotations

from typing import Literal

from msae_plugin.evaluation.outcomes import MetricDefinition

_REST = "tokens of the sparsity and variance batches, BOS, EOS and PAD left out"
_PREDICTIONS = "predictions made at tokens of the reconstruction batches, BOS, EOS and PAD left out"
_SPECIAL = (
    "; the SAE is left out at these tokens only with exclude_special_tokens_from_reconstruction, "
    "zeros are put at every token"
)


def _theirs(
    definition: str, unit: str, tokens: str, higher_is_better: bool | None
) -> MetricDefinition:
    return MetricDefinition(definition, unit, tokens, "saebench", higher_is_better)


def _ours(
    definition: str, unit: str, tokens: str, higher_is_better: bool | None
) -> MetricDefinition:
    return MetricDefinition(definition, unit, tokens, "msae", higher_is_better)


_NATS: Literal["nats per token"] = "nats per token"

DEFINITIONS: dict[str, MetricDefinition] = {
    "ce_loss_score": _theirs(
        "(CE_zero - CE_sae) / (CE_zero - CE_clean): loss recovered",
        "share", _PREDICTIONS + _SPECIAL, True,
    ),
    "ce_loss_with_sae": _theirs(
        "cross-entropy with the SAE's reconstruction in place of the activations",
        _NATS, _PREDICTIONS + _SPECIAL, False,
    ),
    "ce_loss_without_sae": _theirs(
        "cross-entropy of the model itself", _NATS, _PREDICTIONS, None
    ),
    "ce_loss_with_ablation": _theirs(
        "cross-entropy with zeros in place of the activations", _NATS, _PREDICTIONS + _SPECIAL, None
    ),
    "kl_div_score": _theirs(
        "(KL_zero - KL_sae) / KL_zero from SAEBench's two divergences",
        "share", _PREDICTIONS + _SPECIAL, True,
    ),
    "kl_div_with_sae": _theirs(
        "KL(clean || with the SAE) from logarithms of a softmax in the model's dtype: rounded in "
        "bfloat16, infinite where a probability is 0",
        _NATS, _PREDICTIONS + _SPECIAL, False,
    ),
    "kl_div_with_ablation": _theirs(
        "KL(clean || with zeros), computed as kl_div_with_sae", _NATS, _PREDICTIONS + _SPECIAL, None
    ),
    "kl_div_with_sae_float32": _ours(
        "KL(clean || with the SAE) from float32 log-probabilities",
        _NATS, _PREDICTIONS + _SPECIAL, False,
    ),
    "kl_div_with_ablation_float32": _ours(
        "KL(clean || with zeros) from float32 log-probabilities",
        _NATS, _PREDICTIONS + _SPECIAL, None,
    ),
    "kl_div_score_float32": _ours(
        "(KL_zero - KL_sae) / KL_zero from the two float32 divergences",
        "share", _PREDICTIONS + _SPECIAL, True,
    ),
    "explained_variance": _theirs(
        "SAEBench 0.6's formula, which subtracts the square of E[x^2] where E[x]^2 belongs and "
        "mixes sums with per-dimension means: not an explained variance, kept for comparison",
        "none", _REST, None,
    ),
    "explained_variance_legacy": _theirs(
        "mean over tokens of 1 - |x - x_rec|^2 / |x - mean of its batch|^2, as in published tables",
        "share", _REST, True,
    ),
    "explained_variance_streaming": _ours(
        "1 - E|x - x_rec|^2 / (E|x|^2 - |E x|^2) over all tokens", "share", _REST, True
    ),
    "explained_variance_streaming_with_special": _ours(
        "explained_variance_streaming with every token counted: BOS activations are up to 200 "
        "times as long as others and dominate it",
        "share", "all tokens of the sparsity and variance batches, BOS included", True,
    ),
    "mse": _theirs(
        "mean over tokens of |x - x_rec|^2 / (tokens of the batch): depends on the batch size",
        "squared activation / token", _REST, False,
    ),
    "squared_error_per_token": _ours(
        "E|x - x_rec|^2, summed over dimensions, mean over tokens",
        "squared activation", _REST, False,
    ),
    "cossim": _theirs("mean cosine of x and x_rec", "cosine", _REST, True),
    "l2_norm_in": _theirs("mean |x|", "activation", _REST, None),
    "l2_norm_out": _theirs("mean |x_rec|", "activation", _REST, None),
    "l2_ratio": _theirs("mean |x_rec| / |x|; below 1 is shrinkage", "ratio", _REST, None),
    "relative_reconstruction_bias": _theirs(
        "mean over batches of E|x_rec|^2 / E[x . x_rec]; 1 is unbiased", "ratio", _REST, None
    ),
    "l0": _theirs("mean number of latents that are not 0", "latents per token", _REST, None),
    "l1": _theirs("mean sum of the latents", "activation", _REST, None),
    "frac_alive": _theirs(
        "latents that fire on at least one token", "share of latents", _REST, True
    ),
    "freq_over_1_percent": _theirs(
        "latents that fire on more than 1 % of the tokens", "share of latents", _REST, None
    ),
    "freq_over_10_percent": _theirs(
        "latents that fire on more than 10 % of the tokens", "share of latents", _REST, None
    ),
    "normalized_freq_over_1_percent": _theirs(
        "share of all activity that comes from latents above 1 %", "share", _REST, None
    ),
    "normalized_freq_over_10_percent": _theirs(
        "share of all activity that comes from latents above 10 %", "share", _REST, None
    ),
    "average_max_encoder_cosine_sim": _theirs(
        "mean over latents of the largest cosine to another encoder direction",
        "cosine", "weights only", None,
    ),
    "average_max_decoder_cosine_sim": _theirs(
        "mean over latents of the largest cosine to another decoder direction",
        "cosine", "weights only", False,
    ),
    "total_tokens_eval_reconstruction": _theirs(
        "tokens of the reconstruction batches", "tokens", "all, BOS included", None
    ),
    "total_tokens_eval_sparsity_variance": _theirs(
        "tokens of the sparsity and variance batches", "tokens", "all, BOS included", None
    ),
    "n_tokens": _ours("tokens behind the sparsity and variance metrics", "tokens", _REST, None),
}  # fmt: skip
