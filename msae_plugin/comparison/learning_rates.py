"""`msae tune`: the best learning rate of every method of a comparison, on a seed of its own.

A comparison is fair where every method has its own rate. Each is trained at several, at one L0 and
with a seed that the comparison does not report; where the best lies at the end of what was tried,
the next one is tried as well.

OUTPUT/                  a comparison (`compare.py`) of methods at rates: `<method>_lr0.004`
OUTPUT/rates.json        what was tried and chosen, and what it cost
OUTPUT/tuned.yaml        the recipe with these rates
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from msae_plugin.common.errors import InputError, RunFailure
from msae_plugin.common.recipes import did_you_mean
from msae_plugin.comparison.compare import Comparison
from msae_plugin.comparison.methods import FROZEN
from msae_plugin.comparison.recipe import CompareConfig
from msae_plugin.evaluation.outcomes import definitions

RATES_FILE = "rates.json"
TUNED_FILE = "tuned.yaml"
RATES_FORMAT = "msae_plugin rates 1"
DEFAULT_METRICS = {
    "language_model": ("heldout/explained_variance",),
    "ground_truth": ("ground_truth/f1", "ground_truth/mcc"),
}
"""The score of a rate by kind of comparison; the mean where there are several."""
_FACTOR = 2.0

Run = Callable[[CompareConfig], Comparison]


@dataclass(frozen=True)
class RateChoice:
    """The rate of one method."""

    lr: float | None  # The best one; None where no SAE of the method could be trained
    tried: Mapping[float, float | None]  # Score by rate; None where training failed
    # Rates at which L0 missed its target. They count only where all do, and then the one whose L0
    # is nearest is taken: scores at different L0s say nothing
    missed: Sequence[float]
    at_end: bool  # Whether the best one is the lowest or the highest that was tried, by its score
    tokens: int  # Activations that the trials were trained on, searches for coefficients included


@dataclass(frozen=True)
class TuningPlan:
    """The trials of a search for rates."""

    rates: Sequence[float]  # Of every method at first
    l0: float  # Target L0 of all trials
    seed: int  # Of all trials; none that the comparison reports
    metrics: Sequence[str]  # Names in the rows of comparison.json, whose mean is the score
    extend: int = 3  # How often the rates of a method may be extended
    methods: Sequence[str] | None = None  # Only these; None: all of the recipe

    @classmethod
    def of(
        cls,
        config: CompareConfig,
        rates: Sequence[float],
        *,
        l0: float | None = None,
        seed: int | None = None,
        metrics: Sequence[str] = (),
        extend: int = 3,
        methods: Sequence[str] | None = None,
    ) -> TuningPlan:
        """A plan, checked against the comparison.

        By default at its middle L0, with a seed 100 above its highest one, of all methods, scored
        by `DEFAULT_METRICS`.
        """
        if len(set(rates)) < 2:
            raise InputError("give at least two different --rates")
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise InputError(f"--rates must be positive, not {' '.join(map(str, rates))}")
        seed = max(config.seeds) + 100 if seed is None else seed
        if seed in config.seeds:
            raise InputError(f"--seed {seed} is a seed that the comparison reports: take another")
        known = tunable_methods(config)
        unknown = [name for name in methods or () if name not in known]
        if unknown:
            raise InputError(f"--only {unknown[0]!r} is none of {', '.join(known)}")
        if not known:
            raise InputError("the recipe has no 'saes' to tune; variants of a ladder share a rate")
        l0 = sorted(config.l0)[len(config.l0) // 2] if l0 is None else l0
        metrics = tuple(metrics) or DEFAULT_METRICS[config.kind]
        own = ("training/", "heldout/" if config.synthetic is None else "ground_truth/")
        measured = [name for name in definitions("comparison") if name.startswith(own)]
        for name in metrics:
            if name not in measured:
                hint = did_you_mean(name, measured)
                raise InputError(f"--metric {name!r} is none of this comparison's: {hint}")
        return cls(sorted(set(rates)), l0, seed, metrics, extend, methods)


def tunable_methods(config: CompareConfig) -> list[str]:
    """Methods of a comparison that are trained; variants of a ladder are not among them."""
    return [name for name, sae in config.saes.items() if sae.get("control") in (None, FROZEN)]


def rates_config(
    config: CompareConfig, plan: TuningPlan, rates: Mapping[str, Sequence[float]]
) -> CompareConfig:
    """The comparison of methods at rates."""
    values = config.to_dict()
    values["saes"] = {
        trial_name(name, rate): {**config.saes[name], "lr": rate}
        for name, of_method in rates.items()
        for rate in sorted(of_method)
    }
    values |= {"l0": [plan.l0], "seeds": [plan.seed], "ladder": None, "reference": None}
    if config.synthetic is None:
        values["evaluation"] = None
        values["heldout"] = {**values["heldout"], "contexts": 0}
    return CompareConfig.from_dict(values)


def trial_name(method: str, rate: float) -> str:
    """Name of a method at a rate."""
    return f"{method}_lr{rate:g}"


def tune(config: CompareConfig, plan: TuningPlan, run: Run) -> dict[str, RateChoice]:
    """Try, choose, extend; the choice by method.

    `run` runs a comparison in a folder that keeps what it has trained.
    """
    methods = [m for m in tunable_methods(config) if plan.methods is None or m in plan.methods]
    rates = {method: sorted(plan.rates) for method in methods}
    for round_ in range(plan.extend + 1):
        comparison = run(rates_config(config, plan, rates))
        assert comparison.contents is not None, "it was not one of several shards"
        rows = {str(row["method"]): row for row in comparison.contents["rows"]}
        choices = {method: _choice(method, rates[method], rows, plan) for method in methods}
        open_ended = [method for method in methods if choices[method].at_end]
        if not open_ended or round_ == plan.extend:
            return choices
        for method in open_ended:
            best, tried = choices[method].lr, rates[method]
            assert best is not None, "it is at an end"
            rates[method] = sorted(
                {*tried, best * _FACTOR if best == tried[-1] else best / _FACTOR}
            )
    raise AssertionError("the last round returns")


def _choice(
    method: str,
    rates: Sequence[float],
    rows: Mapping[str, Mapping[str, Any]],
    plan: TuningPlan,
) -> RateChoice:
    tried: dict[float, float | None] = {}
    missed: dict[float, float] = {}  # with the distance from the target, in logarithms
    tokens = 0
    for rate in rates:
        row = rows.get(trial_name(method, rate))
        tried[rate] = None if row is None else _score(row, plan.metrics)
        if row is not None:
            tokens += int(row["training_tokens"]) + int(row["search_tokens"])
            if not row.get("l0_matched", True):
                missed[rate] = abs(math.log(max(float(row["l0_measured"]), 1e-9) / plan.l0))
    scored = {rate: score for rate, score in tried.items() if score is not None}
    matched = {rate: score for rate, score in scored.items() if rate not in missed}
    if matched:
        best = max(matched, key=matched.__getitem__)
        return RateChoice(best, tried, [*missed], best in (rates[0], rates[-1]), tokens)
    nearest = min(scored, key=missed.__getitem__) if scored else None
    return RateChoice(nearest, tried, [*missed], False, tokens)


def _score(row: Mapping[str, Any], metrics: Sequence[str]) -> float | None:
    """Mean of the metrics; None where one is no number, as of an SAE that has collapsed."""
    found: Mapping[str, Any] = row["metrics"]
    absent = [name for name in metrics if name not in found]
    if absent:
        known = ", ".join(sorted(found))
        raise RunFailure(f"{row['name']}: there is no metric {absent[0]!r}; there are {known}")
    score = sum(float(found[name]) for name in metrics) / len(metrics)
    return score if math.isfinite(score) else None


def rates_contents(plan: TuningPlan, choices: Mapping[str, RateChoice]) -> dict[str, Any]:
    """Contents of rates.json."""
    return {
        "format": RATES_FORMAT,
        "l0": plan.l0,
        "seed": plan.seed,
        "metrics": list(plan.metrics),
        "tokens": sum(choice.tokens for choice in choices.values()),
        "methods": {
            name: {
                **asdict(choice),
                "tried": {f"{rate:g}": score for rate, score in choice.tried.items()},
            }
            for name, choice in choices.items()
        },
    }


def with_rates(recipe: Mapping[str, Any], choices: Mapping[str, RateChoice]) -> dict[str, Any]:
    """A recipe with the chosen rates."""
    tuned = copy.deepcopy(dict(recipe))
    for name, choice in choices.items():
        if choice.lr is not None:
            tuned["saes"][name]["lr"] = choice.lr
    return tuned
