"""A real browser for pages: Debian's Chromium, driven by Playwright; tests that ask for it skip where either is missing.

A test module imports the fixture: `from tests.browser import chromium, opened`, with `__all__ = ["chromium"]`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

# what an element's canvases hold: for each, how many pixels are painted, and in how many colours
_INK = """(root) => [...root.querySelectorAll("canvas")].map((canvas) => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const colours = new Set();
  let painted = 0;
  for (let i = 0; i < data.length; i += 4)
    if (data[i + 3] > 0) { painted++; colours.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]); }
  return {painted, colours: colours.size};
})"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A playwright Browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        # no sandbox: containers give root no user namespaces; the pages are our own
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and what went wrong on it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    """Of the console (broken policies too), of scripts, and of requests that failed."""
    requests: list[str] = field(default_factory=list)
    """Every address that was asked for, the page's own first."""


@contextmanager
def opened(
    browser: Any, url: str, *, dark: bool = False, width: int = 1200, height: int = 900
) -> Iterator[Opened]:
    """The page at `url`, loaded, in light or dark and of a width in CSS pixels."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page = context.new_page()
    found = Opened(page)
    page.on(
        "console",
        lambda message: found.errors.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("requestfailed", lambda request: found.errors.append(f"{request.url}: {request.failure}"))
    page.on("request", lambda request: found.requests.append(request.url))
    try:
        page.goto(url, wait_until="load")
        yield found
    finally:
        context.close()


def ink(page: Any, selector: str) -> list[dict[str, int]]:
    """For every canvas in the first element that matches: {painted: pixels that are not clear, colours: how many}."""
    found: list[dict[str, int]] = page.locator(selector).first.evaluate(_INK)
    return found


def overflow(page: Any) -> int:
    """CSS pixels by which the page is wider than its window: above 0, one has to scroll sideways."""
    wider: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return wider
