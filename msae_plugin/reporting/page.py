"""One self-contained HTML page: nothing is loaded, from nowhere.

Figures are embedded; the style sheet and the few lines of script are in the file, and a content
security policy forbids everything else. Without scripts it reads the same, unsorted.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from urllib.parse import quote

from msae_plugin.reporting.document import (
    Block,
    Bullets,
    Document,
    Facts,
    Figure,
    LatentContexts,
    Links,
    Section,
    Subheading,
    Table,
    Text,
)
from msae_plugin.reporting.page_tables import table_html

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


def asset(name: str) -> str:
    """A style sheet or script that comes with the package."""
    return (files("msae_plugin.reporting") / "assets" / name).read_text(encoding="utf-8")


def page(document: Document) -> str:
    """The whole page."""
    links = "\n".join(
        f'<li><a href="#{escape(section.name)}">{escape(section.title)}</a></li>'
        for section in document.sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(document.title)}</title>
<link rel="icon" href="data:,">
<style>
{asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{escape(document.title)}</h1>
<p>{escape(document.lead)}</p>
</header>
<nav class="contents" aria-label="Contents">
<div>
<ul>
{links}
</ul>
</div>
</nav>
<main id="main">
{"".join(_section(section) for section in document.sections)}</main>
<footer>
<p>{escape(document.origin)}</p>
</footer>
<script>
{asset("page.js")}</script>
</body>
</html>
"""


def _section(section: Section) -> str:
    name = escape(section.name)
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(section.title)}</h2>\n'
        f"{''.join(_blocks(section.blocks))}</section>\n"
    )


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    # Figures that follow one another stand side by side where there is room.
    for are_figures, group in groupby(blocks, key=lambda block: isinstance(block, Figure)):
        inside = "".join(_block(block) for block in group)
        yield f'<div class="figures">\n{inside}</div>\n' if are_figures else inside


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>\n"
    if isinstance(block, Subheading):
        return f"<h3>{escape(block.text)}</h3>\n"
    if isinstance(block, Bullets):
        items = "".join(f"<li>{escape(item)}</li>\n" for item in block.items)
        return f"<ul>\n{items}</ul>\n"
    if isinstance(block, Facts):
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in block.rows
        )
        listed = f"<dl>\n{rows}</dl>\n"
        if block.folded:
            heading = f"<summary>{escape(block.folded)}</summary>\n"
            return f"<details>\n{heading}{listed}</details>\n"
        return listed
    if isinstance(block, Links):
        items = "".join(
            f'<li><a href="{escape(quote(target))}">{escape(text)}</a></li>\n'
            for text, target in block.items
        )
        return f"<ul>\n{items}</ul>\n"
    if isinstance(block, Table):
        return table_html(block)
    if isinstance(block, Figure):
        return _figure(block)
    return _contexts(block)


def _figure(figure: Figure) -> str:
    width, height = figure.size
    data = base64.b64encode(figure.png).decode("ascii")
    return (
        f'<figure id="{escape(figure.name)}">\n'
        f'<img width="{width}" height="{height}" alt="{escape(figure.alt)}" '
        f'src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>\n"
    )


def _contexts(block: LatentContexts) -> str:
    lines = "".join(
        f'<li><span class="value">{context.activation:.3g}</span>'
        f'<span class="text">{_words(context.before).lstrip()}<mark>{_words(context.token)}</mark>'
        f"{_words(context.after)}</span></li>\n"
        for context in block.contexts
    )
    return f'<div class="latent">\n<h3>{escape(block.heading)}</h3>\n<ul>\n{lines}</ul>\n</div>\n'


def _words(text: str) -> str:
    return escape(text.replace("\r", "").replace("\n", "⏎").replace("\t", " "))
