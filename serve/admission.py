"""How much the server takes on: sizes of requests, how many are open, how long each may take, and none after a stop.

What is refused is refused before vLLM sees it. Overload is told apart from failure: status 503 with `Retry-After`,
after which clients such as OpenAI's ask again by themselves.
"""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from itertools import chain
from typing import TYPE_CHECKING

from aurora.config import LimitsConfig
from serve.asgi import BodyTooLarge, Replay, error_body, header, path_of, read_body, send_error, sized

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MEMORY = 0.9  # of how long requests took
_LONGEST_RETRY_S = 60
_CUT_OFF_S = 5.0  # that telling the clients of requests that are cut off may take
_CLOSE = (b"connection", b"close")


class Admission:
    """Counts open requests and says whether one more is taken."""

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        """places: requests that may be open, running or waiting."""
        self.places = places
        self._clock = clock
        self.on_refused: Callable[[], None] = lambda: None
        self.on_answer: Callable[[int], None] = lambda _status: None  # told of every answer's status
        self.engine_died: Callable[[], bool] = lambda: False
        self.draining = False
        self.cut_off = False  # open requests are no longer waited for
        self._ends: dict[asyncio.Timeout, float] = {}  # of the open requests -> when they began
        self._usual_s = 1.0  # of the requests of late
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def open(self) -> int:
        return len(self._ends)

    @property
    def admits(self) -> bool:
        return not self.draining and self.open < self.places and not self.engine_died()

    @property
    def retry_after_s(self) -> int:
        """Seconds after which most of the requests that are open now will be through."""
        return min(max(math.ceil(self._usual_s), 1), _LONGEST_RETRY_S)

    def enter(self, end: asyncio.Timeout) -> None:
        """A request was admitted that is over when `end` comes."""
        self._ends[end] = self._clock()
        self._empty.clear()

    def leave(self, end: asyncio.Timeout) -> None:
        """It is over."""
        self._usual_s += (1 - _MEMORY) * (self._clock() - self._ends.pop(end) - self._usual_s)
        if not self._ends:
            self._empty.set()

    async def drain(self, limit_s: float) -> int:
        """Admit nothing more and wait until no request is open; those that still are after `limit_s` are cut off.

        Returns their number.
        """
        self.draining = True
        try:
            async with asyncio.timeout(limit_s):
                await self._empty.wait()
        except TimeoutError:
            late, self.cut_off = self.open, True
            for end in self._ends:
                with suppress(RuntimeError):  # its own time is up already
                    end.reschedule(asyncio.get_running_loop().time())
            with suppress(TimeoutError):  # a client that does not listen is not waited for
                async with asyncio.timeout(_CUT_OFF_S):
                    await self._empty.wait()
            return late
        return 0


class AdmissionMiddleware:
    """Bounds the headers of all requests, and of POST requests the body, the places and the time that they take."""

    def __init__(self, app: "ASGIApp", admission: Admission, limits: LimitsConfig) -> None:
        self._app = app
        self._admission = admission
        self._limits = limits

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "http" and sum(map(len, chain(*scope["headers"]))) > self._limits.header_kib << 10:
            # The parser bounds what it keeps of headers that never end; one that is whole at once may be larger.
            message = f"the headers have more than {self._limits.header_kib} KiB (limits.header_kib); send less"
            await send_error(send, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, headers=[_CLOSE])
        elif scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif not self._admission.admits:
            await self._refuse(send)
        else:
            await self._admit(scope, receive, send)

    async def _refuse(self, send: "Send") -> None:
        admission = self._admission
        admission.on_refused()
        if admission.draining:
            why = "this server is shutting down"
        elif admission.engine_died():
            why = "the server restarts"
        else:
            why = f"{admission.open} requests are open, as many as are taken (limits.waiting)"
        retry = admission.retry_after_s
        headers = [(b"retry-after", str(retry).encode())]
        if admission.draining:
            headers.append(_CLOSE)
        message = f"{why}; ask again in {retry} s"
        await send_error(send, HTTPStatus.SERVICE_UNAVAILABLE, message, headers=headers)

    async def _admit(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        answer, end = _Answer(send), asyncio.timeout(self._limits.request_s)
        self._admission.enter(end)
        try:
            async with end:
                await self._run(scope, receive, answer)
        except TimeoutError:
            if self._admission.cut_off:
                await answer.end(HTTPStatus.SERVICE_UNAVAILABLE, "this server shut down before the answer was complete")
            else:
                late = f"{path_of(scope)} took longer than {self._limits.request_s:g} s (limits.request_s)"
                await answer.end(HTTPStatus.GATEWAY_TIMEOUT, late)
        finally:
            self._admission.leave(end)

    async def _run(self, scope: "Scope", receive: "Receive", answer: "_Answer") -> None:
        limit = self._limits.body_kib << 10
        announced = header(scope, b"content-length")
        try:
            if announced.isdigit() and int(announced) > limit:
                raise BodyTooLarge
            body, left = await read_body(receive, limit)
        except BodyTooLarge:
            message = f"the body has more than {limit} bytes (limits.body_kib {self._limits.body_kib}); send less"
            await send_error(answer, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, headers=[_CLOSE])
            return
        await self._app(sized(scope, len(body)) if left is None else scope, Replay(body, left, receive), answer)


class _Answer:
    """Sends an answer on and knows how far it is."""

    def __init__(self, send: "Send") -> None:
        self._send = send
        self._head: Message | None = None

    async def __call__(self, message: "Message") -> None:
        if message["type"] == "http.response.start":
            self._head = message
        await self._send(message)

    async def end(self, status: HTTPStatus, message: str) -> None:
        """Tell the client what went wrong, in whatever way is left. Raises TimeoutError where there is none."""
        if self._head is None:
            await send_error(self._send, status, message, headers=[_CLOSE])
            return
        if not dict(self._head["headers"]).get(b"content-type", b"").startswith(b"text/event-stream"):
            raise TimeoutError(message)
        event = b"data: " + error_body(status, message) + b"\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": event})
