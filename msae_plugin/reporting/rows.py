"""Measurements in one shape: rows, groups over seeds, differences, what is missing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

from msae_plugin.common.errors import InputError
from msae_plugin.common.table import Spread, spread
from msae_plugin.comparison.statistics import NO_DIFFERENCE, PairedDifference, paired_difference
from msae_plugin.reporting.metrics import Definition, roles_of

Wording = Literal["better", "worse", "higher", "lower", "no difference shown", "one pair"]


Key = TypeVar("Key")


def difference_of(
    ours: Mapping[Key, float], theirs: Mapping[Key, float]
) -> PairedDifference | None:
    """Ours minus theirs, over the pairs that both have; None without one."""
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


OTHER_L0_RATIO = 1.1
"""Measured L0s further apart than this are not called matched."""


@dataclass(frozen=True)
class Row:
    """One SAE (or one evaluation seed of one), measured."""

    name: str
    method: str  # what it is an instance of; rows of a method differ in L0 and seed
    architecture: str = ""  # as SAELens calls it; empty when not recorded
    preset: str | None = None  # of `multiscale`, or None
    hook: str | None = None  # where it reads; None when not recorded
    l0_target: float | None = None  # the L0 that was asked for; None without one
    seed: int | None = None  # what pairs it with rows of other methods
    lr: float | None = None
    folder: str | None = None  # of the SAE, as recorded
    training_steps: int | None = None  # None when not recorded
    training_tokens: int | None = None  # of the training itself
    search_tokens: int | None = None  # spent on finding the coefficient that gives the L0
    seconds: float | None = None  # of its training
    control: str | None = None  # what it controls for, or None
    # Method that it is to be compared with; None for the reference of all.
    against: str | None = None
    part: str | None = None  # of the source's ladder that it belongs to; None for other methods
    mechanism: str | None = None  # what a variant of the ladder is
    claim: str | None = None  # what it is for in the source
    l0_missed: float | None = None  # the L0 that it ended at, where that is not its target
    # Finite values by metric.
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    unmeasured: Sequence[str] = ()  # metrics that are recorded without a finite value


def row_from(values: Mapping[str, Any]) -> Row:
    """A row of a `comparison.json`. Fields that it lacks are not recorded; others are ignored."""
    metrics = cast("Mapping[str, Any]", values["metrics"])
    real = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
    control = values.get("control")
    return Row(
        name=str(values["name"]),
        method=str(values["method"]),
        architecture=str(values.get("architecture") or ""),
        preset=values.get("preset"),
        hook=values.get("hook"),
        l0_target=_number(values.get("l0_target")),
        seed=values.get("seed"),
        lr=_number(values.get("lr")),
        folder=values.get("folder"),
        training_steps=values.get("training_steps"),
        training_tokens=values.get("training_tokens"),
        search_tokens=values.get("search_tokens"),
        seconds=_number(values.get("seconds")),
        # `control: true` says that it is one, a text says what for.
        control=str(control) if control else None,
        against=values.get("against"),
        part=values.get("group"),
        mechanism=values.get("mechanism"),
        claim=values.get("claim"),
        l0_missed=_number(values.get("l0_measured")) if values.get("l0_matched") is False else None,
        metrics=real,
        unmeasured=[name for name in metrics if name not in real],
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


@dataclass(frozen=True)
class Missing:
    """Something that was not measured."""

    where: str  # the comparison, evaluation or run
    what: str  # SAEs or metrics
    status: str  # failed, skipped, not measurable, ...
    reason: str


def _spread(values: Sequence[float]) -> Spread | None:
    return spread(values) if values else None


@dataclass(frozen=True)
class Group:
    """Rows of one method at one target L0: they differ in the seed."""

    method: str
    l0_target: float | None  # None without one
    rows: Sequence[Row]

    @property
    def first(self) -> Row:
        """One of them, for what they share."""
        return self.rows[0]

    @property
    def is_variant(self) -> bool:
        """Whether it belongs to the ladder alone: its references stand among others too."""
        return self.first.part is not None and self.first.against is not None

    def values(self, metric: str) -> dict[int | None, float]:
        """Value by seed, of the rows that have it."""
        return {row.seed: row.metrics[metric] for row in self.rows if metric in row.metrics}

    def spread(self, metric: str) -> Spread | None:
        """Mean over seeds; None when no row has it."""
        return _spread(list(self.values(metric).values()))

    def mean(self, metric: str) -> float | None:
        """The same without the spread."""
        found = self.spread(metric)
        return None if found is None else found.mean

    def recorded(self, read: Callable[[Row], float | None]) -> Spread | None:
        """Mean over seeds of what a row records beside its metrics."""
        return _spread([value for row in self.rows if (value := read(row)) is not None])


@dataclass(frozen=True)
class Bench:
    """SAEs measured on the same data in the same way."""

    name: str
    title: str
    kind: str  # `language_model` or `ground_truth`
    seeds_are: str  # what the spread is over: `training seeds` or `evaluation seeds`
    rows: Sequence[Row]  # what was measured
    definitions: Mapping[str, Definition]
    facts: Sequence[tuple[str, str]]
    missing: Sequence[Missing]  # what was not measured
    # Method that the others are compared with, when the data names one.
    reference: str | None = None

    def metrics(self) -> list[str]:
        """Metrics that any row has, in the order of the definitions."""
        present = {name for row in self.rows for name in row.metrics}
        ordered = [name for name in self.definitions if name in present]
        return ordered + sorted(present - set(ordered))

    def roles(self, keys: Sequence[str]) -> dict[str, str]:
        """Role key to metric, of those that were measured."""
        return roles_of(keys, self.metrics())

    def groups(self) -> list[Group]:
        """Methods in their order, each by target L0.

        Raises:
            InputError: Two rows are the same method, L0, seed and learning rate.
        """
        by_key: dict[tuple[str, float | None], list[Row]] = defaultdict(list)
        order = list(dict.fromkeys(row.method for row in self.rows))
        for row in self.rows:
            by_key[row.method, row.l0_target].append(row)
        found: list[Group] = []
        for (method, l0), rows in by_key.items():
            if len({row.seed for row in rows}) == len(rows):
                found.append(Group(method, l0, rows))
                continue
            for lr in dict.fromkeys(row.lr for row in rows):
                same = [row for row in rows if row.lr == lr]
                if len({row.seed for row in same}) < len(same):
                    raise InputError(
                        f"{self.title}: rows {same[0].name!r} and {same[1].name!r} may be the same "
                        "method, L0 and seed: give what differs between them as another 'method'"
                    )
                label = method if lr is None else f"{method} (lr {lr:g})"
                found.append(Group(label, l0, [replace(row, method=label) for row in same]))
        return sorted(
            found,
            key=lambda group: (
                math.inf if group.l0_target is None else group.l0_target,
                order.index(group.method) if group.method in order else len(order),
            ),
        )

    def variants(self) -> set[str]:
        """Methods that belong to the ladder alone."""
        return {group.method for group in self.groups() if group.is_variant}

    def reference_method(self) -> str | None:
        """Who the others are compared with: as the data says, else batchtopk, else the first."""
        groups = [group for group in self.groups() if group.first.control is None]
        methods = list(dict.fromkeys(group.method for group in groups))
        if self.reference in methods:
            return self.reference
        plain = [g.method for g in groups if g.first.architecture == "batchtopk"]
        plain = [m for m in ("batchtopk", *plain) if m in methods]
        return plain[0] if plain else (methods[0] if methods else None)


@dataclass(frozen=True)
class Difference:
    """A method against another in one metric."""

    ours: str
    theirs: str  # the other one
    l0_target: float | None  # at which target L0; None for all of them together
    metric: str
    found: PairedDifference  # ours minus theirs
    l0_note: str  # set when the two were measured at different L0s


def difference(bench: Bench, ours: Group, theirs: Group, metric: str) -> Difference | None:
    """Compare two groups within seeds; None when they share no seed."""
    found = difference_of(ours.values(metric), theirs.values(metric))
    if found is None:
        return None
    note = l0_note(bench, [(ours, theirs)])
    return Difference(ours.method, theirs.method, ours.l0_target, metric, found, note)


def l0_note(bench: Bench, pairs: Sequence[tuple[Group, Group]]) -> str:
    """Says so when two groups were measured at different L0s; empty otherwise."""
    metric = bench.roles(["l0"]).get("l0")
    for ours, theirs in pairs:
        a, b = (None, None) if metric is None else (ours.mean(metric), theirs.mean(metric))
        if a is None or b is None or min(a, b) <= 0:
            continue
        if max(a, b) / min(a, b) > OTHER_L0_RATIO:
            return f"L0 {a:.1f} against {b:.1f}: not matched"
    return ""


def differences(bench: Bench, metrics: Sequence[str]) -> list[Difference]:
    """Every method against the one that it is to be compared with.

    At each target L0, paired by seed; with several, over all of them too, paired by L0 and seed.
    """
    reference = bench.reference_method()
    groups = bench.groups()
    by_key = {(group.method, group.l0_target): group for group in groups}
    pairs: dict[tuple[str, str], list[tuple[Group, Group]]] = {}
    for group in groups:
        against = str(group.first.against or reference)
        other = by_key.get((against, group.l0_target))
        if other is not None and other is not group:
            pairs.setdefault((group.method, against), []).append((group, other))
    found: list[Difference | None] = []
    for (method, against), matched in pairs.items():
        for metric in metrics:
            found += [difference(bench, *pair, metric) for pair in matched]
            if len(matched) > 1:
                ours, theirs = (
                    {
                        (pair[side].l0_target, seed): value
                        for pair in matched
                        for seed, value in pair[side].values(metric).items()
                    }
                    for side in (0, 1)
                )
                pooled = difference_of(ours, theirs)
                if pooled is not None:
                    note = l0_note(bench, matched)
                    found.append(Difference(method, against, None, metric, pooled, note))
    return [item for item in found if item is not None]
