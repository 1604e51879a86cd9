"""What the server takes on: real sockets, real bodies."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from aurora.config import LimitsConfig
from serve.admission import Admission, AdmissionMiddleware
from tests.local_http import serving
from tests.waiting import wait_until

LIMITS = LimitsConfig(body_kib=4, header_kib=4, request_s=1.0)


class Busy:
    """An application whose requests end when they are told to."""

    def __init__(self, places: int = 2, limits: LimitsConfig = LIMITS) -> None:
        self.app = FastAPI()
        self.app.post("/echo")(self._echo)
        self.app.post("/wait")(self._wait)
        self.app.post("/stream")(self._stream)
        self.app.get("/hello")(self._hello)
        self.admission = Admission(places)
        self.app.add_middleware(AdmissionMiddleware, admission=self.admission, limits=limits)
        self.refused = 0
        self.admission.on_refused = self._count
        self.go = threading.Event()
        self.url = ""

    def _count(self) -> None:
        self.refused += 1

    async def _echo(self, request: Request) -> int:
        return len(await request.body())

    async def _wait(self) -> str:
        await asyncio.to_thread(self.go.wait)
        return "done"

    async def _stream(self) -> StreamingResponse:
        self.loop = asyncio.get_running_loop()
        return StreamingResponse(self._chunks(), media_type="text/event-stream")

    async def _chunks(self) -> AsyncIterator[str]:
        yield "data: 1\n\n"
        await asyncio.to_thread(self.go.wait)

    async def _hello(self) -> str:
        return "hello"


@pytest.fixture
def busy() -> Iterator[Busy]:
    busy = Busy()
    with serving(busy.app) as busy.url:
        yield busy
        busy.go.set()


@pytest.fixture
def patient() -> Iterator[Busy]:
    busy = Busy(limits=LimitsConfig())
    with serving(busy.app) as busy.url:
        yield busy
        busy.go.set()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_not_read(busy: Busy, chunked: bool) -> None:
    def post(size: int) -> httpx.Response:
        body = b"x" * size
        return httpx.post(
            busy.url + "/echo", content=(c for c in (body[: size // 2], body[size // 2 :])) if chunked else body
        )

    assert post(4096).json() == 4096
    answer = post(4097)
    assert answer.status_code == 413
    assert "limits.body_kib 4" in answer.json()["error"]["message"]
    assert post(17).json() == 17
    assert busy.admission.open == 0


def test_headers_that_are_too_large_are_refused(busy: Busy) -> None:
    for method, path in (("GET", "/hello"), ("POST", "/echo")):
        answer = httpx.request(method, busy.url + path, headers={f"h{i}": "x" * 1000 for i in range(5)})
        assert answer.status_code == 431
        assert "more than 4 KiB (limits.header_kib)" in answer.json()["error"]["message"]


def test_nobody_is_let_in_to_an_engine_that_died(patient: Busy) -> None:
    patient.go.set()
    assert httpx.post(patient.url + "/wait").status_code == 200
    patient.admission.engine_died = lambda: True
    answer = httpx.post(patient.url + "/wait")
    assert answer.status_code == 503
    assert "the server restarts; ask again in" in answer.json()["error"]["message"]


def test_one_too_many_is_asked_to_come_again(patient: Busy) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(httpx.post, patient.url + "/wait", timeout=60) for _ in range(2)]
        wait_until(lambda: patient.admission.open == 2, 30, "both are open")
        answer = httpx.post(patient.url + "/wait")
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "ServiceUnavailableError"
        assert httpx.get(patient.url + "/hello").status_code == 200, "looking at it is always possible"
        patient.go.set()
        assert [f.result().json() for f in first] == ["done", "done"]
    assert httpx.post(patient.url + "/wait").status_code == 200
    assert patient.refused == 1


def test_a_request_has_its_time(busy: Busy) -> None:
    answer = httpx.post(busy.url + "/wait", timeout=30)
    assert answer.status_code == 504
    assert "limits.request_s" in answer.json()["error"]["message"]
    streamed = httpx.post(busy.url + "/stream", timeout=30)
    assert streamed.status_code == 200
    first, error, done = streamed.text.strip().split("\n\n")
    assert (first, done) == ("data: 1", "data: [DONE]")
    assert "took longer than 1 s" in error
    assert busy.admission.open == 0


def test_a_body_that_never_comes_has_the_same_time(busy: Busy) -> None:
    host, port = busy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"POST /echo HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\nabc".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 504")


def test_a_client_that_leaves_gives_its_place_back(patient: Busy) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(patient.url + "/stream", timeout=0.3)
    wait_until(lambda: patient.admission.open == 0, 30, "the place is free again")


def test_after_a_stop_open_requests_end_and_new_ones_are_refused(patient: Busy) -> None:
    with ThreadPoolExecutor(1) as pool:
        open_one = pool.submit(httpx.post, patient.url + "/wait", timeout=60)
        wait_until(lambda: patient.admission.open == 1, 30, "it is open")
        patient.admission.draining = True
        answer = httpx.post(patient.url + "/echo")
        assert answer.status_code == 503
        assert "shutting down" in answer.json()["error"]["message"]
        patient.go.set()
        assert open_one.result().json() == "done"


def test_what_takes_longer_than_a_stop_allows_is_told(patient: Busy) -> None:
    def stop() -> int:
        return asyncio.run_coroutine_threadsafe(patient.admission.drain(0.05), patient.loop).result(30)

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(httpx.post, patient.url + "/wait", timeout=60)
        streaming = pool.submit(httpx.post, patient.url + "/stream", timeout=60)
        wait_until(lambda: patient.admission.open == 2, 30, "both are open")
        assert stop() == 2
        assert waiting.result().status_code == 503
        assert "shut down before the answer was complete" in waiting.result().text
        assert "shut down before the answer was complete" in streaming.result().text
    assert stop() == 0, "nothing is left"


async def test_retry_after_follows_how_long_requests_take() -> None:
    now = [0.0]
    admission = Admission(1, lambda: now[0])
    assert admission.retry_after_s == 1
    for seconds, expected in ((12.0, 12), (1e4, 60)):
        for _ in range(50):
            end = asyncio.timeout(None)
            admission.enter(end)
            now[0] += seconds
            admission.leave(end)
        assert admission.retry_after_s == expected


async def test_a_stop_does_not_wait_for_who_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.admission._CUT_OFF_S", 0.01)
    admission = Admission(1)
    admission.enter(asyncio.timeout(None))  # one that cannot be rescheduled, and never leaves
    assert await admission.drain(0.01) == 1
