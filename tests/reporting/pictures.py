"""Take the pictures of the docs: `python tests/reporting/pictures.py REPORT LATENTS OUTPUT`.

REPORT is the folder of a report, LATENTS that of `msae latents` over the same SAEs. A table of the
page is sorted before its top is taken; of the latents the first in the list is opened.
"""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from pathlib import Path

from page_browser import Page

WIDTH = 1400
SETTLED = 1.0  # Seconds after which lazily loaded chunks are on screen


def take(page: Page, path: Path, height: int) -> None:
    """Write what is on screen; fails where the page reported a problem."""
    time.sleep(SETTLED)
    assert page.problems == [], page.problems
    size = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
    taken = page.send("Page.captureScreenshot", clip=size)
    path.write_bytes(base64.b64decode(taken["data"]))


def main(report: Path, latents: Path, output: Path) -> None:
    """Both pictures, `demo.png` and `latents.png`."""
    output.mkdir(parents=True, exist_ok=True)
    page = Page(Path(tempfile.mkdtemp()))
    try:
        page.screen(WIDTH, 1000)
        page.open(report / "report.html")
        page.value("document.querySelector('th button').click(); 0")
        take(page, output / "demo.png", 870)
        page.open(latents / "index.html")
        page.value("document.getElementById('search').focus(); 0")
        page.press("Enter", 13, "\r")
        take(page, output / "latents.png", 1000)
    finally:
        page.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
