"""A headless Chromium for the pages that this package writes or serves, and axe's accessibility rules."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, headless; skips the test where it or playwright is absent."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, see the extra [dev]")
    if _CHROMIUM is None:
        pytest.skip("no Chromium here; install it or name it in the environment variable CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def accessibility_faults(page: Page) -> list[str]:
    """Violations of WCAG 2.1 A and AA that axe finds on a page, contrast included: rule, help, first places."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe, see the extra [dev]").Axe()
    rules = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
    found = axe.run(page, options=rules).response["violations"]
    return [f"{one['id']}: {one['help']}; {[node['target'] for node in one['nodes'][:3]]}" for one in found]


def overflowing(page: Page) -> list[str]:
    """Visible elements that reach beyond the right edge of the window, as tag and class."""
    return page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter(e => {
            const box = e.getBoundingClientRect()
            if (!box.width || box.right <= window.innerWidth + 1) return false
            for (let p = e.parentElement; p; p = p.parentElement)
                if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false
            return true
        }).map(e => e.tagName + '.' + e.className)"""
    )
