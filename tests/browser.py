"""A real browser for tests of pages: headless Chromium, offline, every complaint of it collected.

In a test file:

    chromium = pytest.fixture(scope="module")(browser.chromium)
    tab = pytest.fixture(scope="module")(browser.tab)
    page = pytest.fixture(browser.kept)

Every test of the file then uses one page, which keeps the application loaded. A test that needs
an untouched one takes `browser.page` instead, in a context of its own. A test that leaves an error
on the page fails: of a script, on the console, or a request to anywhere but the page's own host.
`page.problems` lists them; a test that expects some clears it. `page.pending` holds the requests
that are under way.
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
LOCAL = ("", "127.0.0.1", "localhost", "[::1]")
SIZE = {"width": 1280, "height": 900}


def found() -> str:
    """Where Chromium is; without one a test is skipped, and fails on a machine that sets CI."""
    for name in NAMES:
        place = shutil.which(name)
        if place is not None:
            return place
    return _missing(f"none of {', '.join(NAMES)} is installed")


def _missing(why: str) -> Any:
    if os.environ.get("CI"):
        pytest.fail(f"tests of pages need a browser; {why}")
    pytest.skip(f"tests of pages need a browser; {why}")


def chromium() -> Iterator[Any]:
    """A running browser; starting one takes a second, so once for a file."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    place = found()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=place, args=list(ARGS))
        yield running
        running.close()


def page(chromium: Any) -> Iterator[Any]:
    """An empty page in a context of its own, with `problems`, which must be empty at the end."""
    context, opened = _opened(chromium)
    yield opened
    context.close()
    assert not opened.problems, "\n".join(opened.problems)


def tab(chromium: Any) -> Iterator[Any]:
    """A page for all tests of a file; each takes it as `kept` gives it."""
    context, opened = _opened(chromium)
    yield opened
    context.close()


def kept(tab: Any) -> Iterator[Any]:
    """The file's page as the test before left it, but for `problems`: empty, also at the end."""
    tab.mouse.move(0, 0)  # over nothing
    tab.problems.clear()
    yield tab
    assert not tab.problems, "\n".join(tab.problems)


def _opened(chromium: Any) -> tuple[Any, Any]:
    # Without motion colours are at once what they will be.
    context = chromium.new_context(viewport=SIZE, reduced_motion="reduce")
    opened = context.new_page()
    opened.problems, opened.pending = [], set()
    opened.on("pageerror", lambda error: opened.problems.append(f"error: {error}"))
    opened.on("console", lambda message: _console(opened, message))
    opened.on("requestfailed", lambda request: opened.problems.append(f"failed: {request.url}"))
    context.on("request", lambda request: _request(opened, request.url))
    opened.on("request", lambda request: opened.pending.add(request))
    for end in ("requestfailed", "requestfinished"):
        opened.on(end, lambda request: opened.pending.discard(request))
    return context, opened


def _console(opened: Any, message: Any) -> None:
    if message.type in ("error", "warning"):
        opened.problems.append(f"console {message.type}: {message.text}")


def _request(opened: Any, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("data", "blob", "about") and parts.hostname not in (None, *LOCAL):
        opened.problems.append(f"request: {url}")
