"""Screenshots of a running server's page, light and dark, wide and narrow, after one chat in its playground.

python scripts/page_images.py http://127.0.0.1:8000 docs/images [--message TEXT]

Needs playwright (extra dev) and a Chromium on the path, or AURORA_BROWSER=/path.
"""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

SIZES = {"wide": {"width": 1440, "height": 900}, "narrow": {"width": 360, "height": 740}}
LONGEST_MS = 300_000
_REDRAW_MS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--message", default="Write an SQL query that selects the name of all users.")
    args = parser.parse_args()
    browser = os.environ.get("AURORA_BROWSER") or shutil.which("chromium-headless-shell") or shutil.which("chromium")
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        page.on("pageerror", lambda error: print("error:", error))
        page.on("console", lambda said: print(said.type, said.text))
        page.goto(f"{args.url}/aurora")
        _chat(page, args.message)
        for scheme in ("light", "dark"):
            for name, size in SIZES.items():
                page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                page.set_viewport_size(size)  # type: ignore[arg-type]
                page.wait_for_timeout(_REDRAW_MS)
                page.screenshot(path=args.directory / f"page-{scheme}-{name}.png", full_page=True)


def _chat(page: Page, message: str) -> None:
    page.locator("#connection.live").wait_for()
    page.get_by_label("Message").fill(message)
    page.get_by_role("button", name="Send").click()
    page.locator("#stop[disabled]").wait_for(timeout=LONGEST_MS)
    page.locator("#answer .token").first.wait_for()
    print(page.locator("#shares").inner_text())


if __name__ == "__main__":
    main()
