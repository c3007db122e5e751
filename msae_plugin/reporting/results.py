"""The one long table of a report: a row per SAE and metric, groups over seeds, paired differences.

Headline metrics, and what each is used for, are in headlines.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any, Literal, TypeVar

import pandas as pd
import yaml
from scipy.special import stdtrit

from msae_plugin.common.errors import InputError
from msae_plugin.common.table import Column, Spread, spread
from msae_plugin.evaluation.outcomes import MetricDefinition


@dataclass(frozen=True)
class Headline:
    """A headline metric: an entry of headlines.yaml, which explains the fields."""

    key: str
    names: Sequence[str]
    heading: str = ""
    short: str = ""
    terminal: str = ""
    use: Sequence[str] = ()
    purpose: str = ""
    expected: Sequence[str] = ()


HEADLINES: Mapping[str, Headline] = {
    entry["key"]: Headline(**entry)
    for entry in yaml.safe_load(
        (files("msae_plugin.reporting") / "headlines.yaml").read_text(encoding="utf-8")
    )
}


def metric_of(headline: Headline, metrics: Sequence[str]) -> str | None:
    """The metric that a headline stands for among those measured; None when there is none."""
    for name in headline.names:
        if name in metrics:
            return name
        for metric in metrics if "/" not in name else ():
            # core's metrics are named in full above, and training batches are no evaluation.
            evaluation, _, leaf = metric.rpartition("/")
            if leaf == name and evaluation not in ("", "core", "training"):
                return metric
    return None


def headlines_of(keys: Iterable[str], metrics: Sequence[str]) -> dict[str, str]:
    """Headline to metric, of those that were measured."""
    found = {key: metric_of(HEADLINES[key], metrics) for key in keys}
    return {key: metric for key, metric in found.items() if metric is not None}


def read_definition(value: Any) -> MetricDefinition:
    """A definition as stored; what it lacks stays empty."""
    given: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    texts = {key: str(given[key]) for key in ("definition", "unit", "tokens", "source")
             if given.get(key)}  # fmt: skip
    higher = given.get("higher_is_better")
    return MetricDefinition(**texts, higher_is_better=higher if isinstance(higher, bool) else None)


def column_of(key: str, metric: str, definitions: Mapping[str, MetricDefinition]) -> Column:
    """The column of a headline metric: unit and direction under its heading."""
    definition = definitions.get(metric)
    detail = f"{definition.unit} {definition.arrow}".strip() if definition else ""
    return Column(metric, HEADLINES[key].heading, "" if detail == "none" else detail)


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f} %"


def sentence(text: str) -> str:
    """The same with a capital first letter."""
    return text[:1].upper() + text[1:]


FACTS = (
    "name",
    "method",  # its rows differ in L0 and seed
    "architecture",  # as SAELens calls it; empty when not recorded
    "preset",  # of `multiscale`
    "hook",
    "l0_target",  # None for what is not trained for one
    "seed",  # pairs an SAE with those of other methods
    "lr",
    "training_steps",
    "training_tokens",
    "search_tokens",  # spent on finding the coefficient that gives the L0
    "seconds",  # of its training
    "control",  # what it controls for
    "against",  # the method it is compared with; None for the reference of all
    "part",  # of the source's ladder
    "mechanism",  # what a variant of the ladder is
    "claim",  # what it is for in the source
    "l0_missed",  # the L0 it ended at, where that is not its target
)
"""Columns that describe an SAE; None where nothing was recorded."""
Facts = Mapping[str, Any]
MeasuredSAE = tuple[Facts, Mapping[str, float]]


def long_frame(
    saes: Iterable[MeasuredSAE], definitions: Mapping[str, MetricDefinition]
) -> pd.DataFrame:
    """A row per SAE and metric: `row` (numbers the SAEs), FACTS, `metric`, `value`, `unit`."""
    order = {name: place for place, name in enumerate(definitions)}
    records = [
        (row, *(facts.get(fact) for fact in FACTS), metric, metrics[metric],
         definitions[metric].unit if metric in definitions else "")
        for row, (facts, metrics) in enumerate(saes)
        for metric in sorted(metrics, key=lambda name: (order.get(name, len(order)), name))
    ]  # fmt: skip
    # Objects: whole numbers stay whole beside None.
    columns = pd.Index(["row", *FACTS, "metric", "value", "unit"])
    return pd.DataFrame(records, columns=columns, dtype=object)


def one_per_sae(frame: pd.DataFrame) -> pd.DataFrame:
    """The facts, a row per SAE."""
    return frame.drop_duplicates("row")


@dataclass(frozen=True)
class Missing:
    """Something that was not measured."""

    where: str  # the comparison, evaluation or run
    what: str  # SAEs or metrics
    status: str  # failed, skipped, not measurable, ...
    reason: str


@dataclass(frozen=True)
class Group:
    """SAEs of one method at one target L0: they differ in the seed."""

    method: str
    l0_target: float | None
    frame: pd.DataFrame

    @cached_property
    def saes(self) -> pd.DataFrame:
        """The facts, a row per SAE."""
        return one_per_sae(self.frame)

    def fact(self, name: str) -> Any:
        """A fact of the first SAE, for what they share."""
        return self.saes[name].iloc[0]

    @property
    def is_variant(self) -> bool:
        """Whether it belongs to the ladder alone: its references stand among others too."""
        return self.fact("part") is not None and self.fact("against") is not None

    @property
    def is_control(self) -> bool:
        """Whether it is a control, which nobody would use."""
        return self.fact("control") is not None

    @property
    def missed_its_l0(self) -> bool:
        """Whether an SAE ended at another L0 than its target: it is compared with nobody."""
        return any(missed is not None for missed in self.saes["l0_missed"])

    @property
    def label(self) -> str:
        """The method, and whether it is a control."""
        return f"{self.method} (control)" if self.is_control else self.method

    @cached_property
    def _by_metric(self) -> dict[str, dict[int | None, float]]:
        return {
            str(metric): dict(zip(part["seed"], part["value"], strict=True))
            for metric, part in self.frame.groupby("metric", sort=False)
        }

    def values(self, metric: str) -> dict[int | None, float]:
        """Value by seed, of the SAEs that have it."""
        return self._by_metric.get(metric, {})

    def seconds(self) -> dict[int | None, float]:
        """Training time by seed, of the SAEs that record it."""
        known = self.saes.dropna(subset=["seconds"])
        return dict(zip(known["seed"], known["seconds"], strict=True))

    def spread(self, metric: str) -> Spread | None:
        """Mean over seeds; None when no SAE has it."""
        values = self.values(metric)
        return spread(values.values()) if values else None

    def mean(self, metric: str) -> float | None:
        """The same without the spread."""
        found = self.spread(metric)
        return None if found is None else found.mean


Sets = Mapping[tuple[str, str], Mapping[str, float]]
"""Value by data set, of an SAE's name and a metric."""


@dataclass(frozen=True)
class Results:
    """SAEs measured on the same data in the same way."""

    name: str
    title: str
    kind: str  # `language_model` or `ground_truth`
    seeds_are: str  # what the spread is over: `training seeds` or `evaluation seeds`
    frame: pd.DataFrame  # from `long_frame`
    definitions: Mapping[str, MetricDefinition]
    facts: Sequence[tuple[str, str]]
    missing: Sequence[Missing]
    reference: str | None = None  # method that the others are compared with, where the data says so
    source: str = ""  # label of the folder that the SAEs are of
    sets: Sets = field(default_factory=dict[tuple[str, str], Mapping[str, float]])

    @cached_property
    def saes(self) -> pd.DataFrame:
        """The facts, a row per SAE."""
        return one_per_sae(self.frame)

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics that any SAE has, in the order of the definitions."""
        present = set(self.frame["metric"])
        ordered = [name for name in self.definitions if name in present]
        return ordered + sorted(present - set(ordered))

    def headlines(self, use: str = "") -> dict[str, str]:
        """Headline to metric, of those measured: of a use, or all that a report has."""
        keys = [
            key for key, entry in HEADLINES.items()
            if (use in entry.use if use else entry.heading)
        ]  # fmt: skip
        return headlines_of(keys, self.metrics)

    def unfilled(self) -> list[str]:
        """Headings of what such results usually have and these lack."""
        return [
            entry.heading
            for key, entry in HEADLINES.items()
            if self.kind in entry.expected and key not in self.headlines()
        ]

    def higher_is_better(self, metric: str) -> bool | None:
        """As in the metric's definition; None where neither is, or nobody said."""
        definition = self.definitions.get(metric)
        return None if definition is None else definition.higher_is_better

    @property
    def over_training_seeds(self) -> bool:
        """Whether differences between methods may be told from it at all."""
        return self.seeds_are == "training seeds"

    @cached_property
    def groups(self) -> list[Group]:
        """Methods in their order, each by target L0, the lowest first."""
        order = {method: place for place, method in enumerate(self.saes["method"].unique())}
        found: list[Group] = []
        for (method, l0), frame in _grouped(self.frame, ["method", "l0_target"]):
            if one_per_sae(frame)["seed"].is_unique:
                found.append(Group(method, l0, frame))
                continue
            for (lr,), same in _grouped(frame, ["lr"]):
                saes = one_per_sae(same)
                if not saes["seed"].is_unique:
                    first, second = saes["name"].iloc[:2]
                    raise InputError(
                        f"{self.title}: rows {first!r} and {second!r} may be the same "
                        "method, L0 and seed: give what differs between them as another 'method'"
                    )
                label = method if lr is None else f"{method} (lr {lr:g})"
                found.append(Group(label, l0, same.assign(method=label)))
        found.sort(key=lambda group: order.get(group.method, len(order)))
        return sorted(found, key=lambda g: math.inf if g.l0_target is None else g.l0_target)

    @cached_property
    def candidates(self) -> list[Group]:
        """Groups that one may choose between: no controls, no rungs of the ladder."""
        return [group for group in self.groups if not group.is_control and not group.is_variant]

    @cached_property
    def variants(self) -> set[str]:
        """Methods that belong to the ladder alone."""
        return {group.method for group in self.groups if group.is_variant}

    @cached_property
    def reference_method(self) -> str | None:
        """Who the others are compared with: as the data says, else batchtopk, else the first."""
        groups = [group for group in self.groups if not group.is_control]
        methods = list(dict.fromkeys(group.method for group in groups))
        plain = [group.method for group in groups if group.fact("architecture") == "batchtopk"]
        chosen = [self.reference, "batchtopk", *plain, *methods]
        return next((method for method in chosen if method in methods), None)


def _grouped(
    frame: pd.DataFrame, keys: list[str]
) -> Iterable[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Parts by the values of some columns, None among them, in the order of the data."""
    for _, part in frame.groupby(keys, dropna=False, sort=False):
        yield tuple(part[key].iloc[0] for key in keys), part


# One rule of wording for every table: a difference whose interval contains zero is "no difference
# shown", never a win. Two methods are paired where they have the same hook, target L0 and seed: the
# same activations in the same order, at the same sparsity.
CONFIDENCE = 0.95
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences first - second over pairs, with a t-interval."""

    mean: float
    low: float | None  # Lower end of the interval; None for a single pair, which has none
    high: float | None
    n_pairs: int

    @property
    def shown(self) -> bool:
        """Whether zero is outside the interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_difference(
    differences: Sequence[float], confidence: float = CONFIDENCE
) -> PairedDifference:
    """The t-interval of the mean of paired differences: mean +- t(n - 1) s / sqrt(n).

    Raises ValueError without a pair, or where the (two-sided) confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    found = spread(differences)
    if found.std is None:
        return PairedDifference(found.mean, None, None, 1)
    quantile = float(stdtrit(found.n - 1, (1 + confidence) / 2))
    half = quantile * found.std / found.n**0.5
    return PairedDifference(found.mean, found.mean - half, found.mean + half, found.n)


Wording = Literal["better", "worse", "higher", "lower", "no difference shown", "one pair"]
Key = TypeVar("Key", bound=Hashable)

OTHER_L0_RATIO = 1.1
"""Measured L0s further apart than this are not called matched."""


def difference_of(
    ours: Mapping[Key, float], theirs: Mapping[Key, float]
) -> PairedDifference | None:
    """Ours minus theirs, over the pairs (a seed, or L0 and seed) that both have; None without."""
    found = [value - theirs[key] for key, value in ours.items() if key in theirs]
    return paired_difference(found) if found else None


def wording(difference: PairedDifference, higher_is_better: bool | None) -> Wording:
    """The word for a difference."""
    if difference.low is None:
        return "one pair"
    if not difference.shown:
        return NO_DIFFERENCE
    if higher_is_better is None:
        return "higher" if difference.mean > 0 else "lower"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class Difference:
    """A method against another in one metric."""

    ours: str
    theirs: str
    l0_target: float | None  # None for all of them together
    metric: str
    found: PairedDifference  # ours minus theirs
    l0_note: str  # set when the two were measured at different L0s
    over: str = "seeds"  # what the pairs are: seeds, or data sets where there is one seed


def difference(
    results: Results, pairs: Sequence[tuple[Group, Group]], metric: str
) -> Difference | None:
    """Ours against theirs within seeds, over one L0 or several; None when they share no seed.

    With one pair of seeds, over the data sets where the evaluation has several: that one SAE is
    better than that other, not that another seed would be.
    """
    ours, theirs = (
        {
            (pair[side].l0_target, seed): value
            for pair in pairs
            for seed, value in pair[side].values(metric).items()
        }
        for side in (0, 1)
    )
    found = difference_of(ours, theirs)
    if found is None:
        return None
    first, other = pairs[0]
    over = "seeds"
    if found.n_pairs == 1:
        ours_by_set, theirs_by_set = (
            results.sets.get((str(group.fact("name")), metric), {}) for group in (first, other)
        )
        by_set = difference_of(ours_by_set, theirs_by_set)
        if by_set is not None and by_set.n_pairs > 1:
            found, over = by_set, "data sets"
    l0 = first.l0_target if len(pairs) == 1 else None
    return Difference(first.method, other.method, l0, metric, found, l0_note(results, pairs), over)


def l0_note(results: Results, pairs: Sequence[tuple[Group, Group]]) -> str:
    """Says so when two groups were measured at different L0s; empty otherwise."""
    metric = results.headlines().get("l0", "")
    for ours, theirs in pairs:
        a, b = ours.mean(metric), theirs.mean(metric)
        if a is not None and b is not None and 0 < OTHER_L0_RATIO * min(a, b) < max(a, b):
            return f"L0 {a:.1f} against {b:.1f}: not matched"
    return ""


def differences(results: Results, metrics: Sequence[str]) -> list[Difference]:
    """Every method against the one that it is to be compared with.

    At each target L0, paired by seed; with several, over all of them too, paired by L0 and seed.
    """
    by_key = {(group.method, group.l0_target): group for group in results.groups}
    pairs: dict[tuple[str, str], list[tuple[Group, Group]]] = {}
    for group in results.groups:
        against = str(group.fact("against") or results.reference_method)
        other = by_key.get((against, group.l0_target))
        if other is not None and other is not group:
            pairs.setdefault((group.method, against), []).append((group, other))
    found: list[Difference | None] = []
    for matched in pairs.values():
        for metric in metrics:
            found += [difference(results, [pair], metric) for pair in matched]
            if len(matched) > 1:
                found.append(difference(results, matched, metric))
    return [item for item in found if item is not None]


@dataclass(frozen=True)
class Lead:
    """Who has the best mean of a metric at an L0, and the next."""

    l0_target: float | None
    key: str  # of the headline metric
    metric: str
    best: Group
    second: Group
    found: Difference | None  # best minus second; None when they share no seed

    @property
    def shown(self) -> bool:
        """Whether best and next are told apart, at one L0."""
        return self.found is not None and self.found.found.shown and not self.found.l0_note


def leads(results: Results, use: str) -> list[Lead]:
    """By target L0 and headline metric of a use, where two methods or more have it.

    Controls and the ladder's variants are left out: among fifty, one is always ahead by chance. So
    is what missed its L0: whoever fires ten times as often reconstructs better.
    """
    found: list[Lead] = []
    groups = [group for group in results.candidates if not group.missed_its_l0]
    for l0 in dict.fromkeys(group.l0_target for group in groups):
        for key, metric in results.headlines(use).items():
            higher = results.higher_is_better(metric)
            known = [group for group in groups if group.l0_target == l0 and group.values(metric)]
            if higher is None or len(known) < 2:
                continue
            first, second = sorted(known, key=lambda g: g.mean(metric) or 0.0, reverse=higher)[:2]
            compared = difference(results, [(first, second)], metric)
            found.append(Lead(l0, key, metric, first, second, compared))
    return found
