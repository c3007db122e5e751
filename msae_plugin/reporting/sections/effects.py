"""What a mechanism against dead latents changes: SAEs that differ in it alone, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msae_plugin.comparison.statistics import Spread
from msae_plugin.reporting.analyses.per_sae import AnalysedGroup, SAEAnalysis
from msae_plugin.reporting.document import Block, Bullets, CellValue, Table, columns, slug
from msae_plugin.reporting.figures import Panel, panels
from msae_plugin.reporting.metrics import digits_for, number, sentence
from msae_plugin.reporting.places import Place
from msae_plugin.reporting.sections.difference_sections import described_difference
from msae_plugin.reporting.statistics import difference_of

_UNIQUENESS = "ground_truth/uniqueness"


@dataclass(frozen=True)
class Quantity:
    """Something that revival may change.

    Args:
        heading: With its unit.
        higher_is_better: None where neither is.
        read: Its value of an SAE; None when not recorded.
    """

    heading: str
    higher_is_better: bool | None
    read: Callable[[SAEAnalysis], float | None]

    @property
    def arrow(self) -> str:
        """Which way is better."""
        if self.higher_is_better is None:
            return ""
        return " ↑" if self.higher_is_better else " ↓"


def _largest_cluster(place: int) -> Callable[[SAEAnalysis], float | None]:
    def read(analysis: SAEAnalysis) -> float | None:
        return None if analysis.diversity is None else analysis.diversity.clusters[place].largest

    return read


def _single_share(place: int) -> Callable[[SAEAnalysis], float | None]:
    def read(analysis: SAEAnalysis) -> float | None:
        if analysis.diversity is None:
            return None
        clusters = analysis.diversity.clusters[place]
        total = sum(clusters.sizes)
        return clusters.single / total if total else None

    return read


QUANTITIES = (
    Quantity("dead latents at the end", False, lambda a: a.dead),
    Quantity("uniqueness (share)", True, lambda a: a.sae.metrics.get(_UNIQUENESS)),
    Quantity(
        "effective rank of the decoder (dimensions)",
        True,
        lambda a: None if a.diversity is None else a.diversity.effective_rank,
    ),
    Quantity(
        "mean max decoder cosine",
        False,
        lambda a: None if a.diversity is None else a.diversity.mean_max_cosine,
    ),
    Quantity("largest cluster at cos > 0.2 (latents)", False, _largest_cluster(0)),
    Quantity("largest cluster at cos > 0.5 (latents)", False, _largest_cluster(1)),
    Quantity("latents without a neighbour at cos > 0.5 (share)", True, _single_share(1)),
)
"""Dead latents and diversity; thresholds are those of `analysis_decoder.CLUSTER_COSINES`."""


def effect_blocks(
    place: Place, mechanism: str, pairs: Sequence[tuple[AnalysedGroup, AnalysedGroup]]
) -> list[Block]:
    """A sentence per pair, the numbers, and a figure; nothing when nothing is recorded.

    Args:
        place: Where the SAEs are from.
        mechanism: `revival` or `AuxK`.
        pairs: With it and without it, alike in all else.
    """
    rows: list[list[CellValue]] = []
    told: list[str] = []
    for on, off in pairs:
        parts: list[str] = []
        for quantity in QUANTITIES:
            with_it, without = on.spread(quantity.read), off.spread(quantity.read)
            if with_it is None or without is None:
                continue
            found = difference_of(on.values(quantity.read), off.values(quantity.read))
            shown = (
                "no seed in common"
                if found is None
                else described_difference(found, quantity.higher_is_better)
            )
            digits = digits_for([with_it.mean, without.mean])
            rows.append(
                [
                    on.label, off.label, quantity.heading + quantity.arrow,
                    _rounded(with_it, digits), _rounded(without, digits), shown,
                ]
            )  # fmt: skip
            parts.append(
                f"{quantity.heading} {number(without.mean, digits)} without and "
                f"{number(with_it.mean, digits)} with it ({shown})"
            )
        if parts:
            told.append(
                f"{sentence(mechanism)}, {off.label} against {on.label}: {'; '.join(parts)}."
            )
    if not rows:
        return []
    headings = (
        ("on", f"{mechanism} on"), ("off", f"{mechanism} off"), ("quantity", "quantity"),
        ("mean_on", "on"), ("mean_off", "off"), ("difference", "on minus off"),
    )  # fmt: skip
    table = Table(
        place.named(f"effect-of-{slug(mechanism)}"),
        f"SAEs that differ in {mechanism} alone. Mean ± one standard deviation over seeds, and "
        "the paired difference with its 95 % interval.",
        columns(*headings),
        rows,
    )
    figure = _figure(place, mechanism, pairs)
    return [Bullets(told), table, *([] if figure is None else [figure])]


def _figure(
    place: Place, mechanism: str, pairs: Sequence[tuple[AnalysedGroup, AnalysedGroup]]
) -> Block | None:
    """Every pair side by side, without the mechanism on the left."""
    several = len({on.l0_target for on, _ in pairs}) > 1
    groups = [group for on, off in pairs for group in (off, on)]
    categories = [group.label if several else group.method for group in groups]
    shown = [
        Panel(
            quantity.heading + quantity.arrow,
            quantity.heading,
            [
                list(group.values(quantity.read).values())
                for on, off in pairs
                for group in (off, on)
            ],
        )
        for quantity in QUANTITIES
    ]
    return panels(
        place.named(f"effect-of-{slug(mechanism)}-figure"),
        f"Pairs of SAEs that differ in {mechanism} alone, the one without it first. Small marks: "
        "single seeds; large ones: their mean.",
        categories,
        shown,
        f"without {mechanism}, with it",
        connected=False,
    )


def _rounded(value: Spread, digits: int) -> str:
    text = number(value.mean, digits)
    return text if value.std is None else f"{text} ± {number(value.std, digits)}"
