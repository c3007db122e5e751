"""The comparison table: for a terminal, for Markdown, as JSON; one definition per column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from msae_plugin.evaluation.heldout import HeldoutMetrics

NOT_DEFINED = "n/a"


@dataclass(frozen=True)
class Column:
    """One column of the comparison.

    Args:
        key: Name in the JSON.
        title: Heading.
        definition: What it is, in which unit, and which way is better.
    """

    key: str
    title: str
    definition: str


COLUMNS = (
    Column("l0", "L0", "active latents per token"),
    Column(
        "explained_variance",
        "explained variance",
        "share of the activations' variance that the reconstruction keeps; higher is better",
    ),
    Column(
        "loss_recovered",
        "loss recovered",
        "(CE with zeros - CE with the SAE) / (CE with zeros - CE of the model), BOS untouched; "
        "higher is better",
    ),
    Column(
        "dead_latents",
        "dead latents",
        "latents that fire on none of the held-out tokens; lower is better",
    ),
    Column(
        "mean_max_decoder_cosine",
        "mean max cosine",
        "mean cosine of a decoder direction to its nearest other one; lower is less overlap",
    ),
    Column(
        "tokens_per_second",
        "tokens/s",
        "training speed of the SAE's own steps, without the language model; higher is better",
    ),
)


@dataclass(frozen=True)
class ComparisonRow:
    """One SAE of the table.

    Args:
        name: Its name in the run.
        metrics: On held-out text.
        tokens_per_second: Speed of its training steps; None if not measured in this session.
    """

    name: str
    metrics: HeldoutMetrics
    tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, all numbers unrounded."""
        return {
            "name": self.name,
            **self.metrics.to_dict(),
            "tokens_per_second": self.tokens_per_second,
        }

    def cells(self) -> list[str]:
        """Rounded for reading, in the order of `COLUMNS`."""
        m = self.metrics
        recovered, speed = m.loss_recovered, self.tokens_per_second
        return [
            f"{m.l0:.1f}",
            f"{m.explained_variance:.4f}",
            NOT_DEFINED if recovered is None else f"{recovered:.4f}",
            f"{m.dead_latents} ({m.dead_latents / m.d_sae:.1%})",
            f"{m.mean_max_decoder_cosine:.3f}",
            NOT_DEFINED if speed is None else f"{speed:,.0f}",
        ]


def comparison_table(rows: Sequence[ComparisonRow], title: str) -> Table:
    """For a terminal."""
    table = Table(title=Text(title, style="bold"), title_justify="left")
    table.add_column("SAE", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column.title, justify="right")
    for row in rows:
        table.add_row(Text(row.name, style="bold"), *row.cells())
    return table


def comparison_markdown(rows: Sequence[ComparisonRow]) -> str:
    """The table and its definitions in Markdown."""
    titles = ["SAE", *(column.title for column in COLUMNS)]
    lines = [
        f"| {' | '.join(titles)} |",
        f"|---|{'---:|' * len(COLUMNS)}",
        *(f"| {' | '.join([row.name, *row.cells()])} |" for row in rows),
        "",
        *(f"- {column.title}: {column.definition}." for column in COLUMNS),
    ]
    return "\n".join(lines) + "\n"


def comparison_json(rows: Sequence[ComparisonRow]) -> dict[str, Any]:
    """The numbers with their definitions."""
    definitions: Mapping[str, str] = {column.key: column.definition for column in COLUMNS}
    return {"saes": [row.to_dict() for row in rows], "definitions": dict(definitions)}
