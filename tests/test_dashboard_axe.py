"""Every page of the dashboard under the rules of axe-core, in both themes."""

import browser
import pytest
from dashboard_kit import needle_run, served, show, violations

from app.dashboard.page import pages

chromium = pytest.fixture(scope="module")(browser.chromium)
page = pytest.fixture(browser.page)

PATHS = (
    *(p.path.format(run="needle", layer=1, head=0) for p in pages()),
    "/compare?run=needle&other=needle", "/r/needle/nothing", "/r/unknown/heads",
    "/r/needle/head/77/5?q=0:20&basket=L1H0",
)  # fmt: skip


def test_axe_finds_nothing_wrong(tmp_path, page):
    needle_run(tmp_path)
    found = {}
    with served(tmp_path) as site:
        for path in PATHS:
            for theme in ("light", "dark"):
                show(page, site + path + ("&" if "?" in path else "?") + f"theme={theme}")
                assert page.get_attribute("html", "data-theme") == theme
                # A theme is colours: all else is the same in the other.
                found[path, theme] = violations(page, colours=theme == "dark", hidden=not found)
    assert {at: wrong for at, wrong in found.items() if wrong} == {}
