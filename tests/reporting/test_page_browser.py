"""The page in Chromium: it fits a phone, sorts by keyboard, loads nothing, prints."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from page_browser import Page
from report_inputs import (
    comparison,
    events,
    ladder_rows,
    write_comparison,
    write_evaluation,
    write_run,
    write_sae,
)

from msae_plugin.reporting.report import report

pytestmark = pytest.mark.slow

HEADLINE = 'document.getElementById("language-model-headline")'
HEADINGS = f"Array.from({HEADLINE}.tHead.rows[0].cells)"


def column(heading: str, what: str = "dataset.value ?? null") -> str:
    """Cells of a column of the headline table, from above."""
    place = f'{HEADINGS}.findIndex((c) => c.querySelector(".label").textContent === "{heading}")'
    return f"Array.from({HEADLINE}.tBodies[0].rows).map((row) => row.cells[{place}].{what})"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    contents = comparison()
    contents["rows"] += ladder_rows()
    contents["rows"][0]["folder"] = "a"
    write_sae(folder / "cmp/a", revived=events())
    folders = [
        write_comparison(folder / "cmp", contents),
        write_run(folder / "run"),
        write_evaluation(folder / "eval"),
    ]
    return report(folders, folder / "report").output


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Page]:
    page = Page(tmp_path / "profile")
    yield page
    page.close()


def focus(browser: Page, heading: str) -> None:
    browser.value(
        f'{HEADINGS}.find((c) => c.querySelector(".label").textContent === "{heading}")'
        '.querySelector("button").focus()'
    )


def ordered(values: list[Any], *, descending: bool) -> bool:
    """Numbers in order, and what was not measured behind them."""
    numbers = [float(value) for value in values if value is not None]
    at_the_end = all(value is None for value in values[len(numbers) :])
    return at_the_end and numbers == sorted(numbers, reverse=descending)


@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True), (320, True)])
def test_nothing_is_wider_than_the_screen_and_nothing_is_loaded(browser, output, width, phone):
    browser.screen(width, 800, phone=phone)
    browser.open(output / "report.html")
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    widths = browser.value(
        "Array.from(document.querySelectorAll('figure svg')).map((s) => s.clientWidth)"
    )
    assert len(widths) > 10
    assert min(widths) >= 250
    asked = {url for url in browser.requested if not url.startswith("data:")}
    assert asked == {(output / "report.html").as_uri()}
    assert browser.problems == []


def test_tables_sort_by_keyboard(browser, output):
    browser.open(output / "report.html")
    before = browser.value(column("explained variance"))
    assert not ordered(before, descending=True)
    focus(browser, "seeds")
    for _ in range(2):  # over L0
        browser.press("Tab", 9)
    focused = "document.activeElement.getAttribute('aria-label')"
    assert browser.value(focused) == "Sort by explained variance"
    browser.press("Enter", 13, "\r")
    down = browser.value(column("explained variance"))
    assert sorted(down, key=str) == sorted(before, key=str)
    assert ordered(down, descending=True)
    browser.press(" ", 32, " ")
    assert ordered(browser.value(column("explained variance")), descending=False)
    assert browser.value(focused) == "Sort by explained variance"
    state = browser.value(f"{HEADINGS}.map((c) => c.getAttribute('aria-sort'))")
    assert state.count("ascending") == 1
    assert state.count(None) == len(state) - 1
    # Rows move whole.
    rows = browser.value(f"Array.from({HEADLINE}.tBodies[0].rows).map((r) => r.innerText)")
    assert any("frozen decoder (control)" in row and "0.1000" in row for row in rows)
    # What was not measured is last in either direction.
    focus(browser, "dead")
    for _ in range(2):
        browser.press("Enter", 13, "\r")
        assert browser.value(column("dead", "textContent"))[-1] == "not measured"
    focus(browser, "method")
    browser.press("Enter", 13, "\r")
    assert browser.value(column("method", "textContent"))[0] == "baseline"
    assert browser.problems == []


def test_figures_tell_values_and_hide_series(browser, output):
    browser.screen(1280, 800)
    browser.open(output / "report.html")
    browser.value("window.figure = document.querySelector('figure:has(g.legend)'); 0")
    browser.value(
        """window.point = (n) => {
          const points = JSON.parse(figure.querySelector("script").textContent);
          const [series, x, y, text] = points[n];
          const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
          const scale = box.width / svg.viewBox.baseVal.width;
          const at = { clientX: box.left + x * scale, clientY: box.top + y * scale };
          const event = new PointerEvent("pointermove", { ...at, bubbles: true });
          figure.querySelector(".drawing").dispatchEvent(event);
          const told = figure.querySelector("output");
          return [text, told.hidden ? null : told.textContent, series];
        }; 0"""
    )
    text, told, series = browser.value("point(0)")
    assert told == text
    parts = f"Array.from(figure.querySelectorAll('g.series[data-series=\"{series}\"]'))"
    assert set(browser.value(f"{parts}.map((g) => g.style.display)")) == {""}
    entry = f"figure.querySelector('g.legend[data-series=\"{series}\"][role=button]')"
    browser.value(f"{entry}.focus(); 0")
    browser.press("Enter", 13, "\r")
    assert browser.value(f"{entry}.getAttribute('aria-pressed')") == "false"
    assert set(browser.value(f"{parts}.map((g) => g.style.display)")) == {"none"}
    assert browser.value("point(0)")[1] != text
    browser.press(" ", 32, " ")
    assert set(browser.value(f"{parts}.map((g) => g.style.display)")) == {""}
    assert browser.problems == []


def test_wide_tables_can_be_scrolled_by_keyboard(browser, output):
    browser.screen(390, 800, phone=True)
    browser.open(output / "report.html")
    region = f"{HEADLINE}.parentElement"
    assert browser.value(f"{region}.scrollWidth > {region}.clientWidth")
    browser.value(f"{region}.focus()")
    for _ in range(5):
        browser.press("ArrowRight", 39)
    moved = "new Promise((done) => setTimeout(() => done(0), 500))"
    browser.send("Runtime.evaluate", expression=moved, awaitPromise=True)
    assert browser.value(f"{region}.scrollLeft") > 0
    # The name of the row stays in sight.
    left = f"{HEADLINE}.tBodies[0].rows[0].cells[0].getBoundingClientRect().left"
    assert browser.value(left) >= 0


def test_without_scripts_everything_is_there(browser, output):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(output / "report.html")
    assert browser.value(f"{HEADLINE}.tBodies[0].rows.length") == 8
    assert browser.value('document.querySelectorAll("th button").length') == 0


def test_it_prints_on_a_few_pages(browser, output):
    browser.open(output / "report.html")
    printed = browser.send("Page.printToPDF", preferCSSPageSize=True)
    data = base64.b64decode(printed["data"])
    assert data.startswith(b"%PDF")
    assert 3 <= data.count(b"/Type /Page\n") + data.count(b"/Type /Page/") <= 20


@pytest.mark.parametrize(("scheme", "low", "high"), [("light", 0.7, 0.99), ("dark", 0.05, 0.5)])
def test_it_follows_the_colour_scheme_and_is_not_blank(browser, output, scheme, low, high):
    browser.screen(1280, 1500)
    browser.send(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    browser.open(output / "report.html")
    picture = browser.send("Page.captureScreenshot")
    pixels = imread(io.BytesIO(base64.b64decode(picture["data"])))[..., :3]
    assert pixels.shape[:2] == (1500, 1280)
    assert low < pixels.mean() < high
    # Text on most lines: some pixel is far from the line's background.
    assert ((pixels.max(axis=(1, 2)) - pixels.min(axis=(1, 2))) > 0.5).mean() > 0.3
