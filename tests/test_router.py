"""The router in front of real HTTP servers that do what replicas do on a bad day."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

import anyio.to_thread
import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client.parser import text_string_to_metric_families

from serve.fleet import Ask, Fleet
from serve.router import RouterApp, _socket
from tests.local_http import serving

KEY = "inner"
BODY = {"model": "m", "prompt": "hello", "max_tokens": 4}


@dataclass
class Upstream:
    """A replica, as far as a router sees one."""

    name: str
    behaviour: str = "answers"
    asked: int = 0
    gone: threading.Event = field(default_factory=threading.Event)  # a client left in the middle
    go_on: threading.Event = field(default_factory=threading.Event)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/completions")
        async def complete(request: Request) -> Response:
            self.asked += 1
            body = await request.json()
            assert request.headers["authorization"] == f"Bearer {KEY}"
            if self.behaviour == "full":
                return JSONResponse({"error": {}}, 503)
            if self.behaviour == "dies":
                return StreamingResponse(self._broken(before=0), headers={"content-length": "1000"})
            if body.get("stream"):
                return StreamingResponse(self._events(), media_type="text/event-stream")
            return JSONResponse({"from": self.name, "usage": {"completion_tokens": 4}, "asked": body})

        @app.get("/health")
        async def health() -> Response:
            return Response()

        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(
                f"# TYPE aurora_steps counter\naurora_steps_total {len(self.name)}\n", media_type="text/plain"
            )

        return app

    async def _broken(self, before: int) -> AsyncIterator[bytes]:
        for _ in range(before):
            yield self._event("a")
        raise ConnectionResetError("as when the process dies")

    async def _events(self) -> AsyncIterator[bytes]:
        if self.behaviour == "dies in the middle":
            async for event in self._broken(before=2):
                yield event
        try:
            yield self._event("one")
            if self.behaviour == "waits":
                await anyio.to_thread.run_sync(self.go_on.wait, 30, abandon_on_cancel=True)
            yield self._event("two")
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise

    @staticmethod
    def _event(text: str) -> bytes:
        return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


@dataclass
class Routed:
    """A running router, its fleet and what is behind it."""

    url: str
    fleet: Fleet
    upstreams: list[Upstream]
    loop: asyncio.AbstractEventLoop

    def post(self, **fields: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=BODY | fields, timeout=30)

    def join(self, name: str, url: str) -> None:
        asyncio.run_coroutine_threadsafe(self.fleet.join(name, url, places=8), self.loop).result(10)

    def leave(self, name: str) -> None:
        asyncio.run_coroutine_threadsafe(self.fleet.leave(name), self.loop).result(10)


@pytest.fixture
def routed() -> Iterator[Routed]:
    upstreams = [Upstream("a"), Upstream("bb")]
    fleet, loops = Fleet("round_robin"), []
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(upstream.app())) for upstream in upstreams]

        @asynccontextmanager
        async def life(_app: FastAPI) -> AsyncIterator[None]:
            loops.append(asyncio.get_running_loop())
            async with router:
                for upstream, url in zip(upstreams, urls, strict=True):
                    await fleet.join(upstream.name, url, places=8)
                yield

        router = RouterApp(fleet, KEY)
        app = FastAPI(lifespan=life, openapi_url=None)
        app.mount("/", router)
        url = stack.enter_context(serving(app))
        assert httpx.get(f"{url}/health").status_code == 200
        yield Routed(url, fleet, upstreams, loops[0])


def test_requests_go_to_each_in_turn_and_come_back_as_they_are(routed: Routed) -> None:
    answers = [routed.post(seed=i) for i in range(4)]
    assert [answer.headers["x-aurora-replica"] for answer in answers] == ["a", "bb", "a", "bb"]
    assert [answer.json()["from"] for answer in answers] == ["a", "bb", "a", "bb"]
    assert [answer.json()["asked"] for answer in answers] == [BODY | {"seed": i} for i in range(4)]
    assert not any(replica.open for replica in routed.fleet.replicas)


def test_a_stream_passes_through_event_by_event(routed: Routed) -> None:
    upstream = routed.upstreams[0]
    upstream.behaviour = "waits"
    with httpx.stream("POST", f"{routed.url}/v1/completions", json=BODY | {"stream": True}, timeout=30) as answer:
        lines = answer.iter_lines()
        assert "one" in next(line for line in lines if line), "before the second one is there"
        upstream.go_on.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_client_that_leaves_ends_its_request_at_the_replica(routed: Routed) -> None:
    upstream = routed.upstreams[0]
    upstream.behaviour = "waits"
    with httpx.stream("POST", f"{routed.url}/v1/completions", json=BODY | {"stream": True}, timeout=30) as answer:
        next(answer.iter_lines())
    assert upstream.gone.wait(30)
    upstream.go_on.set()


@pytest.mark.parametrize("behaviour", ["full", "dies"])
def test_what_one_does_not_answer_another_does(routed: Routed, behaviour: str) -> None:
    routed.upstreams[0].behaviour = behaviour
    for _ in range(3):
        answer = routed.post()
        assert (answer.status_code, answer.json()["from"]) == (200, "bb")
    assert routed.upstreams[0].asked >= 1


def test_a_machine_that_does_not_answer_is_passed_over(routed: Routed) -> None:
    with socket.socket() as mute, ExitStack() as stack:
        mute.bind(("127.0.0.1", 0))
        mute.listen(0)
        for _ in range(3):  # who asks now is kept waiting
            knocking = stack.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex(mute.getsockname())
        routed.join("a", f"http://127.0.0.1:{mute.getsockname()[1]}")
        answers = [routed.post() for _ in range(3)]
    assert {answer.headers["x-aurora-replica"] for answer in answers} == {"bb"}
    assert [replica.name for replica in routed.fleet.living] == ["bb"]


def test_a_connection_to_a_machine_that_is_lost_does_not_stay_open_for_ever() -> None:
    address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 80))
    with _socket(address) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000


def test_what_breaks_off_in_the_middle_is_said_in_the_stream(routed: Routed) -> None:
    routed.upstreams[0].behaviour = "dies in the middle"
    answer = routed.post(stream=True)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert answer.status_code == 200
    assert json.loads(events[0])["choices"][0]["text"] == "a"
    assert "broke off" in json.loads(events[-2])["error"]["message"]
    assert events[-1] == "[DONE]"


def test_a_request_under_which_two_replicas_die_is_not_given_to_a_third(routed: Routed) -> None:
    for upstream in routed.upstreams:
        upstream.behaviour = "dies"
    answer = routed.post()
    assert answer.status_code == 503
    assert "broke off under this request" in answer.json()["error"]["message"]
    assert sum(upstream.asked for upstream in routed.upstreams) == 2


def test_one_that_has_left_gets_nothing_more_and_with_nobody_there_all_are_told_to_come_back(routed: Routed) -> None:
    routed.leave("a")
    assert {routed.post().json()["from"] for _ in range(3)} == {"bb"}
    routed.leave("bb")
    answer = routed.post()
    assert answer.status_code == httpx.get(f"{routed.url}/health").status_code == 503
    assert answer.headers["retry-after"]


def test_metrics_of_all_replicas_are_one_page(routed: Routed) -> None:
    routed.post()
    page = httpx.get(f"{routed.url}/metrics").text
    samples = {
        (sample.name, sample.labels.get("replica")): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert samples["aurora_steps_total", "a"] == 1
    assert samples["aurora_steps_total", "bb"] == 2
    assert samples["aurora_router_replica_up", "a"] == 1
    assert samples["aurora_router_requests_total", "a"] >= 1
    routed.leave("a")
    assert 'aurora_router_replica_up{replica="a"}' not in httpx.get(f"{routed.url}/metrics").text


def test_what_a_body_says_of_its_work() -> None:
    ask = Ask.of(json.dumps({"prompt": "x" * 1200, "max_tokens": 7, "metadata": {"domain": "sql"}}).encode())
    assert (ask.label, ask.prompt_tokens, ask.longest, len(ask.blocks)) == ("sql", 300, 7, 2)
    longer = Ask.of(json.dumps({"prompt": "x" * 2000}).encode())
    assert longer.blocks[:2] == ask.blocks, "equal prefixes have equal hashes"
    salted = Ask.of(json.dumps({"prompt": "x" * 2000, "cache_salt": "tenant"}).encode())
    assert not set(salted.blocks) & set(longer.blocks)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"prompt": 3}', b'{"messages": 1, "max_tokens": "x"}', b"\xff"])
def test_a_body_that_says_nothing_is_left_to_the_replica(body: bytes) -> None:
    assert Ask.of(body).label is None
