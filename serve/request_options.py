"""What a request may ask of speculation, as OpenAI's clients send it: `metadata: {"domain": "sql"}`, and in the extra
body `max_speculation: 2` (longest draft), `token_deadline_ms: 50` (time between its tokens, objective slo) and
`aurora_token_sources: true` (who wrote each token; `serve.token_sources` sees to that).

vLLM hands `vllm_xargs` to the scheduler and drops what it does not know, so that this ASGI middleware moves the three
into it before vLLM reads the request. In `vllm_xargs` they may stand from the start.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from serve.asgi import Replay, header, path_of, read_body, send_error, sized
from serve.domains import MAX_LABEL

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

_ROUTES = ("/v1/chat/completions", "/v1/completions")
_SHOWN = 80  # characters of a wrong value


class BadOption(ValueError):
    """A value that cannot be used; the message names it and the remedy."""

    def __init__(self, name: str, value: object, remedy: str) -> None:
        super().__init__(f"{name} {json.dumps(value)[:_SHOWN]}: {remedy}")
        self.name = name


@dataclass(frozen=True)
class RequestOptions:
    """What one request asks of speculation."""

    domain: str = ""
    max_speculation: int | None = None  # longest draft
    token_deadline_ms: float | None = None  # between its tokens
    aurora_token_sources: str = ""  # under which name the HTTP server waits for its tokens' sources; "": it does not

    @classmethod
    def of(cls, arguments: Mapping[str, Any] | None) -> "RequestOptions":
        """From a request's `vllm_xargs`, which the middleware has seen."""
        known = {name: value for name, value in (arguments or {}).items() if name in _CHECKS}
        return cls(**known)


class RequestOptionsMiddleware:
    """Reads the bodies of requests that carry JSON to chat completions and completions; all else passes untouched.

    Bodies are held whole, as vLLM holds them. One that has none of the options is handed on byte for byte, and so is
    one that is no JSON object, which vLLM refuses in its own words. An option that makes no sense is answered with
    status 400. The answer's way back is never touched.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if not concerned(scope):
            await self._app(scope, receive, send)
            return
        body, left = await read_body(receive)
        if left is not None:
            await self._app(scope, Replay(body, left, receive), send)
            return
        try:
            body = with_options(body)
        except BadOption as error:
            await send_error(send, HTTPStatus.BAD_REQUEST, str(error), error.name)
            return
        await self._app(sized(scope, len(body)), Replay(body, None, receive), send)


def install(app: "Starlette") -> None:
    """Add it to an application that does not serve yet, innermost: a body is read once the API key was checked."""
    from starlette.middleware import Middleware

    app.user_middleware.append(Middleware(RequestOptionsMiddleware))
    app.middleware_stack = None  # vLLM's is built already; the next request builds it anew


def with_options(body: bytes) -> bytes:
    """The request's body with its options where vLLM hands them on. Raises BadOption."""
    if not any(word in body for word in _WORDS):
        return body
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(request, dict):
        return body
    arguments = {} if request.get("vllm_xargs") is None else request["vllm_xargs"]
    if not isinstance(arguments, dict):
        return body
    for name in _CHECKS.keys() & arguments.keys():
        _CHECKS[name](f"vllm_xargs.{name}", arguments[name])
    asked = _asked(request)
    if not asked:
        return body
    kept = {name: value for name, value in request.items() if name not in asked}
    return json.dumps(kept | {"vllm_xargs": arguments | asked}).encode()


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    """The options that stand outside `vllm_xargs`, checked. Raises BadOption."""
    sources = request.get(SOURCES_OPTION)
    if sources is not None and not isinstance(sources, bool):
        raise BadOption(SOURCES_OPTION, sources, "must be true or false; leave it out for false")
    asked = {name: request[name] for name in _NUMBERS if request.get(name) is not None}
    for name, value in asked.items():
        _CHECKS[name](name, value)
    metadata = request.get("metadata")
    if isinstance(metadata, dict) and metadata.get("domain") is not None:
        _check_domain("metadata.domain", metadata["domain"])
        asked["domain"] = metadata["domain"]
    return asked


def _check_domain(name: str, label: object) -> None:
    if not isinstance(label, str) or len(label) > MAX_LABEL:
        remedy = f'must be a string of at most {MAX_LABEL} characters, for example "sql"; shorten it or leave it out'
        raise BadOption(name, label, remedy)


def _check_max_speculation(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadOption(name, value, "must be a whole number of drafts, 0 for none; leave it out for no bound")


def _check_token_deadline(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadOption(name, value, "must be a number of milliseconds above 0, for example 50; or leave it out")


def _refuse_token_sources(name: str, value: object) -> None:
    raise BadOption(name, value, f"does not belong into vllm_xargs; say {SOURCES_OPTION} beside them")


SOURCES_OPTION = "aurora_token_sources"
_CHECKS: dict[str, Callable[[str, object], None]] = {
    "domain": _check_domain,
    "max_speculation": _check_max_speculation,
    "token_deadline_ms": _check_token_deadline,
    SOURCES_OPTION: _refuse_token_sources,
}
_NUMBERS = ("max_speculation", "token_deadline_ms")
_WORDS = (b'"metadata"', b'"vllm_xargs"', *(f'"{name}"'.encode() for name in (*_NUMBERS, SOURCES_OPTION)))


def concerned(scope: "Scope") -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    kind = header(scope, b"content-type").split(b";")[0].strip().lower()
    return path_of(scope) in _ROUTES and kind == b"application/json"
