"""A real browser without a window, for tests of the page: one that is installed, never one that is fetched."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str | None:
    """$AURORA_BROWSER, or what is on the path."""
    given = os.environ.get("AURORA_BROWSER")
    return given or next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A started Chromium. Skips the test where there is none, or no playwright to drive it."""
    drive = pytest.importorskip("playwright.sync_api", reason="no playwright: install the extra dev")
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium: apt-get install chromium-headless-shell, or name one in AURORA_BROWSER")
    with drive.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()
