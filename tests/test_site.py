"""The documentation site: it builds without a warning, and links that leave `docs/` are checked."""

import logging
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.documents import ROOT

pytest.importorskip("mkdocs", reason="the site's generator is in the extra `dev`")


def hooks() -> Any:
    spec = spec_from_file_location("mkdocs_hooks", ROOT / "scripts" / "mkdocs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rewritten(markdown: str, repo_url: str = "") -> str:
    source = ROOT / "docs" / "architecture.md"
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(source), src_uri="architecture.md"))
    config = SimpleNamespace(config_file_path=str(ROOT / "mkdocs.yml"), repo_url=repo_url)
    files = [SimpleNamespace(abs_src_path=str(ROOT / "docs" / "results.md"))]
    return hooks().on_page_markdown(markdown, page=page, config=config, files=files)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    assert "leads nowhere" not in done.stderr


def test_links_that_leave_the_documentation() -> None:
    link = "see [`serve/http.py`](../serve/http.py), [a table](results.md#domains) and [`machines`](machines)"
    assert rewritten(link) == "see `serve/http.py`, [a table](results.md#domains) and `machines`"
    on_a_host = rewritten(link, "https://host/aurora/")
    assert "[`serve/http.py`](https://host/aurora/blob/main/serve/http.py), [a table](results.md#domains)" in on_a_host


def test_code_and_other_hosts_are_left_alone() -> None:
    for text in (
        "`[x](../no.py)` and `a\nb [y](../no.py)`",
        "```sh\n[x](../no.py)\n```",
        "[x](https://example.org/no.py)",
        "![picture](../no.png)",
        "[above](#here)",
    ):
        assert rewritten(text) == text


def test_a_link_that_leads_nowhere_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mkdocs.hooks"):
        rewritten("[x](../serve/no_such_file.py)")
    assert "architecture.md: [x](../serve/no_such_file.py) leads nowhere" in caplog.text
