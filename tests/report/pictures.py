"""Take README's pictures of a run's report: python -m tests.report.pictures RUN"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from moedist.report import read_run, write_report
from tests.report.browser import opened, start_chromium

FOLDER = Path(__file__).parents[2] / "moedist" / "report" / "pictures"
# name -> colours, width, height, the plot that is at the top
PICTURES = {"light": ("light", 1280, 1150, None), "dark": ("dark", 1280, 1150, "shares"),
            "phone": ("light", 390, 1150, "ranks")}
COLOURS = 128  # of a picture: enough for plots, and a third of the bytes


def take(run: str) -> None:
    """Write all pictures, of less than 200 KB each."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page = Path(folder, "report.html")
        write_report([read_run(run)], page)
        browser = start_chromium(driver)
        for name, (scheme, width, height, top) in PICTURES.items():
            with opened(browser, page.as_uri(), width, height, scheme) as found:
                if top is not None:
                    found.page.evaluate(f"document.getElementById('plot-{top}').closest('figure').scrollIntoView()")
                path = FOLDER / f"{name}.png"
                found.page.screenshot(path=path)
            Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
            print(path, path.stat().st_size)
        browser.close()


if __name__ == "__main__":
    take(sys.argv[1])
