"""What a sweep of interventions gave, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.main import get_metrics_df, get_unlearning_scores
from sae_bench.evals.unlearning.utils.feature_activation import (
    get_top_features,
    load_sparsity_data,
)

from msae_plugin.common.errors import RunFailure
from msae_plugin.evaluation.outcomes import MetricDefinition
from msae_plugin.evaluation.saebench.unlearning.settings import FORGET_DATASET

RETAINED = 0.99
"""The accuracy on the questions to retain below which SAEBench ignores an intervention."""

_ANSWERABLE = "questions that the model answers right in all 24 orders of the choices"
_WITH_FEATURES = "interventions of the sweep that clamp at least one feature"


def _ours(
    definition: str, unit: str, tokens: str, higher_is_better: bool | None = None
) -> MetricDefinition:
    return MetricDefinition(definition, unit, tokens, "msae", higher_is_better)


DEFINITIONS: dict[str, MetricDefinition] = {
    "unlearning_score": MetricDefinition(
        "1 - the lowest accuracy on the questions to forget over interventions whose pooled "
        "accuracy on the questions to retain is at least .99; 0 where none is. Published scores "
        "on Gemma-2-2B are 0.00 to 0.20 and swing 15-fold inside one architecture: compare over "
        "seeds and with the numbers beside it, and rank nothing by it",
        "share of the questions",
        f"{_ANSWERABLE}, in their own order; features are counted on all tokens of the two texts "
        "but BOS, EOS and PAD, and clamped at every position but the first",
        "saebench",
        True,
    ),
    "n_answerable_forget": _ours("questions to forget behind the score", "questions", _ANSWERABLE),
    "n_answerable_retain": _ours("questions to retain behind the score", "questions", _ANSWERABLE),
    "n_forget_features": _ours(
        "features active on the text to forget, and on the text to retain below the largest of "
        "the retain thresholds",
        "features",
        "all tokens of the two texts but BOS, EOS and PAD",
    ),
    "n_interventions": _ours(_WITH_FEATURES, "interventions", _ANSWERABLE),
    "n_qualifying_interventions": _ours(
        f"{_WITH_FEATURES} and keep a pooled accuracy of at least .99 on the questions to retain",
        "interventions",
        _ANSWERABLE,
        True,
    ),
    "best_retained_accuracy": _ours(
        f"highest pooled accuracy on the questions to retain over {_WITH_FEATURES}",
        "share of the questions",
        _ANSWERABLE,
        True,
    ),
    "lowest_forget_accuracy": _ours(
        f"lowest accuracy on the questions to forget over {_WITH_FEATURES}, whatever it costs on "
        "those to retain",
        "share of the questions",
        _ANSWERABLE,
        False,
    ),
}


@dataclass(frozen=True)
class Sweep:
    """All interventions of one SAE.

    Args:
        score: SAEBench's.
        interventions: A row of SAEBench's table for each: accuracy by questions' name, `n_features`
            (those really clamped), `multiplier`, `retain_thres`, `all_side_effects_mcq`.
        features: How many features qualify, by retain threshold.
    """

    score: float
    interventions: list[dict[str, Any]]
    features: dict[float, int]

    def metrics(self) -> dict[str, float]:
        """Numbers by name, less the accuracies where there was nothing to clamp."""
        clamping = [row for row in self.interventions if row["n_features"] > 0]
        numbers = {
            "unlearning_score": self.score,
            "n_forget_features": float(max(self.features.values())),
            "n_interventions": float(len(clamping)),
            "n_qualifying_interventions": float(
                sum(row["all_side_effects_mcq"] >= RETAINED for row in clamping)
            ),
        }
        if clamping:
            numbers["best_retained_accuracy"] = max(row["all_side_effects_mcq"] for row in clamping)
            numbers["lowest_forget_accuracy"] = min(row[FORGET_DATASET] for row in clamping)
        return numbers

    def notes(self, wanted: Sequence[int]) -> list[str]:
        """Where fewer features qualified than were to be clamped."""
        return [
            f"retain threshold {threshold}: {count} features qualify, so n_features "
            f"{', '.join(str(n) for n in sorted(set(wanted)) if n > count)} clamps {count}"
            for threshold, count in self.features.items()
            if count < max(wanted)
        ]


def read_sweep(artifacts: Path, name: str, config: UnlearningEvalConfig) -> Sweep:
    """Read what SAEBench's `run_eval_single_sae` has left.

    Args:
        artifacts: Its artifacts folder.
        name: The SAE's name in it.
        config: The settings it ran with.

    Raises:
        RunFailure: A feature's frequency is NaN: nothing qualifies then, and the score says 0.
    """
    forget, retain = load_sparsity_data(str(artifacts), name)
    forget, retain = np.atleast_1d(forget), np.atleast_1d(retain)  # an SAE of one latent
    if not (np.isfinite(forget).all() and np.isfinite(retain).all()):
        raise RunFailure("unlearning: a feature's frequency is not a number: is the SAE trained?")
    table = get_metrics_df(str(artifacts / name / "results" / "metrics"))
    rows = cast("list[dict[str, Any]]", table.to_dict("records"))
    score = float(get_unlearning_scores(table))
    return Sweep(
        score=score,
        interventions=sorted(
            rows, key=lambda row: (row["retain_thres"], row["n_features"], row["multiplier"])
        ),
        features={
            threshold: len(get_top_features(forget, retain, retain_threshold=threshold))
            for threshold in config.retain_thresholds
        },
    )
