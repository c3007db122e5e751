"""How figures look: one colour, marker and line per method throughout a report."""

from __future__ import annotations

import io
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from msae_plugin.common.errors import InputError

# Okabe and Ito's palette without its yellow and sky blue, the rest darkened to at least 3 : 1
# against white. Markers and lines tell the same apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#007A59", "#B3579A", "#000000", "#A86F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
DPI = 160
WIDTH = 6.0
"""Inches. Narrow, so that text stays readable on a phone."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters everywhere
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
}


@dataclass(frozen=True)
class Look:
    """How one method is drawn.

    Args:
        colour: Of lines and marks.
        marker: Shape of marks.
        line: Dash pattern.
    """

    colour: str
    marker: str
    line: Any


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A look per method; 6 colours, 9 markers and 5 lines repeat together after 90 methods."""
    return {
        method: Look(
            COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], LINES[place % len(LINES)]
        )
        for place, method in enumerate(dict.fromkeys(methods))
    }


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing into memory.

    Raises:
        InputError: matplotlib is not installed.
    """
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


class Canvas:
    """A figure being drawn.

    Args:
        figure: matplotlib's.
        axes: Its axes, in rows.
    """

    def __init__(self, figure: Any, axes: Sequence[Any]) -> None:
        self.figure = figure
        self.axes = axes
        self.png = b""

    @property
    def axis(self) -> Any:
        """The first or only axes."""
        return self.axes[0]

    def legend_below(self, entries: Mapping[str, Any] | None = None) -> None:
        """A legend under the axes, where it hides nothing."""
        if entries is None:
            handles, labels = self.axis.get_legend_handles_labels()
            entries = dict(zip(labels, handles, strict=True))
        if entries:
            longest = max(map(len, entries))
            columns = 1 if longest > 40 else 2 if longest > 22 else 3
            self.figure.legend(
                list(entries.values()),
                list(entries),
                loc="outside lower left",
                ncols=min(columns, len(entries)),
            )


@contextmanager
def drawing(height: float = 4.0, rows: int = 1, *, share_x: bool = False) -> Generator[Canvas]:
    """A figure of one column; `png` holds it when the block ends.

    Args:
        height: In inches.
        rows: Axes under one another.
        share_x: Whether they share their horizontal axis.
    """
    plt = pyplot()
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            rows, 1, figsize=(WIDTH, height), layout="constrained", sharex=share_x, squeeze=False
        )
        canvas = Canvas(figure, [row[0] for row in axes])
        try:
            yield canvas
            stream = io.BytesIO()
            # No version of matplotlib in the file: the same data gives the same bytes.
            figure.savefig(stream, dpi=DPI, format="png", metadata={"Software": None})
            canvas.png = stream.getvalue()
        finally:
            plt.close(figure)
