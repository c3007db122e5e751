"""The figures of a report: one style file, one palette, one style per method throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, nan
from statistics import fmean
from typing import Any

from msae_plugin.common.table import digits_for, number
from msae_plugin.evaluation.outcomes import MetricDefinition
from msae_plugin.evaluation.summary import Standing
from msae_plugin.reporting.canvas import Canvas, drawing
from msae_plugin.reporting.document import Figure, slug
from msae_plugin.reporting.results import (
    HEADLINES,
    Difference,
    Group,
    Results,
    sentence,
)

# Okabe and Ito's palette without its yellow and sky blue, the rest darkened to at least 3 : 1
# against white. Markers and lines tell the same apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#007A59", "#B3579A", "#000000", "#A86F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_PUBLISHED = "#737373"
HATCHES = ("", "///", "...", "xx", "\\\\", "++", "oo")
# Of its largest value an axis covers at least this share: small differences look small.
_LEAST_SPAN = 0.05
Points = Mapping[str, Sequence[tuple[float, float, Group]]]


@dataclass(frozen=True)
class Style:
    """How one method is drawn."""

    colour: str  # of lines and marks
    marker: str  # shape of marks
    line: Any


def method_styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style per method; 6 colours, 9 markers and 5 lines repeat together after 90 methods."""
    return {
        method: Style(
            COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], LINES[place % len(LINES)]
        )
        for place, method in enumerate(dict.fromkeys(methods))
    }


def axis_label(heading: str, definition: MetricDefinition | None) -> str:
    """Heading, unit and direction of a metric."""
    if definition is None:
        return heading
    unit = "share" if definition.unit.startswith("share") else definition.unit
    shown = f" ({unit})" if unit not in ("", "none") else ""
    return f"{heading}{shown} {definition.arrow}".rstrip()


def seeds_shown(results: Results) -> str:
    """A sentence on the small marks of a figure; empty when there are none."""
    if not any(len(group.saes) > 1 for group in results.groups):
        return ""
    return f" Small marks: single {results.seeds_are}; large ones: their mean."


def pareto(
    results: Results, key: str, metric: str, l0: str | None, styles: Mapping[str, Style]
) -> list[Figure]:
    """A headline metric against L0, a line per method, every seed shown."""
    points: dict[str, list[tuple[float, float, Group]]] = {}
    for group in results.groups:
        if group.is_variant:
            continue  # fifty lines would hide the others; they are in the ladder
        x = group.l0_target if l0 is None else group.mean(l0)
        y = group.mean(metric)
        if x is not None and y is not None:
            points.setdefault(group.method, []).append((x, y, group))
    if all(len(line) < 2 for line in points.values()):
        return []
    heading, definition = HEADLINES[key].heading, results.definitions.get(metric)
    with drawing(4.6) as canvas:
        for method, line in points.items():
            style = styles[method]
            line.sort(key=lambda point: point[0])
            control = line[0][2].is_control
            (drawn,) = canvas.axis.plot(
                xs := [x for x, _, _ in line], ys := [y for _, y, _ in line],
                linestyle=":" if control else style.line, color=style.colour, marker=style.marker,
                markerfacecolor="white" if control else style.colour, label=line[0][2].label,
            )  # fmt: skip
            canvas.belongs(method, drawn)
            canvas.tells(method, canvas.axis, xs, ys)
            for x, _, group in line:
                l0s = {} if l0 is None else group.values(l0)
                for seed, value in group.values(metric).items() if len(group.saes) > 1 else ():
                    drawn = canvas.axis.plot(
                        l0s.get(seed, x), value, style.marker,
                        color=style.colour, markersize=3.2, alpha=0.55,
                    )  # fmt: skip
                    canvas.belongs(method, *drawn)
        _leave_out_far_controls(canvas.axis, points)
        _do_not_exaggerate(canvas.axis)
        hidden = _outside(canvas.axis, points)
        canvas.axis.set_xlabel("target L0" if l0 is None else "L0 (active latents per token)")
        canvas.axis.set_ylabel(axis_label(heading, definition))
        canvas.legend_below()
    digits = digits_for([y for line in points.values() for _, y, _ in line])
    told = [
        f"{method} " + ", ".join(f"{number(y, digits)} at L0 {number(x, 0)}" for x, y, _ in line)
        for method, line in points.items()
    ]
    direction = {None: "", True: "Up is better.", False: "Down is better."}
    return [
        canvas.drawn(
            f"{results.name}-pareto-{slug(key)}",
            f"{sentence(heading)} against L0. "
            + direction[results.higher_is_better(metric)]
            + seeds_shown(results)
            + (f" Outside of the axes: {', '.join(hidden)}." if hidden else ""),
            f"Lines of {heading} against L0: {'; '.join(told)}.",
        )
    ]


def _leave_out_far_controls(axis: Any, points: Points) -> None:
    """Set limits that fit what is compared, controls apart."""
    ours = [(x, y) for line in points.values() for x, y, group in line if not group.is_control]
    if len(ours) < 2:
        return
    xs, ys = [x for x, _ in ours], [y for _, y in ours]
    margin = 0.25 * (max(ys) - min(ys) or 1.0)
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, min(ys) - margin), min(high, max(ys) + margin))
    _l0_axis(axis, xs)


def _outside(axis: Any, points: Points) -> list[str]:
    """Names and values of controls outside of the axes."""
    (bottom, top), (left, right) = axis.get_ylim(), axis.get_xlim()
    return [
        f"{method} (control) {number(y, 3)} at L0 {number(x, 0)}"
        for method, line in points.items()
        for x, y, _ in line
        if not (bottom <= y <= top and left <= x <= right)
    ]


def _do_not_exaggerate(axis: Any) -> None:
    """Widen an axis of values that are close together."""
    low, high = axis.get_ylim()
    missing = _LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axis.set_ylim(low - missing / 2, high + missing / 2)


def _l0_axis(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where L0 spans more than a factor of four, with plain numbers."""
    if min(values) > 0 and max(values) / min(values) > 4:
        axis.set_xlim(min(values) / 1.2, max(values) * 1.2)
        ticks = [base * 10**power for power in range(5) for base in (1, 2, 5)]
        inside = [tick for tick in ticks if min(values) / 1.5 <= tick <= max(values) * 1.5]
        axis.set_xscale("log")
        axis.set_xticks(inside, [f"{tick:,}" for tick in inside])
        axis.minorticks_off()
    else:
        reach = 0.07 * (max(values) - min(values) or 1.0)
        axis.set_xlim(min(values) - reach, max(values) + reach)


def difference_plot(
    results: Results,
    found: Sequence[Difference],
    key: str,
    styles: Mapping[str, Style],
    name: str | None = None,
) -> list[Figure]:
    """Differences to the reference with their intervals, one line each."""
    drawn = [item for item in found if item.found.low is not None]
    if not drawn:
        return []
    heading = HEADLINES[key].heading
    others = list(dict.fromkeys(item.theirs for item in drawn))
    targets = {item.l0_target for item in drawn}
    labels: list[str] = []
    with drawing(1.5 + 0.30 * len(drawn)) as canvas:
        for place, item in enumerate(drawn):
            style, low, high = styles[item.ours], item.found.low, item.found.high
            line = canvas.axis.plot([low, high], [place, place], color=style.colour, lw=2.2)
            mark = canvas.axis.plot(
                item.found.mean, place, style.marker, color=style.colour,
                markerfacecolor=style.colour if item.found.shown else "white",
            )  # fmt: skip
            canvas.belongs(item.ours, *line, *mark)
            where = "all L0" if item.l0_target is None else f"L0 {item.l0_target:g}"
            ours = item.ours if len(others) == 1 else f"{item.ours} − {item.theirs}"
            labels.append(ours if len(targets) == 1 else f"{ours}, {where}")
        canvas.axis.axvline(0, color="#333333", lw=1)
        canvas.axis.set_yticks(range(len(drawn)), labels, fontsize=8.5)
        canvas.axis.set_ylim(len(drawn) - 0.5, -0.5)
        minus = f", minus {others[0]}" if len(others) == 1 else ""
        label = axis_label(heading, results.definitions.get(drawn[0].metric))
        canvas.axis.set_xlabel(f"{label}{minus}", fontsize=10)
        canvas.axis.locator_params(axis="x", nbins=5)
        canvas.axis.grid(visible=False, axis="y")
    shown = sum(item.found.shown for item in drawn)
    compared = f" from {', '.join(others)}" if len(others) < 4 else ""
    where = "".join(f" at target L0 {l0:g}" for l0 in targets if l0 and len(targets) == 1)
    return [
        canvas.drawn(
            name or f"{results.name}-differences-{slug(key)}",
            f"Paired differences in {heading}{compared}{where} with 95 % t-intervals. "
            "Filled marks: the interval leaves out zero; hollow: no difference shown.",
            f"{len(drawn)} differences in {heading}, of which {shown} have an interval without "
            "zero; the numbers are in the table of differences.",
        )
    ]


def published(standing: Standing, styles: Mapping[str, Style]) -> Figure:
    """SAEs among the published ones: these as lines over L0, ours as large marks."""
    with drawing(4.6) as canvas:
        for place, (method, points) in enumerate(standing.published.items()):
            xs, ys = list(points), list(points.values())
            (line,) = canvas.axis.plot(
                xs, ys, linestyle=LINES[place % len(LINES)], marker=MARKERS[place % len(MARKERS)],
                color=_PUBLISHED, lw=1.2, ms=4, label=method,
            )  # fmt: skip
            canvas.belongs(f"{method}, published", line)
            canvas.tells(f"{method}, published", canvas.axis, xs, ys)
        for name, (l0, score) in standing.own.items():
            colour = styles[name].colour if name in styles else COLOURS[0]
            (mark,) = canvas.axis.plot([l0], [score], "*", color=colour, ms=14, label=name)
            canvas.belongs(name, mark)
            canvas.tells(name, canvas.axis, [l0], [score])
        _do_not_exaggerate(canvas.axis)
        _l0_axis(canvas.axis, canvas.axis.get_xlim())
        canvas.axis.set_xlabel("L0 (active latents per token)")
        canvas.axis.set_ylabel(standing.heading)
        canvas.legend_below()
    own = "; ".join(f"{n} {score:.3f} at L0 {l0:.0f}" for n, (l0, score) in standing.own.items())
    return canvas.drawn(
        slug(f"published {standing.metric} {standing.d_sae}"),
        f"{sentence(standing.heading)} against L0. Stars: the SAEs of this report; grey: SAEs of "
        f"{standing.d_sae:,} latents of the same model and layer ({standing.source}).",
        f"{sentence(standing.heading)} of {own}, among {len(standing.published)} published lines.",
    )


def curves(
    name: str,
    heading: str,
    caption: str,
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    styles: Mapping[str, Style],
    *,
    bottom: float | None = None,
    top: float | None = None,
) -> list[Figure]:
    """Values of training logs against tokens; lines of one method line alike."""
    lines = [line for line in lines if len(line[1]) > 1]
    if not lines:
        return []
    longest = max(tokens[-1] for _, tokens, _ in lines) >= 2e6
    unit, scale = ("millions", 1e6) if longest else ("thousands", 1e3)
    with drawing(4.3) as canvas:
        labelled: dict[str, Any] = {}
        for method, tokens, values in lines:
            style = styles[method]
            xs = [count / scale for count in tokens]
            (drawn,) = canvas.axis.plot(
                xs, list(values), color=style.colour, linestyle=style.line, lw=1.4
            )
            canvas.belongs(method, drawn)
            canvas.tells(method, canvas.axis, xs, values)
            labelled.setdefault(method, drawn)
        canvas.axis.set_xlabel(f"training tokens or samples ({unit})")
        canvas.axis.set_ylabel(heading)
        canvas.axis.set_xlim(left=0)
        if bottom is not None and any(max(values) > bottom for _, _, values in lines):
            canvas.axis.set_ylim(bottom=max(bottom, canvas.axis.get_ylim()[0]))
        if top is not None:
            canvas.axis.set_ylim(top=top)
        canvas.legend_below(labelled)
    digits = digits_for([values[-1] for _, _, values in lines])
    ends = "; ".join(f"{method} ends at {number(v[-1], digits)}" for method, _, v in lines)
    told = f"Curves of {heading} over training: {ends}."
    return [canvas.drawn(name, f"{caption} One line per SAE.", told)]


@dataclass(frozen=True)
class Panel:
    """One metric over categories."""

    heading: str  # over the panel, with unit and direction
    told: str  # in the alternative text
    # Per category one value per seed; an empty list where nothing was measured.
    values: Sequence[Sequence[float]]


def panel_of(results: Results, key: str, metric: str, groups: Sequence[Group]) -> Panel:
    """A headline metric over groups."""
    heading = HEADLINES[key].heading
    values = [list(group.values(metric).values()) for group in groups]
    return Panel(axis_label(heading, results.definitions.get(metric)), heading, values)


def panels(
    name: str,
    caption: str,
    categories: Sequence[str],
    shown: Sequence[Panel],
    x_label: str,
    *,
    colours: Sequence[str] | None = None,
) -> list[Figure]:
    """Metrics over the same categories, one panel under another, every seed shown.

    Categories of several kinds have a colour each; without colours a line joins them.
    """
    shown = [panel for panel in shown if any(panel.values)]
    if not shown:
        return []
    height = 3.6 if len(shown) == 1 else 0.9 + 1.55 * len(shown)
    told: list[str] = []
    with drawing(height + (max(map(len, categories)) > 6), len(shown)) as canvas:
        for axis, panel in zip(canvas.axes, shown, strict=True):
            means = [fmean(values) if values else nan for values in panel.values]
            if colours is None:
                axis.plot(range(len(means)), means, "-", color=COLOURS[0])
            canvas.tells(panel.told, axis, range(len(means)), means, categories)
            for place, values in enumerate(panel.values):
                colour = COLOURS[0] if colours is None else colours[place]
                axis.plot(place, means[place], "o", color=colour)
                if len(values) > 1:
                    axis.plot([place] * len(values), values, "o", color=colour, ms=3, alpha=0.5)
            if len(shown) == 1:
                axis.set_ylabel(panel.heading)
            else:
                axis.set_title(panel.heading, fontsize=10)
            axis.margins(x=0.3 / len(categories), y=0.15)
            _do_not_exaggerate(axis)
            known = {c: m for c, m in zip(categories, means, strict=True) if isfinite(m)}
            digits = digits_for(list(known.values()))
            numbers = ", ".join(f"{c} {number(m, digits)}" for c, m in known.items())
            told.append(f"{panel.told}: {numbers}")
        canvas.categories(categories)
        canvas.axes[-1].set_xlabel(x_label)
    return [canvas.drawn(name, caption, f"{'; '.join(told)}.")]


def bars(
    name: str,
    caption: str,
    alt: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    styles: Mapping[str, Style] | None = None,
    *,
    stacked: bool = False,
) -> Figure:
    """Bars with hatching, for parts and counts; series that are methods have their colours."""
    with drawing(4.0) as canvas:
        width = 0.85 if stacked else 0.85 / max(1, len(series))
        base = [0.0] * len(labels)
        for place, (label, heights) in enumerate(series.items()):
            shift = 0.0 if stacked else (place - (len(series) - 1) / 2) * width
            xs = [i + shift for i in range(len(labels))]
            drawn = canvas.axis.bar(
                xs, list(heights), width,
                bottom=base if stacked else None, label=label,
                color=COLOURS[place % len(COLOURS)] if styles is None else styles[label].colour,
                hatch=HATCHES[place % len(HATCHES)], edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            canvas.belongs(label, *drawn)
            if not stacked:
                canvas.tells(label, canvas.axis, xs, heights, labels)
            if stacked:
                base = [low + high for low, high in zip(base, heights, strict=True)]
        canvas.categories(labels, every=max(1, -(-len(labels) // 10)))
        canvas.axis.set_xlabel(x_label)
        canvas.axis.set_ylabel(y_label)
        canvas.axis.grid(visible=False, axis="x")
        if len(series) > 1:
            canvas.legend_below()
    return canvas.drawn(name, caption, alt)


def steps(
    name: str,
    caption: str,
    alt: str,
    edges: Sequence[float],
    counts: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    styles: Mapping[str, Style],
) -> Figure:
    """Histograms as outlines, one per method."""
    with drawing(4.2) as canvas:
        labelled: dict[str, Any] = {}
        for label, heights in counts.items():
            line_style: dict[str, Any] = {"color": styles[label].colour, "ls": styles[label].line}
            drawn = canvas.axis.stairs(list(heights), list(edges), lw=1.8, **line_style)
            (labelled[label],) = canvas.axis.plot([], [], lw=1.8, **line_style)
            canvas.belongs(label, drawn, labelled[label])
            canvas.tells(label, canvas.axis, _middles(edges), heights)
        canvas.axis.set_xlabel(x_label)
        canvas.axis.set_ylabel(y_label)
        canvas.axis.set_ylim(bottom=0)
        canvas.legend_below(labelled)
    return canvas.drawn(name, caption, alt)


def _middles(edges: Sequence[float]) -> list[float]:
    return [(low + high) / 2 for low, high in pairwise(edges)]


@dataclass(frozen=True)
class Glance:
    """One SAE in the figure at the top of a report."""

    method: str
    curve: Sequence[tuple[float, float, float]]  # tokens, explained variance and L0 while training
    values: Mapping[str, float]  # headline metrics between 0 and 1, by key
    firing: tuple[Sequence[float], Sequence[int], int]  # edges (log10), counts, never fired


def glance(
    name: str, title: str, saes: Sequence[Glance], results: Results, styles: Mapping[str, Style]
) -> Figure:
    """Training curves, quality and firing frequencies of a few SAEs side by side."""
    with drawing(4.2, columns=3, width=13) as canvas:
        training, quality, firing = canvas.axes
        for sae in saes:
            style = styles[sae.method]
            line_style: dict[str, Any] = {"color": style.colour, "ls": style.line, "lw": 2}
            first, last = round(sae.curve[0][2]), round(sae.curve[-1][2])
            # Curves at different L0 must not be read as a comparison.
            span = f"{last}" if first == last else f"{first} falling to {last}"
            tokens = [point[0] / 1000 for point in sae.curve]
            label = f"{sae.method} (training L0 {span})"
            variance = [point[1] for point in sae.curve]
            curve = training.plot(tokens, variance, label=label, **line_style)
            edges, counts, _ = sae.firing
            canvas.belongs(sae.method, *curve, firing.stairs(counts, edges, **line_style))
            canvas.tells(sae.method, training, tokens, variance)
            canvas.tells(sae.method, firing, _middles(edges), counts)
        _draw_quality(canvas, quality, saes, results, styles)
        training.set(title="Training", xlabel="training tokens or samples (thousands)",
                     ylabel="explained variance of training batches", xlim=(0, None))  # fmt: skip
        # The first rows of a run are far below zero and would flatten everything after them.
        training.set_ylim(max(training.get_ylim()[0], 0.0), 1.0)
        firing.set(title="How often latents fire", ylabel="number of latents",
                   xlabel="log10 of the share of training tokens")  # fmt: skip
        firing.set_ylim(top=1.22 * firing.get_ylim()[1])  # room for the note
        silent = "\n".join(f"{sae.method}: {sae.firing[2]} never fire" for sae in saes)
        firing.text(0.98, 0.97, silent, transform=firing.transAxes, ha="right", va="top", size=9)
        canvas.figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        canvas.legend_below(most_columns=len(saes))
    told = "; ".join(
        f"{sae.method} "
        + ", ".join(f"{HEADLINES[key].heading} {value:.3f}" for key, value in sae.values.items())
        for sae in saes
    )
    caption = "At a glance: explained variance while training, the exported SAEs on data not "
    caption += "trained on, and how often latents fire in the last window of training."
    return canvas.drawn(name, caption, f"Three panels; in the middle {told}.")


def _draw_quality(
    canvas: Canvas,
    axis: Any,
    saes: Sequence[Glance],
    results: Results,
    styles: Mapping[str, Style],
) -> None:
    metrics = results.headlines("glance")
    for index, sae in enumerate(saes):
        style, offset = styles[sae.method], 0.16 * (index - (len(saes) - 1) / 2)
        for place, key in enumerate(metrics):
            value = sae.values.get(key)
            if value is None:
                continue
            shown = min(max(value, 0.0), 1.0)
            stem = axis.vlines(place + offset, 0, shown, color=style.colour, lw=2, alpha=0.5)
            mark = axis.plot(place + offset, shown, style.marker, color=style.colour, ms=8)
            told = axis.annotate(
                f"{value:.3f}", (place + offset, shown), xytext=(-10 if offset < 0 else 10, 6),
                textcoords="offset points", ha="center", fontsize=8, color=style.colour,
            )  # fmt: skip
            canvas.belongs(sae.method, stem, *mark, told)
            canvas.tells(sae.method, axis, [place + offset], [value], [HEADLINES[key].heading])
    headings = [
        f"{HEADLINES[key].heading} {definition.arrow if definition else ''}".replace(" ", "\n", 1)
        for key, metric in metrics.items()
        for definition in (results.definitions.get(metric),)
    ]
    axis.set_xticks(range(len(headings)), headings, fontsize=9)
    axis.set_xlim(-0.5, len(headings) - 0.5)
    axis.set_ylim(0, 1.1)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.set(title="On data not trained on", ylabel="share or cosine")
    axis.grid(visible=False, axis="x")
