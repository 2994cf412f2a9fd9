"""Pages in a real browser, without any connection to elsewhere.

The browser is Debian's chromium, which playwright drives. Where one of them is missing, the tests
are skipped. ``SCREENSHOTS=FOLDER`` keeps pictures of the pages, to look at them.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
CHROMIUM = next(filter(None, map(shutil.which, _BROWSERS)), None)
needs_browser = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_PATIENCE = 60_000  # milliseconds; the machines that run the suite are shared


@dataclass
class Sight:
    """A page in the browser, and what it asked for and said.

    Attributes:
        page: the page of playwright.
        requests: the addresses of all requests.
        errors: errors on the console.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def shot(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png")

    def width(self) -> int:
        """The width of the content, which is more than that of the window if it can scroll."""
        width: int = self.page.evaluate("document.documentElement.scrollWidth")
        return width


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def sight(browser):
    """``sight(address, ...)`` opens a page in a window of its own."""
    contexts, sights = [], []

    def look(address, *, dark=False, width=1200, height=900):
        contexts.append(
            browser.new_context(
                color_scheme="dark" if dark else "light",
                viewport={"width": width, "height": height},
            )
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(_PATIENCE)
        seen = Sight(page)
        sights.append(seen)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.goto(address)
        return seen

    yield look
    for context in contexts:
        context.close()
    for seen in sights:
        assert seen.errors == []
        others = [a for a in seen.requests if urlsplit(a).scheme not in ("data", "blob", "file")]
        assert {urlsplit(address).hostname for address in others} <= {"127.0.0.1"}


def colour(page) -> list[int]:
    text = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in text.strip("rgb()").split(",")]
