"""The demo's table and figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from msae_plugin.common.errors import InputError
from msae_plugin.common.files import TEMPORARY_PREFIX
from msae_plugin.evaluation.heldout import HeldoutMetrics

# Okabe and Ito's palette: told apart with any common colour blindness; the line styles and markers
# below tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")


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


def _pyplot() -> Any:
    # matplotlib is optional, and importing it takes half a second.
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "figures need matplotlib, which is not installed: pip install 'msae-plugin[report]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def require_matplotlib() -> None:
    """Refuse early, before minutes of training.

    Raises:
        InputError: matplotlib is not installed.
    """
    _pyplot()


def demo_figure(saes: Sequence[FigureSAE], path: Path, title: str) -> None:
    """Training curves, held-out quality and firing frequencies of a few SAEs.

    Raises:
        InputError: matplotlib is not installed, or there are too many SAEs for the palette.
    """
    if not 1 <= len(saes) <= len(COLOURS):
        raise InputError(f"the figure shows 1 to {len(COLOURS)} SAEs, not {len(saes)}")
    plt = _pyplot()
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=(1.1, 1, 1.1)
        )
        _draw_curves(axes[0], saes)
        _draw_quality(axes[1], saes)
        _draw_firing(axes[2], saes)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(saes), frameon=False)
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
        try:
            figure.savefig(temporary, dpi=150, format="png")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            plt.close(figure)


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
    found: list[FigureSAE] = []
    for name, measured in metrics.items():
        found.append(FigureSAE(name, measured, *training_curve(metrics_files[name])))
    return found


NOT_DEFINED = "n/a"


@dataclass(frozen=True)
class Column:
    """One column of the comparison."""

    key: str  # name in the JSON
    title: str
    definition: str  # what it is, in which unit, and which way is better


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
    """One SAE of the table."""

    name: str  # its name in the run
    metrics: HeldoutMetrics  # on held-out text
    # Speed of its training steps; None if not measured in this session.
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
