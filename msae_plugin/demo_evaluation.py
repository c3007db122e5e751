"""The last part of `msae demo`: SAEBench's own core and sae-probes on both SAEs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msae_plugin.evaluation.outcomes import Reporter
from msae_plugin.models.loading import LanguageModel

EVALUATION_FOLDER = "evaluation"
# Small on purpose: both evaluations together take about two minutes on two cores.
PROTOCOL: dict[str, Any] = {
    "core": {
        "batch_size_prompts": 8,
        "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 10,
        "exclude_special_tokens_from_reconstruction": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
    },
    "sparse_probing_sae_probes": {"ks": [1, 5]},
}
PROBES = ("125_world_country_Italy", "155_athlete_sport_basketball", "127_art_type_song")
"""Of sae-probes' data sets three short ones: 27,000 tokens in all."""
HOW_TO_INSTALL = 'pip install "msae-plugin[eval]"'


def saebench_installed() -> bool:
    """Whether the packages of the extra `eval` are there."""
    return all(importlib.util.find_spec(name) for name in ("sae_bench", "sae_probes"))


def evaluate_with_saebench(
    folders: Sequence[Path],
    output: Path,
    language_model: LanguageModel,
    *,
    text: str,
    heldout_documents: int,
    context_size: int,
    probes: Sequence[str],
    report: Reporter,
) -> dict[str, Any]:
    """Run the demo's protocol on exported SAEs.

    Args:
        folders: The exports.
        output: The demo's folder; results go into `evaluation/`.
        language_model: The model that is loaded already, in float32.
        text: Text whose held-out part core reads, as `data.source` in a recipe.
        heldout_documents: How many documents the training held out.
        context_size: Tokens per window.
        probes: Data sets of sae-probes; none leaves it out.
        report: Shows progress.

    Returns:
        The contents of `summary.json`.
    """
    # Imported here: SAEBench is an extra, and importing it takes seconds.
    from msae_plugin.evaluation.evaluate import evaluate
    from msae_plugin.evaluation.recipe import EvalConfig
    from msae_plugin.saes.load import load_subjects

    read = {"dataset": text, "heldout_documents": heldout_documents, "context_size": context_size}
    evaluations: dict[str, Any] = {"core": {**PROTOCOL["core"], **read}}
    if probes:
        probing = PROTOCOL["sparse_probing_sae_probes"]
        evaluations["sparse_probing_sae_probes"] = {**probing, "dataset_names": list(probes)}
    config = EvalConfig.from_dict({"evaluations": evaluations})
    subjects = load_subjects([str(folder) for folder in folders])
    result = evaluate(
        config, subjects, output / EVALUATION_FOLDER, language_model=language_model, report=report
    )
    return result.summary
