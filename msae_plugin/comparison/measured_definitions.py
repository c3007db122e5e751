"""What the numbers mean that a comparison measures itself."""

from __future__ import annotations

from collections.abc import Mapping

from msae_plugin.evaluation.outcomes import MetricDefinition

_HELDOUT = "held-out text; BOS, EOS and PAD are left out"
_LOSSES = "the first held-out tokens; predictions made at BOS, EOS and PAD are left out"
_SAMPLES = "fresh samples of the ground truth"
_TRAINING = "training tokens since the last log row"


def _definition(
    definition: str, unit: str, tokens: str, higher: bool | None, source: str = "msae"
) -> MetricDefinition:
    assert source in ("msae", "saebench")
    return MetricDefinition(definition, unit, tokens, "msae", higher)


HELDOUT: Mapping[str, MetricDefinition] = {
    "heldout/explained_variance": _definition(
        "1 - E|x - x_rec|^2 / (E|x|^2 - |E x|^2), over all tokens", "share", _HELDOUT, True
    ),
    "heldout/l0": _definition("active latents per token", "latents per token", _HELDOUT, None),
    "heldout/loss_recovered": _definition(
        "(CE_zero - CE_sae) / (CE_zero - CE_clean)", "share", _LOSSES, True
    ),
    "heldout/ce_clean": _definition("loss of the model itself", "nats per token", _LOSSES, None),
    "heldout/ce_sae": _definition(
        "loss with the reconstruction in place of the activations", "nats per token", _LOSSES, False
    ),
    "heldout/ce_zero": _definition(
        "loss with zeros in place of them", "nats per token", _LOSSES, None
    ),
    "heldout/kl": _definition(
        "KL of the model's next-token distribution from the one with the SAE",
        "nats per token",
        _LOSSES,
        False,
    ),
    "heldout/dead_latents": _definition(
        "latents that fire on none of the tokens", "latents", _HELDOUT, False
    ),
    "heldout/dead_share": _definition(
        "the same as a share of the dictionary", "share", _HELDOUT, False
    ),
    "heldout/mean_max_decoder_cosine": _definition(
        "mean over latents of the largest cosine to another decoder direction",
        "cosine",
        "none",
        None,
    ),
}

GROUND_TRUTH: Mapping[str, MetricDefinition] = {
    "ground_truth/f1": _definition(
        "mean over latents of the F1 of firing against the feature that its decoder direction is "
        "closest to (SAELens' eval_sae_on_synthetic_data)",
        "share",
        _SAMPLES,
        True,
    ),
    "ground_truth/precision": _definition("the same of the precision", "share", _SAMPLES, True),
    "ground_truth/recall": _definition("the same of the recall", "share", _SAMPLES, True),
    "ground_truth/mcc": _definition(
        "mean |cosine| of decoder directions and features in the best one-to-one matching",
        "cosine",
        "none",
        True,
    ),
    "ground_truth/uniqueness": _definition(
        "different features that latents are closest to, per latent", "share", "none", True
    ),
    "ground_truth/explained_variance": _definition(
        "1 - E|x - x_rec|^2 / (E|x|^2 - |E x|^2) of the forward pass, which holds a skip "
        "connection where an SAE has one",
        "share",
        _SAMPLES,
        True,
    ),
    "ground_truth/shrinkage": _definition("mean |x_rec| / |x|; 1 is none", "ratio", _SAMPLES, None),
    "ground_truth/dead_latents": _definition(
        "latents that fire on no sample", "latents", _SAMPLES, False
    ),
    "ground_truth/dead_share": _definition(
        "the same as a share of the dictionary", "share", _SAMPLES, False
    ),
    "ground_truth/l0": _definition(
        "active latents per sample", "latents per sample", _SAMPLES, None
    ),
    "ground_truth/true_l0": _definition(
        "active features per sample", "features per sample", _SAMPLES, None
    ),
    "ground_truth/mean_max_decoder_cosine": HELDOUT["heldout/mean_max_decoder_cosine"],
}

TRAINING: Mapping[str, MetricDefinition] = {
    "training/final_loss": _definition(
        "mean training loss at the end; losses of different architectures are not comparable",
        "squared activation",
        _TRAINING,
        None,
    ),
    "training/explained_variance": _definition(
        "at the end of training, on training batches", "share", _TRAINING, True
    ),
    "training/dead_latents": _definition(
        "latents that have not fired for training.dead_feature_window mini-batches",
        "latents",
        _TRAINING,
        False,
    ),
    "training/step_ms": _definition(
        "time of a step without making or reading its activations", "milliseconds", "none", False
    ),
}


def defined(names: set[str]) -> dict[str, MetricDefinition]:
    """Definitions of the metrics among `names` that are a comparison's own."""
    everything = {**HELDOUT, **GROUND_TRUTH, **TRAINING}
    return {name: everything[name] for name in everything if name in names}
