"""Headline metrics and their headings; how numbers are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Role:
    """A headline metric, which different evaluations measure under different names."""

    key: str
    heading: str  # in the tables of a report, and on axes
    # Metrics that fill it, the preferred first: `evaluation/metric`, or the metric alone for any
    # evaluation.
    names: tuple[str, ...]
    short: str = ""  # heading in the narrow table of an evaluation
    in_report: bool = True


# core's own `explained_variance` is missing on purpose: SAEBench 0.6 computes something else under
# that name (see its definition).
EVERY_ROLE = (
    Role("l0", "L0", ("core/l0", "l0")),
    Role(
        "explained_variance",
        "explained variance",
        ("core/explained_variance_streaming", "explained_variance", "r2"),
        "expl. var.",
    ),
    Role("loss_recovered", "loss recovered", ("core/ce_loss_score", "loss_recovered"), "loss rec."),
    Role(
        "kl",
        "KL",
        ("core/kl_div_with_sae_float32", "core/kl_div_with_sae", "kl"),
        "KL (nats)",
    ),
    Role("f1", "F1", ("f1", "f1_score")),
    Role("mcc", "MCC", ("mcc",)),
    Role("precision", "precision", ("precision",)),
    Role("recall", "recall", ("recall",)),
    Role("uniqueness", "uniqueness", ("uniqueness",)),
    Role("shrinkage", "shrinkage", ("shrinkage",)),
    Role("alive", "alive", ("core/frac_alive", "frac_alive")),
    Role("dead", "dead", ("dead_latents", "dead", "dead_fraction")),
    Role(
        "decoder_cosine",
        "decoder cosine",
        (
            "core/average_max_decoder_cosine_sim",
            "mean_max_decoder_cosine",
            "average_max_decoder_cosine_sim",
        ),
        "dec. cos.",
    ),
    Role("probing_1", "probing top-1", ("sparse_probing/sae_top_1_test_accuracy",), "top-1"),
    Role("probing_2", "", ("sparse_probing/sae_top_2_test_accuracy",), "top-2", in_report=False),
    Role("probing_5", "probing top-5", ("sparse_probing/sae_top_5_test_accuracy",), "top-5"),
    Role("probing_all", "", ("sparse_probing/sae_test_accuracy",), "all latents", in_report=False),
    Role("llm_1", "", ("sparse_probing/llm_top_1_test_accuracy",), "LLM top-1", in_report=False),
    Role("llm", "", ("sparse_probing/llm_test_accuracy",), "LLM", in_report=False),
    Role(
        "sae_probes_1",
        "sae-probes top-1",
        ("sparse_probing_sae_probes/sae_top_1_test_accuracy",),
        "top-1",
    ),
    *(
        Role(f"sae_probes_{name}", "", (f"sparse_probing_sae_probes/{name}",), short, False)
        for name, short in (
            ("sae_top_5_test_accuracy", "top-5"),
            ("sae_top_1_test_auc", "AUC top-1"),
            ("sae_top_5_test_auc", "AUC top-5"),
            ("llm_test_accuracy", "LLM"),
        )
    ),
    Role("unlearning", "unlearning", ("unlearning/unlearning_score",), "score"),
    Role("final_loss", "final loss", ("training/final_loss",)),
)
ROLES = tuple(role for role in EVERY_ROLE if role.in_report)
BY_KEY: Mapping[str, Role] = {role.key: role for role in ROLES}

PARETO = (
    "explained_variance", "loss_recovered", "f1", "mcc", "probing_1", "probing_5", "sae_probes_1",
)  # fmt: skip
"""Roles drawn against L0."""

LADDER = {
    "language_model": (
        "l0", "explained_variance", "loss_recovered", "kl", "alive", "dead", "decoder_cosine",
        "probing_1", "sae_probes_1", "final_loss",
    ),
    "ground_truth": (
        "l0", "explained_variance", "f1", "mcc", "uniqueness", "alive", "dead", "decoder_cosine",
        "final_loss",
    ),
}  # fmt: skip
"""Roles of the ladder's table by kind of data."""

LADDER_PLOTS = 7
"""As many as the source drew."""


@dataclass(frozen=True)
class Definition:
    """Definition of a metric; missing parts are empty."""

    name: str
    definition: str  # A formula or a sentence
    unit: str  # of the value
    tokens: str  # what it covers
    source: str  # whose number it is
    higher_is_better: bool | None  # none where neither is, or nobody said

    @property
    def direction(self) -> str:
        """Which way is better, in words."""
        if self.higher_is_better is None:
            return "neither"
        return "higher" if self.higher_is_better else "lower"

    @property
    def arrow(self) -> str:
        """The same as an arrow, empty where neither is better."""
        if self.higher_is_better is None:
            return ""
        return "↑" if self.higher_is_better else "↓"


def read_definition(name: str, value: Any) -> Definition:
    """A definition as stored; what it lacks stays empty."""
    given: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    higher = given.get("higher_is_better")
    return Definition(
        name=name,
        definition=str(given.get("definition") or "no definition was given"),
        unit=str(given.get("unit") or ""),
        tokens=str(given.get("tokens") or ""),
        source=str(given.get("source") or ""),
        higher_is_better=higher if isinstance(higher, bool) else None,
    )


def metric_of(role: Role, metrics: Iterable[str]) -> str | None:
    """The metric that fills a role, None when there is none."""
    known = list(metrics)
    for name in role.names:
        for metric in known:
            if metric == name:
                return metric
        if "/" in name:
            continue
        for metric in known:
            # core's metrics are named in full above, and training batches are no evaluation.
            evaluation, _, leaf = metric.rpartition("/")
            if leaf == name and evaluation not in ("", "core", "training"):
                return metric
    return None


def roles_of(keys: Iterable[str], metrics: Iterable[str]) -> dict[str, str]:
    """Role key to metric, for those of the roles that were measured."""
    known = list(metrics)
    found = {key: metric_of(BY_KEY[key], known) for key in keys}
    return {key: metric for key, metric in found.items() if metric is not None}


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f} %"


def sentence(text: str) -> str:
    """The same with a capital first letter."""
    return text[:1].upper() + text[1:]
