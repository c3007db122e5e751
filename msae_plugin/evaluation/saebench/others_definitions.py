"""What the numbers of SAEBench's further evaluations mean, and how far they can be trusted."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, cast

from sae_bench.evals.absorption.eval_output import AbsorptionMeanMetrics
from sae_bench.evals.autointerp.eval_output import AutoInterpMetrics
from sae_bench.evals.meta_structure.eval_output import MetaStructureMetrics
from sae_bench.evals.ravel.eval_output import RAVELMetricResults
from sae_bench.evals.scr_and_tpp.eval_output import ScrMetrics, TppMetrics

from msae_plugin.evaluation.outcomes import MetricDefinition

METRICS: dict[str, type[Any]] = {
    "absorption": AbsorptionMeanMetrics,
    "scr": ScrMetrics,
    "tpp": TppMetrics,
    "ravel": RAVELMetricResults,
    "autointerp": AutoInterpMetrics,
    "meta_structure": MetaStructureMetrics,
}
"""SAEBench's class of results, by evaluation."""

NOT_OF_THE_SAE = frozenset({"train_time_seconds"})
"""Fields of SAEBench's results that measure the machine; they stay in its JSON."""

_CHANIN = "Chanin, Are Sparse Autoencoder Benchmarks Reliable?, arXiv 2605.18229"

RELIABILITY = {
    "absorption": (
        "absorption_fraction was redefined in SAEBench 0.6.0 and is not comparable with published "
        f"numbers ({_CHANIN}); SAEBench advises against models below 1B parameters and SAEs below "
        "16k latents, and an undertrained SAE scores low for want of features"
    ),
    "scr": f"discredited as a metric of SAEs ({_CHANIN})",
    "tpp": f"discredited as a metric of SAEs ({_CHANIN})",
    "ravel": (
        "a mask is trained on the latents of each attribute, so the score is that of SAE and mask "
        "together; Gemma-2 and GPT-NeoX models only"
    ),
    "autointerp": (
        "depends on the judge, OpenAI's gpt-4o-mini, which changes without notice and does not "
        "answer the same twice"
    ),
    "meta_structure": (
        "how well a small SAE reconstructs the decoder; read as structure that directions share "
        "(Bussmann et al., Matryoshka SAEs, ICML 2025, appendix D.1), and no measure of quality"
    ),
}
"""What is known of each evaluation's reliability."""

_TOKENS = {
    "absorption": "single-token words of the vocabulary in SAEBench's spelling prompts",
    "scr": "tokens of the probes' texts without BOS, EOS and PAD, averaged per text",
    "tpp": "tokens of the probes' texts without BOS, EOS and PAD, averaged per text",
    "ravel": "last token of the entity in RAVEL's prompts that the model answers correctly",
    "autointerp": "windows of SAEBench's text corpus; BOS, EOS and PAD do not count as activations",
    "meta_structure": "none: rows of the decoder",
}
# In the order of their patterns, the first that fits.
_UNITS = (
    (r".*num_split_features", "latents per letter"),
    (r"(scr|tpp)_.*(diff_only|total_metric)", "difference of two accuracies"),
    (r"scr_.*", "share of the probe's bias removed"),
    (r"final_reconstruction_mse", "squared decoder units per entry"),
    (r".*", "share"),
)
_BETTER = (
    (r"mean_(absorption_fraction|full_absorption)_score", False),
    (r"scr_metric_.*", True),
    (r"tpp_.*_(total_metric|intended_diff_only)", True),
    (r"tpp_.*_unintended_diff_only", False),
    (r"(disentanglement|cause|isolation)_score", True),
    (r"autointerp_score", True),
    (r".*", None),
)


def definition(evaluation: str, metric: str) -> MetricDefinition:
    """The definition of a metric, in SAEBench's own words, and what is known of it.

    Args:
        evaluation: Its name.
        metric: A field of SAEBench's results.

    Raises:
        KeyError: SAEBench's results have no such field.
    """
    fields = {item.name: item for item in dataclasses.fields(METRICS[evaluation])}
    # pydantic keeps title and description in what dataclasses call the default.
    description: str = cast("Any", fields[metric].default).description
    return MetricDefinition(
        definition=f"{description.rstrip('.')}. Reliability: {RELIABILITY[evaluation]}",
        unit=_first(_UNITS, metric),
        tokens=_TOKENS[evaluation],
        source="saebench",
        higher_is_better=_first(_BETTER, metric),
    )


def _first(table: tuple[tuple[str, Any], ...], metric: str) -> Any:
    return next(value for pattern, value in table if re.fullmatch(pattern, metric))
