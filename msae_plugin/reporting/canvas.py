"""A figure being drawn with matplotlib, and what it becomes: a PNG, and an SVG for the page.

The page inlines the SVG in its own colours, tells the value under the pointer, and shows or hides a
series by its entry in the legend (`templates/page.js`). The PNG is for Markdown, model cards and
notebooks.
"""

from __future__ import annotations

import io
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from typing import Any, NamedTuple

from msae_plugin.common.errors import InputError
from msae_plugin.reporting.document import Figure, HoverPoint

DPI = 160
WIDTH = 6.0
"""Inches. Narrow, so that text stays readable on a phone."""
_MOST_POINTS = 200  # Of a line that tell their values; more are too close to be pointed at
_POINTS_PER_INCH = 72
# What a page that is light or dark draws in colours of its own, by the style file's colours.
_PAGE_COLOURS = {
    "#000000": "var(--text)",
    "#333333": "var(--text)",
    "#ffffff": "var(--page)",
    "#dddddd": "var(--line)",
}


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing into memory; refused where it is not installed."""
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


class _Told(NamedTuple):
    """Points of an axis that tell their values."""

    series: str
    axis: Any
    xs: Sequence[float]
    ys: Sequence[float]
    x_names: Sequence[str] | None


class Canvas:
    """A figure being drawn."""

    def __init__(self, figure: Any, axes: Sequence[Any]) -> None:
        self.figure = figure
        self.axes = axes
        self.axis = axes[0]
        self._png = b""
        self._svg = ""
        self._points: list[HoverPoint] = []
        self._series: list[str] = []
        self._told: list[_Told] = []

    def belongs(self, series: str, *artists: Any) -> None:
        """Artists that are shown and hidden with a series."""
        if series not in self._series:
            self._series.append(series)
        for artist in artists:
            artist.set_gid(f"series-{self._series.index(series)}-")

    def tells(
        self,
        series: str,
        axis: Any,
        xs: Sequence[float],
        ys: Sequence[float],
        x_names: Sequence[str] | None = None,
    ) -> None:
        """Points of a series that tell their values under the pointer; their x by name if given."""
        self._told.append(_Told(series, axis, xs, ys, x_names))

    def legend_below(
        self, labelled: Mapping[str, Any] | None = None, most_columns: int | None = None
    ) -> None:
        """A legend under the axes, where it hides nothing."""
        if labelled is None:
            handles, labels = self.axis.get_legend_handles_labels()
            labelled = dict(zip(labels, handles, strict=True))
        if not labelled:
            return
        longest = max(map(len, labelled))
        columns = most_columns or (1 if longest > 40 else 2 if longest > 22 else 3)
        legend = self.figure.legend(
            list(labelled.values()), list(labelled),
            loc="outside lower left", ncols=min(columns, len(labelled)),
        )  # fmt: skip
        entries = zip(labelled.values(), legend.legend_handles, legend.get_texts(), strict=True)
        for drawn, handle, text in entries:
            artist = drawn[0] if isinstance(drawn, tuple) else drawn  # the bars of a series
            if gid := artist.get_gid():
                for part in (handle, text):
                    part.set_gid(gid.replace("series", "legend"))

    def categories(self, labels: Sequence[str], every: int = 1) -> None:
        """Names under the lowest axes, slanted where they are long."""
        slanted = max(map(len, labels), default=0) > 6
        turned = {"rotation": 35, "ha": "right", "fontsize": 9} if slanted else {}
        self.axes[-1].set_xticks(range(0, len(labels), every), list(labels[::every]), **turned)

    def drawn(self, name: str, caption: str, alt: str) -> Figure:
        """The figure, after the block it is drawn in."""
        return Figure(name, caption, alt, self._png, self._svg, self._points)

    def finish(self) -> None:
        """Write both pictures and place the points."""
        # No version of matplotlib and no date in the files: the same data gives the same bytes.
        png, svg = io.BytesIO(), io.StringIO()
        self.figure.savefig(png, dpi=DPI, format="png", metadata={"Software": None})
        self.figure.savefig(
            svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
        self._png, self._svg = png.getvalue(), _for_the_page(svg.getvalue())
        height = self.figure.get_figheight() * _POINTS_PER_INCH
        for told in self._told:
            step = -(-len(told.xs) // _MOST_POINTS)
            heading = told.axis.get_ylabel() or told.axis.get_title(loc="left")
            along = told.axis.get_xlabel()
            # A pixel of room: what lies on the frame is in it, whatever the rounding.
            frame = told.axis.get_window_extent().padded(1)
            for place in range(0, len(told.xs), max(step, 1)):
                x, y = told.xs[place], told.ys[place]
                pixel = told.axis.transData.transform((x, y))
                if not frame.contains(*pixel):  # Outside of the axes, or not measured: NaN.
                    continue
                at = pixel * _POINTS_PER_INCH / self.figure.dpi
                name = f"{along} {x:,.4g}" if told.x_names is None else told.x_names[place]
                text = f"{told.series}\n{heading} {y:,.4g}\n{name}"
                series = self._series.index(told.series) if told.series in self._series else -1
                self._points.append((series, round(at[0], 1), round(height - at[1], 1), text))


def _for_the_page(svg: str) -> str:
    """Matplotlib's SVG with the colours of the page, and series that its script finds."""
    start = svg.index("<svg")
    opening, body = svg[start:].split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box is not None, "matplotlib writes one"
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="(series|legend)-(\d+)-">', r'<g class="\1" data-series="\2">', body)
    # Two figures of a page would share the others, which nothing refers to.
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    for colour, own in _PAGE_COLOURS.items():
        body = body.replace(colour, own)
    return f"<svg {view_box[0]}>{body}".rstrip()


@contextmanager
def drawing(
    height: float = 4.0, rows: int = 1, columns: int = 1, *, width: float = WIDTH
) -> Generator[Canvas]:
    """A figure in inches whose rows share their x axis; its pictures are there after the block."""
    plt = pyplot()
    style = files("msae_plugin.reporting") / "templates" / "report.mplstyle"
    with as_file(style) as path, plt.style.context(path):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), layout="constrained", sharex=rows > 1,
            squeeze=False,
        )  # fmt: skip
        canvas = Canvas(figure, list(axes.flat))
        try:
            yield canvas
            canvas.finish()
        finally:
            plt.close(figure)
