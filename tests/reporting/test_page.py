"""The page as a parser sees it: self-contained, labelled, complete."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from page_browser import chromium

from msae_plugin.common.table import Column, Spread, Table
from msae_plugin.evaluation.contexts import TokenContext
from msae_plugin.reporting.document import (
    Bullets,
    Document,
    Facts,
    Figure,
    LatentContexts,
    Links,
    Section,
    Subheading,
    Text,
    asset,
    markdown,
    page,
)

VOID = {"meta", "link", "img", "wbr", "br"}
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x03\xc0\x00\x00\x02\x80"
SVG = '<svg viewBox="0 0 10 10"><g><text>1</text></g></svg>'
HOSTILE = '<script>alert("1")</script> & "quotes" \'single\' http://evil.example/x.png'

TABLE = Table(
    "results",
    f"A caption. With a second sentence and {HOSTILE}.",
    [
        Column("method", "method"),
        Column("l0_target", "target L0", absent="none"),
        Column("f1", "F1", "share ↑"),
        Column("change", "change", signed=True),
        Column("word", "what is shown"),
    ],
    [
        ["a_method/with_parts", 8.0, Spread(0.123456789, 0.01, 3), -0.25, "better"],
        [HOSTILE, None, Spread(0.9, None, 1), 0.5, "no difference shown"],
        ["third", 16.0, None, 0.0, "worse"],
    ],
)
FOLDED = Table("folded", "Many rows.", [Column("a", "a")], [["x"], ["y"]], folded=True)
DOCUMENT = Document(
    title=f"A title with {HOSTILE}",
    lead="What this is.",
    sections=[
        Section(
            "first",
            "First part",
            [
                Subheading("Smaller"),
                Text(f"Words, {HOSTILE}."),
                Bullets(["one", "two"]),
                Facts([("model.name", HOSTILE)]),
                TABLE,
                Figure(
                    "front",
                    "A caption.",
                    'Lines of "F1" against L0.',
                    PNG,
                    SVG,
                    [(0, 1.0, 2.0, HOSTILE)],
                ),
                Figure("other", "Another.", "More lines.", PNG, SVG),
                FOLDED,
            ],
        ),
        Section(
            "second",
            "Second part",
            [LatentContexts("latent 7", [TokenContext("\n before ", "to<k", " after", 3.25, 0)])],
        ),
    ],
    origin="Made by a test.",
)


class Parsed(HTMLParser):
    """Elements with their attributes and texts; complains about what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, [tag for tag, _, _ in self._open]

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open[-1][0] == tag, (tag, self._open[-1])
        self._open.pop()

    def handle_data(self, data):
        self.texts.append(data)
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, tag, **attributes):
        return [
            (found, "".join(texts).strip())
            for name, found, texts in self.elements
            if name == tag and all(found.get(k) == v for k, v in attributes.items())
        ]


@pytest.fixture(scope="module")
def html() -> str:
    return page(DOCUMENT)


@pytest.fixture(scope="module")
def parsed(html: str) -> Parsed:
    return Parsed(html)


def test_nothing_is_loaded_from_anywhere(html, parsed):
    for tag, attributes, _ in parsed.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith(("data:", "#")), (tag, value)
        assert not any(name.startswith("on") for name in attributes), attributes
        assert "style" not in attributes
    (policy,) = [
        a["content"] for a, _ in parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})
    ]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for name in ("page.css", "page.js"):
        code = asset(name)
        assert code in html
        assert not re.search(r"https?:|url\(|@import|fetch|XMLHttp|import\(", code), name


@pytest.mark.promise(
    "Text from outside stays text: in the page, the card, tables, spreadsheets and the terminal."
)
def test_hostile_text_stays_text(html, parsed):
    # Ours, and the data of two figures.
    assert [a.get("type") for a, _ in parsed.all("script")] == [*2 * ["application/json"], None]
    assert not parsed.all("b")
    assert "alert(" not in parsed.all("script")[-1][1]
    assert html.count("<script>") == 1
    ((_, title),) = parsed.all("h1")
    assert title == f"A title with {HOSTILE}"
    assert ("", "to<k") in [("", text) for _, text in parsed.all("mark")]


def test_ids_are_unique_and_every_reference_points_at_one(parsed):
    ids = Counter(a["id"] for _, a, _ in parsed.elements if "id" in a)
    assert set(ids.values()) == {1}
    for _, attributes, _ in parsed.elements:
        named = (attributes.get("aria-labelledby") or "").split()
        if (attributes.get("href") or "").startswith("#"):
            named.append(attributes["href"][1:])
        assert set(named) <= set(ids), named
    links = [text for a, text in parsed.all("a") if a["href"] != "#main"]
    assert links == ["First part", "Second part"]


def test_landmarks_and_headings(parsed):
    for tag in ("header", "nav", "main", "footer", "h1", "title"):
        assert len(parsed.all(tag)) == 1, tag
    assert parsed.all("html")[0][0]["lang"] == "en"
    assert [text for _, text in parsed.all("h2")] == ["First part", "Second part"]
    levels = [int(tag[1]) for tag, _, _ in parsed.elements if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert parsed.all("meta", name="viewport")[0][0]["content"].startswith("width=device-width")


def test_every_figure_has_words_and_is_in_the_page(parsed):
    drawings = [attributes for attributes, _ in parsed.all("div") if "drawing" in str(attributes)]
    assert [a["aria-label"] for a in drawings] == ['Lines of "F1" against L0.', "More lines."]
    assert len(parsed.all("svg")) == 2
    assert parsed.all("img") == []
    points = [text for a, text in parsed.all("script") if a.get("type") == "application/json"]
    assert [json.loads(text) for text in points] == [[[0, 1.0, 2.0, HOSTILE]], []]


def test_tables_have_scopes_rows_and_unrounded_values(parsed):
    assert len(parsed.all("table")) == 2
    headings = parsed.all("th", scope="col")
    assert [text for _, text in headings[:5]] == [
        "method", "target L0", "F1share ↑", "change", "what is shown",
    ]  # fmt: skip
    assert len(headings) + len(parsed.all("th", scope="row")) == len(parsed.all("th"))
    assert [text for _, text in parsed.all("th", scope="row")] == [
        "a_method/with_parts", HOSTILE, "third", "x", "y",
    ]  # fmt: skip
    cells = [(a.get("data-value"), text, a.get("class")) for a, text in parsed.all("td")]
    assert cells == [
        ("8.0", "8", "number"),
        ("0.123456789", "0.1235 ± 0.0100", "number"),
        ("-0.25", "−0.2500", "number"),
        ("better", "better", "good"),
        (None, "none", "none"),
        ("0.9", "0.9000", "number"),
        ("0.5", "+0.5000", "number"),
        ("no difference shown", "no difference shown", None),
        ("16.0", "16", "number"),
        (None, "not measured", "none"),
        ("0.0", "0.0000", "number"),
        ("worse", "worse", "bad"),
    ]
    for attributes, _ in parsed.all("div", role="region"):
        assert attributes["tabindex"] == "0"


def test_long_tables_are_folded_with_what_is_in_them(parsed):
    ((_, summary),) = parsed.all("summary")
    assert summary == "Many rows (2 rows)"


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_contrast_in_both_schemes(scheme):
    block = re.findall(r":root \{(.*?)\}", asset("page.css"), re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
    for ink in ("text", "quiet", "link", "good", "bad"):
        for paper in ("page", "band"):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (scheme, ink, paper)
    assert contrast(colours["mark-text"], colours["mark"]) >= 4.5
    assert contrast(colours["focus"], colours["page"]) >= 3


def test_colours_of_figures_stand_out_from_white():
    from msae_plugin.reporting.figures import COLOURS, method_styles

    assert min(contrast(colour, "#ffffff") for colour in COLOURS) >= 3
    drawn = method_styles([str(i) for i in range(40)])
    assert len({(style.colour, style.marker, str(style.line)) for style in drawn.values()}) == 40


def test_a_missing_browser_fails_the_browser_tests_and_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        chromium()


def test_a_name_used_twice_is_refused():
    with pytest.raises(ValueError, match="used twice"):
        Document("t", "l", [Section("a", "A", [TABLE, TABLE])], "o")


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="1 values, not 2"):
        Table("t", "c", [Column("a", "a"), Column("b", "b")], [["x"]])


def test_closed_facts_and_links():
    blocks = [
        Facts([("versions.torch", "2")], f"Versions {HOSTILE}"),
        Links([(f"page of {HOSTILE}", "dashboards/a b.html")]),
    ]
    document = replace(DOCUMENT, sections=[Section("only", "Only", blocks)])
    html = Parsed(page(document))
    assert [text for _, text in html.all("summary")] == [f"Versions {HOSTILE}"]
    found = [(a["href"], text) for a, text in html.all("a") if not str(a["href"]).startswith("#")]
    assert found == [("dashboards/a%20b.html", f"page of {HOSTILE}")]
    text = markdown(document, "figures")
    assert "](dashboards/a%20b.html)" in text
    assert "- versions.torch: 2" in text
