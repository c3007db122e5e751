"""Take the pictures of the docs: `python tests/reporting/pictures.py REPORT LATENTS OUTPUT`.

REPORT is the folder of a report, LATENTS that of `msae latents` over the same SAEs. The page is
loaded, its first table sorted and a value pointed at; then latents are searched and one is opened.
"""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from pathlib import Path

from page_browser import Page

SETTLED = 1.0  # Seconds after which lazily loaded chunks are on screen


def take(page: Page, path: Path, height: int) -> None:
    """Write what is on screen, without what went wrong in the page."""
    time.sleep(SETTLED)
    assert page.problems == [], page.problems
    size = {"x": 0, "y": 0, "width": 1400, "height": height, "scale": 1}
    taken = page.send("Page.captureScreenshot", clip=size)
    path.write_bytes(base64.b64decode(taken["data"]))


def main(report: Path, latents: Path, output: Path) -> None:
    """Both pictures, `demo.png` and `latents.png`."""
    output.mkdir(parents=True, exist_ok=True)
    for name, file, height, script in (
        ("demo.png", report / "report.html", 870, "document.querySelector('th button').click()"),
        ("latents.png", latents / "index.html", 1000, "document.getElementById('search').focus()"),
    ):
        page = Page(Path(tempfile.mkdtemp()))
        try:
            page.screen(1400, height)
            page.open(file)
            page.value(f"{script}; 0")
            if name == "latents.png":
                page.press("Enter", 13, "\r")  # The first latent of the list
            else:
                page.value("scrollTo(0, 0); 0")
            take(page, output / name, height)
        finally:
            page.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
