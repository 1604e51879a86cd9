"""The page in a real browser, against its real routes and middlewares and an hour that was made up."""

import asyncio
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry

from aurora.config import AuroraConfig, ServerConfig
from aurora.metrics import EngineReport
from serve import source_answers
from serve.admission import Admission
from serve.exporter import PrometheusExporter
from serve.history import INTERVAL_S, History
from serve.http import guard
from serve.token_sources import SourceBook
from tests.browser import browser
from tests.local_http import serving

KEY = "a key that is in no page"
WORDS = ["Draft", "s ", "are <b>", "checked", "</b> ", "by the ", "target", "."]
STEPS = ((3, "ngram", 2), (3, "eagle3", 2), (2, "model", 1))  # tokens, drafter, accepted
SOURCES = ["ngram", "ngram", "target", "eagle3", "eagle3", "target", "model", "target"]
NARROW, WIDE = {"width": 360, "height": 740}, {"width": 1600, "height": 1000}


def _hour(registry: CollectorRegistry) -> History:
    """Traffic of two domains, three versions, an alarm."""
    times = iter(1e9 + INTERVAL_S * i for i in range(100_000))
    history, exporter = History(registry, clock=lambda: next(times)), PrometheusExporter(registry)
    for i in range(200):
        right = int(50 + 30 * math.sin(i / 30))
        report = EngineReport(
            steps=20,
            emitted_tokens=100 + right,
            busy_s=4.0,
            measured_s=4.0,
            plain_s=4.0 * (0.8 + i / 200),
            accepted_by_domain={"sql": [100, right], "<img src=x onerror=alert(1)>": [100, 30]},
            tokens_by_source={"target": 100, "ngram": right // 2, "eagle3": right - right // 2},
            drafter_version=1 + i // 80,
        )
        exporter.update(report)
        history.observe(report)
    exporter.set("aurora_trainer_alive", 1)
    exporter.set("aurora_training_share", 0.4)
    exporter.set("aurora_alarm", 1, kind="speculation_off")
    return history


class Model:
    """Plays vLLM: streams WORDS, a verification step a chunk."""

    def __init__(self, app: FastAPI) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.release = asyncio.Event()
        self._book = SourceBook(speculates=True)
        app.get("/v1/models")(self._models)
        app.post("/v1/chat/completions")(self._chat)

        tokenizer = SimpleNamespace(decode=lambda ids: WORDS[ids[0]])
        processor = SimpleNamespace(process_outputs=lambda outputs: None)
        client = SimpleNamespace(tokenizer=tokenizer, output_processor=processor)
        source_answers.install(app, self._book, client)

    async def _models(self) -> dict[str, Any]:
        return {"data": [{"id": "tiny"}]}

    async def _chat(self, request: Request) -> StreamingResponse:
        self.bodies.append(await request.json())
        return StreamingResponse(self._stream(self.bodies[-1]), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any]) -> Any:
        first = 0
        for tokens, kind, accepted in STEPS:
            self._book.add(body["vllm_xargs"]["aurora_token_sources"], kind, accepted, tokens)
            ids = list(range(first, first + tokens))
            first += tokens
            delta = {"content": "".join(WORDS[i] for i in ids)}
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'token_ids': ids}]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': first}})}\n\ndata: [DONE]\n\n"


class Served:
    def __init__(self, host: str) -> None:
        self.app = FastAPI()
        config = AuroraConfig(server=ServerConfig(host=host))
        guard(self.app, config, (KEY,), Admission(4), _hour(CollectorRegistry()))
        self.model = Model(self.app)
        self.url = ""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server that others reach: its data wants the key."""
    served = Served("0.0.0.0")
    with serving(served.app) as served.url:
        yield served


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture
def tab(chromium: Any, served: Served) -> Iterator[Any]:
    """A tab on the page; whatever the browser complains of, blocks, or asks of another host fails the test."""
    context = chromium.new_context(viewport=WIDE)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("request", lambda asked: None if asked.url.startswith((served.url, "data:")) else wrong.append(asked.url))
    page.goto(f"{served.url}/aurora")
    yield page
    context.close()
    assert [text for text in wrong if "401 (Unauthorized)" not in text] == []


def _sign_in(tab: Any) -> None:
    tab.get_by_label("Key", exact=True).fill(KEY)
    tab.get_by_label("Key", exact=True).press("Enter")
    tab.locator("#connection.live").wait_for()


def test_the_key_is_asked_for_and_kept_in_this_tab_only(tab: Any) -> None:
    tab.get_by_label("Key", exact=True).fill("wrong")
    tab.get_by_role("button", name="Use this key").click()
    tab.locator("#key-wanted:not([hidden])").wait_for()
    assert tab.locator("#cards").inner_text() == ""
    _sign_in(tab)
    assert tab.locator("#key-wanted").is_hidden()
    assert tab.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert KEY not in tab.content()
    assert KEY not in tab.url
    tab.reload()
    tab.locator("#connection.live").wait_for()


def test_curves_versions_and_alarms_are_shown(tab: Any) -> None:
    _sign_in(tab)
    assert "speculation_off" in tab.locator("#alarms").inner_text()
    assert "learning" in tab.locator("#cards").inner_text()
    for name in ("Estimated speed-up", "Acceptance by domain over time", "Who wrote the tokens", "3 events of drafter"):
        assert tab.locator(f"svg[role=img][aria-label^='{name}']").count() == 1, name
    assert len(tab.locator("#speed polyline").get_attribute("points").split()) == 199
    assert tab.locator("#versions tbody tr").count() == 3
    assert "<img src=x" in tab.locator("#domains").inner_html().replace("&lt;", "<"), "a domain's name is text"
    assert tab.locator("main img").count() == 0


def test_each_token_has_the_colour_of_who_wrote_it(tab: Any, served: Served) -> None:
    _sign_in(tab)
    tab.get_by_label("Message").fill("hello")
    tab.get_by_label("Message").press("Control+Enter")
    tab.get_by_text("8 tokens").wait_for()
    tokens = tab.locator("#answer .token")
    assert tokens.all_inner_texts() == [word.strip() for word in WORDS] or tokens.all_text_contents() == WORDS
    assert tab.locator("#answer").text_content() == "".join(WORDS), "markup of the model's is text"
    classes = [each.removeprefix("token ") for each in tokens.evaluate_all("all => all.map(one => one.className)")]
    assert classes == SOURCES
    colours = tokens.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert len(set(colours)) == 4
    assert served.model.bodies[-1]["messages"] == [{"role": "user", "content": "hello"}]
    assert "n-gram table 2 (25 %)" in tab.locator("#shares").inner_text()
    assert tab.locator("#send").is_enabled()


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_is_readable(tab: Any, size: dict[str, int], scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size(size)
    _sign_in(tab)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    assert tab.evaluate(_LEAST_CONTRAST) >= 4.5, "WCAG AA"


def test_charts_follow_the_size_of_the_window(tab: Any) -> None:
    _sign_in(tab)
    for size in (NARROW, WIDE):
        tab.set_viewport_size(size)
        tab.wait_for_function("""() => [...document.querySelectorAll("main svg")].every(
            (chart) => chart.viewBox.baseVal.width === chart.parentElement.clientWidth)""")


def test_the_keyboard_reaches_everything(tab: Any) -> None:
    _sign_in(tab)
    tab.reload()
    tab.locator("#connection.live").wait_for()
    seen = []
    for _ in range(9):
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate("document.activeElement.id || document.activeElement.className"))
    for each in ("skip", "scroll", "prompt", "tokens", "temperature", "send"):
        assert each in seen, seen


# Over all texts that are seen: contrast of the text with what is behind it.
_LEAST_CONTRAST = """() => {
  const parts = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return parts(colour)[3] === 0 && element.parentElement ? behind(element.parentElement) : colour;
  };
  const texts = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.disabled &&
    [...e.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
  return Math.min(...texts.map((e) => {
    const style = getComputedStyle(e);
    const ink = light(e instanceof SVGElement ? style.fill : style.color), back = light(behind(e));
    return (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
  }));
}"""
