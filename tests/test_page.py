"""The page's routes: what they serve, to whom, and how browsers are told to treat it."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aurora.config import AuroraConfig, ServerConfig
from aurora.metrics import EngineReport
from serve import page
from serve.access import PAGE_DATA_PATH, PAGE_PATH, PAGE_PATHS
from serve.admission import Admission
from serve.history import INTERVAL_S, History
from serve.http import guard

FOLDER = Path(page.__file__).parent


def _client(host: str, keys: tuple[str, ...] = ("key",), history: History | None = None) -> TestClient:
    app = FastAPI()
    config = AuroraConfig(server=ServerConfig(host=host))
    guard(app, config, keys, Admission(1), history or History(CollectorRegistry()))
    return TestClient(app)


def test_every_file_is_served_and_no_other() -> None:
    files = {f.name for f in FOLDER.iterdir() if f.suffix in (".html", ".css", ".js")}
    assert {path.rpartition("/")[2] for path in PAGE_PATHS - {PAGE_PATH}} == files - {"index.html"}
    client = _client("127.0.0.1")
    for path in ("/aurora/index.html", "/aurora/__init__.py", "/aurora/../access.py", "/aurora/"):
        assert client.get(path, headers={"x-api-key": "key"}, follow_redirects=False).status_code in (307, 404), path


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_script_of_its_own() -> None:
    client = _client("0.0.0.0")
    for path in sorted(PAGE_PATHS):
        answer = client.get(path)
        assert answer.status_code == 200, "a browser must see it to ask for a key"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        urls = re.findall(r"https?://[^\s\"'`)]+", answer.text)
        assert set(urls) <= {"http://www.w3.org/2000/svg"}, path
    html = client.get(PAGE_PATH).text
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", html)


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("0.0.0.0", 401)])
def test_data_is_as_open_as_the_metrics_are(host: str, status: int) -> None:
    client = _client(host)
    assert client.get(PAGE_DATA_PATH).status_code == status
    answer = client.get(PAGE_DATA_PATH, headers={"authorization": "Bearer key"})
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.post(PAGE_DATA_PATH, headers={"x-api-key": "key"}).status_code == 405


def test_data_is_what_is_new() -> None:
    times = iter(range(0, 10_000, int(INTERVAL_S)))
    history = History(CollectorRegistry(), clock=lambda: float(next(times)))
    for _ in range(3):
        history.observe(EngineReport(steps=1, emitted_tokens=5))
    client = _client("127.0.0.1", history=history)
    points = client.get(PAGE_DATA_PATH).json()["points"]
    assert [point["emitted"] for point in points] == [5, 5]
    first = points[0]["time_s"]
    assert client.get(PAGE_DATA_PATH, params={"since": first}).json()["points"] == points[1:]
    for odd in ("nan", "inf", "x", "", "9" * 400):
        assert client.get(PAGE_DATA_PATH, params={"since": odd}).json()["points"] == points
