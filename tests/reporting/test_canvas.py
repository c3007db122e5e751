"""Figures as the page has them: the same bytes again, its colours, and where the values are."""

from __future__ import annotations

import re
from math import nan

import pytest

from msae_plugin.reporting.canvas import drawing
from msae_plugin.reporting.document import Figure
from msae_plugin.reporting.figures import Panel, Style, curves, panels

HOSTILE = '</svg><script>alert("1")</script> & x'
STYLES = {HOSTILE: Style("#0072B2", "o", "-"), "b": Style("#000000", "s", "--")}


@pytest.fixture(scope="module")
def figure() -> Figure:
    lines = [(HOSTILE, [1e3, 2e3, 3e3], [0.1, 0.4, 0.5]), ("b", [1e3, 2e3], [0.2, 0.3])]
    (drawn,) = curves("name", "explained variance", "A caption.", lines, STYLES)
    return drawn


def test_the_same_data_gives_the_same_bytes(figure: Figure) -> None:
    lines = [(HOSTILE, [1e3, 2e3, 3e3], [0.1, 0.4, 0.5]), ("b", [1e3, 2e3], [0.2, 0.3])]
    (again,) = curves("name", "explained variance", "A caption.", lines, STYLES)
    assert (again.png, again.svg) == (figure.png, figure.svg)


def test_the_page_colours_it_and_finds_its_series(figure: Figure) -> None:
    assert figure.svg.startswith('<svg viewBox="0 0 432 ')
    assert figure.svg.endswith("</svg>")
    assert "var(--text)" in figure.svg
    assert not re.search("#ffffff|#000000|#dddddd|<style|<metadata|<g id", figure.svg)
    drawn = re.findall(r'<g class="(series|legend)" data-series="(\d)">', figure.svg)
    # A line each, and in the legend a handle and a name each.
    assert sorted(drawn) == [*[("legend", s) for s in "0011"], ("series", "0"), ("series", "1")]


def test_names_are_text_and_no_markup(figure: Figure) -> None:
    assert "<script" not in figure.svg
    assert "&lt;script&gt;" in figure.svg


def test_points_lie_where_the_marks_are() -> None:
    categories = ["a", "b"]
    with drawing() as canvas:
        canvas.axis.plot(range(2), [0.25, 0.75], "o", label="x")
        canvas.axis.set_ylabel("share")
        canvas.tells("x", canvas.axis, range(2), [0.25, 0.75], categories)
    figure = canvas.drawn("name", "caption", "alt")
    marks = re.findall(r'<use xlink:href="[^"]*" x="([\d.]+)" y="([\d.]+)"', figure.svg)
    found = [(float(x), float(y)) for x, y in marks]
    for _, x, y, _ in figure.points:
        assert any(abs(x - mx) < 0.11 and abs(y - my) < 0.11 for mx, my in found)
    assert [text for *_, text in figure.points] == ["x\nshare 0.25\na", "x\nshare 0.75\nb"]


@pytest.mark.parametrize("values", [[0.836, 0.842], [0.9768, 0.9797], [-3.0, -3.1]])
def test_a_small_difference_looks_small(values: list[float]) -> None:
    shown = [Panel("explained variance", "explained variance", [[value] for value in values])]
    (figure,) = panels("n", "c", ["a", "b"], shown, "", colours=["#0072B2", "#D55E00"])
    height = float(figure.svg.split('"')[1].split()[3])
    (_, _, first, _), (_, _, second, _) = figure.points
    # The axis covers a twentieth of its largest value, and is a part of the figure's height.
    share = abs(values[1] - values[0]) / (0.05 * max(map(abs, values)))
    assert 0 < abs(first - second) / height < share


def test_what_is_not_drawn_tells_nothing() -> None:
    # Not measured, and far below an axis that begins at 0: a number that JSON has none of.
    lines = [("b", [1e3, 2e3, 3e3, 4e3], [-5.0, nan, 0.2, 0.3])]
    (figure,) = curves("n", "explained variance", "c", lines, STYLES, bottom=0.0)
    assert [text.split("\n")[1] for *_, text in figure.points] == [
        "explained variance 0.2",
        "explained variance 0.3",
    ]
