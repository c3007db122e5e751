"""The latent browser in Chromium: search, sorting, one latent, keys, a phone, hostile text."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from latent_inputs import CONTEXT, write_latents_inputs
from page_browser import NAMES, PATIENCE, Page

from msae_plugin.reporting.latent_browser import read_chunk, write_latents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("CHROMIUM") and not any(map(shutil.which, NAMES)),
        reason="no Chromium: apt-get install chromium",
    ),
]
HOSTILE = "</script><img src=x onerror=\"document.title='run'\">\u2028"
ROWS = 'Array.from(document.querySelectorAll("#rows .row"))'
IDS = f"{ROWS}.map((row) => +row.children[0].textContent)"


@pytest.fixture(scope="module")
def output(tmp_path_factory, tiny_model_dir, tiny_texts, tiny_language_model) -> Path:
    folder = tmp_path_factory.mktemp("latents-browser")
    source = write_latents_inputs(folder, tiny_model_dir, tiny_texts, d_sae=300)
    made = folder / "out"
    write_latents([str(source)], made, tokens=60 * CONTEXT, language_model=tiny_language_model)
    # A token as only a hostile tokenizer has it: one that latent 5 promotes most.
    catalogue = read_chunk(made, "catalogue")
    catalogue["tokens"][read_chunk(made, "0")["up"][5][0]] = HOSTILE
    (made / "chunks/catalogue.js").write_text(f'msae("catalogue",{json.dumps(catalogue)})\n')
    return made


@pytest.fixture
def browser(tmp_path: Path, output: Path) -> Iterator[Page]:
    page = Page(tmp_path / "profile")
    page.screen(1400, 900)
    page.open(output / "index.html")
    until(page, f"{ROWS}.length > 20")
    yield page
    assert page.problems == []
    page.close()


def until(page: Page, condition: str) -> None:
    started = time.monotonic()
    while not page.value(condition):
        assert time.monotonic() - started < PATIENCE, condition
        time.sleep(0.05)


def write(page: Page, where: str, text: str) -> None:
    page.value(
        f'(() => {{ const field = document.getElementById("{where}"); field.value = '
        f'{json.dumps(text)}; field.dispatchEvent(new Event("input")); }})()'
    )
    time.sleep(0.4)


def test_it_searches_filters_and_sorts(browser, output):
    columns, catalogue = read_chunk(output, "0"), read_chunk(output, "catalogue")
    count = 'document.getElementById("count").textContent'
    assert browser.value(count) == "300 of 300 latents"
    browser.value('document.querySelector("[data-by=rate] button").click()')
    rates = [columns["rate"][i] for i in browser.value(IDS)]
    assert rates == sorted(columns["rate"], reverse=True)[: len(rates)]
    assert rates[0] == 1
    write(browser, "high", "5")
    assert max(columns["rate"][i] for i in browser.value(IDS)) <= 0.05
    write(browser, "high", "")
    browser.value('document.querySelector("[data-by=id] button").click()')
    write(browser, "search", "123")
    assert browser.value(IDS)[0] == 123
    # A phrase of the text: latents that fire most inside it.
    text = read_chunk(output, "text")
    at = columns["peaks"][7][0]
    phrase = "".join(catalogue["tokens"][n] for n in text[at : at + 3])
    write(browser, "search", phrase.strip())
    assert 7 in browser.value(IDS)
    write(browser, "search", "no such words anywhere")
    assert browser.value(count) == "0 of 300 latents"


def test_a_latent_opens_by_link_key_and_enter(browser, output):
    heading = 'document.querySelector("main h1")?.textContent'
    browser.value('location.hash = "#tiny_seed1/123"')
    until(browser, f'{heading} === "Latent 123"')
    until(browser, 'document.querySelectorAll(".example").length > 0')
    assert browser.value('document.querySelectorAll(".example .peak").length > 0')
    shaded = 'document.querySelectorAll(".example i[style]").length'
    assert browser.value(shaded) > 0
    browser.press("j", 74, "j")
    until(browser, f'{heading} === "Latent 124"')
    assert browser.value("decodeURIComponent(location.hash)") == "#tiny_seed1/124"
    browser.press("ArrowUp", 38)
    until(browser, f'{heading} === "Latent 123"')
    browser.press("/", 191, "/")
    assert browser.value("document.activeElement.id") == "search"
    write(browser, "search", "200")
    browser.press("Enter", 13, "\r")
    until(browser, f'{heading} === "Latent 200"')
    # To its like in another seed.
    browser.value("document.querySelector(\"main a[href^='#tiny_seed2']\").click()")
    until(browser, 'document.title.endsWith("of tiny_seed2")')
    asked = {url for url in browser.requested if not url.startswith("data:")}
    assert all(url.startswith(output.as_uri()) for url in asked)
    # What is not looked at is not loaded: of 9 chunks of latents three at most.
    assert len([url for url in asked if "-" in url.rsplit("/", 1)[1]]) <= 3


def test_text_from_the_model_is_text(browser):
    browser.value('location.hash = "#tiny_seed1/5"')
    until(browser, 'document.querySelectorAll(".token").length > 0')
    shown = browser.value('document.querySelector(".token").textContent')
    assert shown.startswith("</script><img src=x")
    assert browser.value('document.querySelectorAll("img").length') == 0
    assert browser.value("document.title") == "Latent 5 of tiny_seed1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "phone"), [(1400, False), (390, True)])
def test_it_fits_the_screen(browser, scheme, width, phone):
    browser.screen(width, 850, phone=phone)
    browser.send(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    for place in ("", "tiny_seed1/9"):
        browser.value(f'location.hash = "#{place}"')
        time.sleep(0.5)
        assert browser.value("document.documentElement.scrollWidth") <= width
        if not place:
            widths = 'Array.from(document.querySelectorAll("#head button"), (b) => b.offsetWidth)'
            assert sum(width > 20 for width in browser.value(widths)) == (4 if phone else 6)
        dark = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(22, 25, 29)") == (scheme == "dark")
    assert browser.value('document.querySelectorAll("main h1").length') == 1
    if phone:
        assert browser.value('getComputedStyle(document.querySelector("nav")).display') == "none"
