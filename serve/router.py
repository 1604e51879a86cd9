"""The one endpoint in front of several replicas: an ASGI application that hands requests on and streams pass through.

A request goes to the replica that `Fleet` picks. One that a replica does not take (it is gone, drains or is full) goes
to another; one whose replica broke off before the first byte of an answer is asked once more elsewhere, and no more
often: a request that ends engines must not end them all. What breaks off in the middle of an answer is told to the
client in the answer.
"""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import aiohttp
import msgspec
from yarl import URL

from serve import merged_history, page
from serve.access import METRICS_PATH, PAGE_DATA_PATH
from serve.asgi import error_body, path_of, read_body, send_error
from serve.fleet import CHARACTERS_PER_TOKEN, Ask, Fleet, NoReplica, Replica, Work
from serve.history import Hour
from serve.merged_metrics import OPEN, REQUESTS, UP, merged

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

REPLICA_HEADER = b"x-aurora-replica"
_CONNECT_S = 5.0
_LOOK_AT_S = 10.0  # longest time of a replica's metrics or page data
_IDLE_S = 2.0  # of a connection before it is closed, well before a replica does so under a request (5 s, serve.listen)
_SILENCE_S = 20
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": _SILENCE_S * 1000}
_LOOK_S = 1.0
_BROKEN = 1  # replicas that may break off under one request before it is given up
_REFUSED = 8  # times that a request is handed on because a replica does not take it
_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade"})  # RFC 9110, 7.6.1
_OURS = frozenset({b"host", b"content-length", b"authorization", b"x-api-key"})
_UVICORNS = frozenset({b"date", b"server"})  # our own says them
_NOBODY = "no replica is up; they are being started anew"


class _Refused(Exception):
    """The replica takes nothing more, or nobody is there."""


class _Broken(Exception):
    """The replica broke off; `begun` tells whether the client has part of the answer."""

    def __init__(self, begun: bool) -> None:
        self.begun = begun


class RouterApp:
    """Answers for all replicas of `fleet`. Use inside `async with`."""

    def __init__(self, fleet: Fleet, key: str) -> None:
        """key: what the replicas ask for."""
        self._fleet = fleet
        self._key = key
        self._session: aiohttp.ClientSession | None = None
        self._looking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "RouterApp":
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S, socket_factory=_socket)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False)
        self._looking = asyncio.create_task(self._look_forever())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._looking is not None:
            self._looking.cancel()
        if self._session is not None:
            await self._session.close()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        path = path_of(scope)
        if path in ("/health", "/ready", "/ping"):
            await self._say_health(send)
        elif path == METRICS_PATH:
            await self._say_metrics(send)
        elif path == PAGE_DATA_PATH and scope["method"] == "GET":
            await self._say_hour(scope["query_string"], send)
        else:
            body, left = await read_body(receive)
            if left is None:
                handing = asyncio.create_task(self._hand_on(scope, body, send))
                await _unless_left(handing, receive)

    async def _say_health(self, send: "Send") -> None:
        if self._fleet.living:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        else:
            await send_error(send, HTTPStatus.SERVICE_UNAVAILABLE, _NOBODY, headers=[(b"retry-after", b"10")])

    async def _say_metrics(self, send: "Send") -> None:
        UP.clear()  # those that have left
        OPEN.clear()
        for replica in self._fleet.replicas:
            UP.labels(replica.name).set(replica.up)
            OPEN.labels(replica.name).set(len(replica.open))
        pages = {name: text.decode(errors="replace") for name, text in (await self._of_each(METRICS_PATH)).items()}
        await _say(send, merged(pages), {"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _say_hour(self, query: bytes, send: "Send") -> None:
        """The page's data of one replica or, merged, of all."""
        asked = {name: values[-1] for name, values in parse_qs(query.decode("latin-1")).items()}
        since_s = page.seconds(asked.get("since", ""))
        start_s = merged_history.span_start(since_s)
        found: dict[str, Hour] = {}
        for name, said in (await self._of_each(f"{PAGE_DATA_PATH}?since={start_s}")).items():
            with suppress(msgspec.DecodeError):  # a replica of another version
                found[name] = msgspec.json.decode(said, type=Hour)
        away = [replica.name for replica in self._fleet.replicas if replica.name not in found]
        hour = merged_history.merged(found, away, since_s, time.time(), asked.get("replica", ""))
        await _say(send, msgspec.json.encode(hour), page.DATA_HEADERS)

    async def _of_each(self, path: str) -> dict[str, bytes]:
        """What the replicas that answer say there."""
        living = self._fleet.living
        said = await asyncio.gather(*(self._got(replica, path) for replica in living))
        return {replica.name: text for replica, text in zip(living, said, strict=True) if text is not None}

    async def _got(self, replica: Replica, path: str) -> bytes | None:
        assert self._session is not None
        with suppress(aiohttp.ClientError, TimeoutError):
            timeout = aiohttp.ClientTimeout(total=_LOOK_AT_S)
            async with self._session.get(f"{replica.url}{path}", headers=self._credentials, timeout=timeout) as answer:
                return await answer.read() if answer.status == HTTPStatus.OK else None
        return None

    @property
    def _credentials(self) -> Mapping[str, str]:
        return {"authorization": f"Bearer {self._key}"}

    async def _hand_on(self, scope: "Scope", body: bytes, send: "Send") -> None:
        """Ask replicas until one answers."""
        ask = Ask.of(body) if scope["method"] == "POST" else Ask(None, 0, 1, ())
        broken = refused = 0
        while broken <= _BROKEN and refused <= _REFUSED:
            try:
                replica, work = await self._fleet.take(ask)
            except NoReplica:
                break
            try:
                await self._through(replica, work, scope, body, send)
                return
            except _Refused:
                refused += 1
                REQUESTS.labels(replica.name, "handed_on").inc()
            except _Broken as error:
                broken += 1
                REQUESTS.labels(replica.name, "broken").inc()
                log.warning("%s broke off under a request", replica.name)
                if error.begun:
                    return
        message = "the replicas broke off under this request" if broken > _BROKEN else _NOBODY
        await send_error(send, HTTPStatus.SERVICE_UNAVAILABLE, message, headers=[(b"retry-after", b"10")])

    async def _through(self, replica: Replica, work: Work, scope: "Scope", body: bytes, send: "Send") -> None:
        """One try. Raises _Refused and _Broken."""
        whole = begun = False
        try:
            async with self._asked(replica, scope, body) as answer:
                if answer.status == HTTPStatus.SERVICE_UNAVAILABLE:
                    self._fleet.rest(replica)
                    raise _Refused
                measure = _Measure(work, answer.content_type)
                async for chunk in _chunks(answer):
                    if not begun:
                        await send(_head(answer, replica))
                        begun = True
                    measure(chunk)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if not begun:
                    await send(_head(answer, replica))
                    begun = True
                whole = answer.status == HTTPStatus.OK
                await send({"type": "http.response.body", "body": b""})
                REQUESTS.labels(replica.name, "answered").inc()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            await self._fleet.down(replica)
            raise _Refused from error
        except (aiohttp.ClientError, ConnectionError) as error:
            await self._lost(replica)
            if begun:
                await _tell_broken(answer, send)
            raise _Broken(begun) from error
        finally:
            await self._fleet.end(replica, work, whole=whole)

    def _asked(self, replica: Replica, scope: "Scope", body: bytes) -> "aiohttp.client._RequestContextManager":
        assert self._session is not None
        kept = [(k, v) for k, v in scope["headers"] if k not in _HOP and k not in _OURS]
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in kept]
        query = scope["query_string"]
        path = scope.get("raw_path") or scope["path"].encode()
        url = replica.url + path.decode("latin-1") + (f"?{query.decode('latin-1')}" if query else "")
        return self._session.request(
            scope["method"],
            URL(url, encoded=True),
            headers=[*headers, *self._credentials.items()],
            data=body or None,
            allow_redirects=False,
        )

    async def _lost(self, replica: Replica) -> None:
        """A connection broke: of one that does not answer any more nothing is asked until it does."""
        if not await self._well(replica):
            await self._fleet.down(replica)

    async def _well(self, replica: Replica) -> bool:
        assert self._session is not None
        with suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
            timeout = aiohttp.ClientTimeout(total=_CONNECT_S)
            async with self._session.get(f"{replica.url}/health", timeout=timeout) as answer:
                return answer.status == HTTPStatus.OK
        return False

    async def _look_forever(self) -> None:
        """See whether replicas that were down answer again."""
        while True:
            for replica in self._fleet.replicas:
                if not replica.up and await self._well(replica):
                    await self._fleet.back(replica)
            await asyncio.sleep(_LOOK_S)


async def _say(send: "Send", body: bytes, headers: Mapping[str, str]) -> None:
    told = [(name.encode(), value.encode()) for name, value in headers.items()]
    told.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": told})
    await send({"type": "http.response.body", "body": body})


class _Measure:
    """Counts what an answer has emitted, so far as it passes by: tokens where it says them, else its text's length."""

    def __init__(self, work: Work, kind: str) -> None:
        self._work = work
        self._whole = bytearray() if kind == "application/json" else None
        self._rest = b""

    def __call__(self, chunk: bytes) -> None:
        if self._whole is not None:
            self._whole += chunk
            with suppress(ValueError, TypeError, KeyError):
                self._work.emitted = float(json.loads(self._whole)["usage"]["completion_tokens"])
            return
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        for event in events:
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                self._add(json.loads(event.removeprefix(b"data: ")))

    def _add(self, event: dict[str, object]) -> None:
        usage = event.get("usage")
        if isinstance(usage, dict):
            self._work.emitted = float(usage["completion_tokens"])
            return
        for choice in event.get("choices") or ():  # type: ignore[attr-defined]
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            self._work.emitted += len(text) / CHARACTERS_PER_TOKEN


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """One that breaks off when nothing comes from the other machine for `_SILENCE_S`, however long its answers take:
    a machine that is lost tells nobody, and the kernel of one that is busy answers all the same."""
    family, kind, protocol, *_ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in _KEEPALIVE.items():
        if (number := getattr(socket, option, None)) is not None:  # macOS has some of them
            sock.setsockopt(socket.IPPROTO_TCP, number, seconds)
    return sock


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for chunk in answer.content.iter_any():
        yield chunk


def _head(answer: aiohttp.ClientResponse, replica: Replica) -> dict[str, object]:
    headers = [(k.lower(), v) for k, v in answer.raw_headers if k.lower() not in _HOP and k.lower() not in _UVICORNS]
    headers.append((REPLICA_HEADER, replica.name.encode()))
    return {"type": "http.response.start", "status": answer.status, "headers": headers}


async def _tell_broken(answer: aiohttp.ClientResponse, send: "Send") -> None:
    """End a stream with an error that clients read. Any other answer stays cut: its length tells."""
    if answer.content_type == "text/event-stream":
        error = error_body(HTTPStatus.BAD_GATEWAY, "the replica broke off in the middle of this answer; ask again")
        await send({"type": "http.response.body", "body": b"data: " + error + b"\n\ndata: [DONE]\n\n"})
    else:
        raise ConnectionError("the replica broke off in the middle of an answer")


async def _unless_left(handing: "asyncio.Task[None]", receive: "Receive") -> None:
    """Wait for `handing`; if the client leaves before, cancel it, which ends the request at its replica."""
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({handing, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not handing.done():
            handing.cancel()
    with suppress(asyncio.CancelledError):
        await handing


async def _left(receive: "Receive") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
