"""A real Chromium without a window, and what a page does in it."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from typing import Any, Iterator

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRAWN_MS = 60_000


@dataclass
class Opened:
    """A page, with what it said and asked for. `data-drawn` of its root is set when all plots are drawn."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def plots(self) -> dict[str, list[dict[str, Any]]]:
        """id -> the traces that Plotly holds for it, as it was given them."""
        return self.page.evaluate("""() => Object.fromEntries([...document.querySelectorAll('.plot')].map(place => [
            place.id.replace('plot-', ''), (place.data || []).map(t => ({
                x: t.x, y: t.y, z: t.z, name: t.name, meta: t.meta, text: t.text, customdata: t.customdata}))]))""")

    def drawn(self) -> dict[str, int]:
        """id -> shapes of data that are to be seen in a plot: lines, bars, points, images of heat maps."""
        return self.page.evaluate("""() => Object.fromEntries([...document.querySelectorAll('.plot')].map(place => [
            place.id.replace('plot-', ''),
            place.querySelectorAll('path.js-line, .barlayer .point path, path.point, .heatmaplayer image').length]))""")


def start_chromium(driver: Any) -> Any:
    """A browser; skips the test where there is none, fails it under CI=true."""
    program = os.environ.get("MOEDIST_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"no Chromium here (looked for {', '.join(PROGRAMS)}); apt-get install chromium, or set MOEDIST_CHROMIUM")
    # as root it has no sandbox; /dev/shm is small in containers
    return driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])


@contextlib.contextmanager
def opened(browser: Any, address: str, width: int = 1280, height: int = 900, scheme: str = "light") -> Iterator[Opened]:
    """Open a page and wait until its plots are drawn."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    try:
        found = Opened(context.new_page())
        found.page.on("console", lambda m: found.errors.append(m.text) if m.type in ("error", "warning") else None)
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(address)
        found.page.wait_for_selector("html[data-drawn]", timeout=DRAWN_MS)
        yield found
    finally:
        context.close()
