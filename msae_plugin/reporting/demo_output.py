"""The demo's table and figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable
from rich.text import Text

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import TEMPORARY_PREFIX
from msae_plugin.common.table import Column, Table
from msae_plugin.evaluation.heldout import HeldoutMetrics
from msae_plugin.reporting.figures import COLOURS, LINES, MARKERS, drawing

MOST_SAES = 4
"""More would hide one another in the figure."""


@dataclass(frozen=True)
class FigureSAE:
    """One SAE of the demo's figure."""

    name: str
    metrics: HeldoutMetrics  # on held-out text, with firing frequencies
    tokens: list[int]  # training tokens of each logged row
    explained_variance: list[float]  # explained variance of the training batches of each logged row
    l0: list[float]  # active latents per token in those batches; not the exported SAE's

    @property
    def training_label(self) -> str:
        """Name and L0 while training: curves at different L0 must not be read as a comparison."""
        first, last = round(self.l0[0]), round(self.l0[-1])
        span = f"{last}" if first == last else f"{first} falling to {last}"
        return f"{self.name} (training L0 {span})"


def training_curve(metrics_file: Path) -> tuple[list[int], list[float], list[float]]:
    """Tokens, explained variance and L0 from a `metrics.jsonl`.

    Raises:
        InputError: The file is missing or not JSON lines.
    """
    try:
        rows = [json.loads(line) for line in metrics_file.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{str(metrics_file)!r} cannot be read: {error}") from error
    rows = [row for row in rows if row.get("explained_variance") is not None]
    return (
        [int(row["tokens"]) for row in rows],
        [row["explained_variance"] for row in rows],
        [row["l0"] for row in rows],
    )


def demo_figure(saes: Sequence[FigureSAE], path: Path, title: str) -> None:
    """Training curves, held-out quality and firing frequencies of a few SAEs, as a PNG.

    Raises:
        InputError: matplotlib is not installed, or there are too many SAEs.
    """
    if not 1 <= len(saes) <= MOST_SAES:
        raise InputError(f"the figure shows 1 to {MOST_SAES} SAEs, not {len(saes)}")
    with drawing(4.2, columns=3, width=13) as canvas:
        curves, quality, firing = canvas.axes
        _draw_curves(curves, saes)
        _draw_quality(quality, saes)
        _draw_firing(firing, saes)
        canvas.figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        canvas.legend_below(most_columns=len(saes))
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    temporary.write_bytes(canvas.png)
    temporary.replace(path)


def _draw_curves(axis: Any, saes: Sequence[FigureSAE]) -> None:
    for sae, colour, line in zip(saes, COLOURS, LINES, strict=False):
        thousands = [tokens / 1000 for tokens in sae.tokens]
        axis.plot(
            thousands, sae.explained_variance, line, color=colour, label=sae.training_label, lw=2
        )
    axis.set_title("Training")
    axis.set_xlabel("training tokens (thousands)")
    axis.set_ylabel("explained variance of training batches")
    axis.set_xlim(left=0)
    # The first rows of a run are far below zero and would flatten everything after them.
    axis.set_ylim(bottom=max(axis.get_ylim()[0], 0.0), top=1.0)


def _draw_quality(axis: Any, saes: Sequence[FigureSAE]) -> None:
    # An arrow says which way is better.
    measures = (
        "explained\nvariance ↑",
        "loss\nrecovered ↑",
        "alive\nlatents ↑",
        "decoder\noverlap ↓",
    )
    offsets = [0.16 * (i - (len(saes) - 1) / 2) for i in range(len(saes))]
    for sae, colour, marker, offset in zip(saes, COLOURS, MARKERS, offsets, strict=False):
        m = sae.metrics
        alive = 1 - m.dead_latents / m.d_sae
        values = (m.explained_variance, m.loss_recovered, alive, m.mean_max_decoder_cosine)
        for place, value in enumerate(values):
            if value is None:
                continue
            shown = min(max(value, 0.0), 1.0)
            axis.vlines(place + offset, 0, shown, color=colour, lw=2, alpha=0.5)
            axis.plot(place + offset, shown, marker, color=colour, ms=8)
            axis.annotate(
                f"{value:.2f}",
                (place + offset, shown),
                xytext=(-7 if offset < 0 else 7, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    axis.set_title("Held-out text")
    axis.set_xticks(range(len(measures)), measures)
    axis.set_ylim(0, 1.1)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.set_ylabel("share; overlap: mean max cosine")
    axis.grid(visible=False, axis="x")


def _draw_firing(axis: Any, saes: Sequence[FigureSAE]) -> None:
    lowest = min(1 / sae.metrics.n_tokens for sae in saes)
    start = torch.tensor(lowest / 2).log10().item()
    edges = torch.logspace(start, 0, 29).tolist()
    notes: list[str] = []
    for sae, colour, line in zip(saes, COLOURS, LINES, strict=False):
        frequency = sae.metrics.firing_frequency
        alive = frequency[frequency > 0].tolist()
        axis.hist(alive, edges, histtype="stepfilled", color=colour, alpha=0.15, edgecolor="none")
        axis.hist(alive, edges, histtype="step", color=colour, ls=line, lw=2)
        notes.append(f"{sae.name}: {sae.metrics.dead_latents} never fire")
    axis.set_xscale("log")
    axis.set_title("How often latents fire")
    axis.set_xlabel("share of held-out tokens on which a latent fires")
    axis.set_ylabel("number of latents")
    axis.set_ylim(top=1.22 * axis.get_ylim()[1])  # room for the note
    axis.text(
        0.98, 0.97, "\n".join(notes), transform=axis.transAxes, ha="right", va="top", fontsize=9
    )


def figure_saes(
    metrics: Mapping[str, HeldoutMetrics], metrics_files: Mapping[str, Path]
) -> list[FigureSAE]:
    """Input of `demo_figure`, from evaluations and training logs by SAE name."""
    return [
        FigureSAE(name, measured, *training_curve(metrics_files[name]))
        for name, measured in metrics.items()
    ]


NOT_DEFINED = "n/a"


@dataclass(frozen=True)
class Definition:
    """A column of the comparison: its key in the JSON, its heading and its meaning."""

    key: str
    title: str
    definition: str  # in which unit, and which way is better


COLUMNS = (
    Definition("l0", "L0", "active latents per token"),
    Definition(
        "explained_variance",
        "explained variance",
        "share of the activations' variance that the reconstruction keeps; higher is better",
    ),
    Definition(
        "loss_recovered",
        "loss recovered",
        "(CE with zeros - CE with the SAE) / (CE with zeros - CE of the model), BOS untouched; "
        "higher is better",
    ),
    Definition(
        "dead_latents",
        "dead latents",
        "latents that fire on none of the held-out tokens; lower is better",
    ),
    Definition(
        "mean_max_decoder_cosine",
        "mean max cosine",
        "mean cosine of a decoder direction to its nearest other one; lower is less overlap",
    ),
    Definition(
        "tokens_per_second",
        "tokens/s",
        "training speed of the SAE's own steps, without the language model; higher is better",
    ),
)


@dataclass(frozen=True)
class ComparisonRow:
    """One SAE of the table."""

    name: str
    metrics: HeldoutMetrics
    tokens_per_second: float | None  # of its training steps; None if not measured in this session

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


def _table(rows: Sequence[ComparisonRow]) -> Table:
    shown = [Column(column.key, column.title, is_number=True) for column in COLUMNS]
    cells = [[row.name, *row.cells()] for row in rows]
    return Table("comparison", "", [Column("name", "SAE"), *shown], cells)


def comparison_table(rows: Sequence[ComparisonRow], title: str) -> RichTable:
    """For a terminal."""
    return _table(rows).terminal(title=Text(title, style="bold"))


def comparison_markdown(rows: Sequence[ComparisonRow]) -> str:
    """The table and its definitions in Markdown."""
    meanings = "\n".join(f"- {column.title}: {column.definition}." for column in COLUMNS)
    return f"{_table(rows).markdown()}\n\n{meanings}\n"


def comparison_json(rows: Sequence[ComparisonRow]) -> dict[str, Any]:
    """The numbers with their definitions."""
    definitions = {column.key: column.definition for column in COLUMNS}
    return {"saes": [row.to_dict() for row in rows], "definitions": definitions}
