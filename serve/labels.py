"""Domain labels as OpenAI's clients send them: `metadata: {"domain": "sql"}` becomes `vllm_xargs: {"domain": "sql"}`.

vLLM hands `vllm_xargs` to the scheduler and drops `metadata`, so that this ASGI middleware moves the label from one to
the other before vLLM reads the request.
"""

import json
from typing import TYPE_CHECKING, Any

from serve.domains import MAX_LABEL

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ROUTES = ("/v1/chat/completions", "/v1/completions")
_SHOWN = 80  # characters of a wrong value


class BadLabel(ValueError):
    """A label that cannot be used; the message names it and the remedy."""


class DomainLabels:
    """Reads the bodies of requests that carry JSON to chat completions and completions; all else passes untouched.

    Bodies are held whole, as vLLM holds them. One that says nothing of `metadata` is handed on byte for byte, and so is
    one that is no JSON object, which vLLM refuses in its own words. A label that is not a string of at most `MAX_LABEL`
    characters is answered with status 400. The answer's way back is never touched.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if not _concerned(scope):
            await self._app(scope, receive, send)
            return
        body, left = await _read(receive)
        if left is not None:
            await self._app(scope, _Replay(body, left, receive), send)
            return
        try:
            body = relabelled(body)
        except BadLabel as error:
            await _refuse(send, str(error))
            return
        await self._app(_sized(scope, len(body)), _Replay(body, None, receive), send)


def install(app: "Starlette") -> None:
    """Add it to an application that does not serve yet, innermost: a body is read once the API key was checked."""
    from starlette.middleware import Middleware

    app.user_middleware.append(Middleware(DomainLabels))


def relabelled(body: bytes) -> bytes:
    """The request's body with the label where vLLM looks for it. Raises BadLabel."""
    if b'"metadata"' not in body:
        return body
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return body
    metadata = request.get("metadata") if isinstance(request, dict) else None
    if not isinstance(metadata, dict) or metadata.get("domain") is None:
        return body
    label, arguments = metadata["domain"], request.get("vllm_xargs")
    if not isinstance(label, str) or len(label) > MAX_LABEL:
        raise BadLabel(
            f"metadata.domain {json.dumps(label)[:_SHOWN]}: must be a string of at most {MAX_LABEL} characters, for "
            'example "sql"; shorten it or leave it out'
        )
    if arguments is not None and not isinstance(arguments, dict):
        return body
    return json.dumps(request | {"vllm_xargs": (arguments or {}) | {"domain": label}}).encode()


def _concerned(scope: "Scope") -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path: str = scope["path"]
    kind = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip().lower()
    return path.removeprefix(scope.get("root_path", "")) in _ROUTES and kind == b"application/json"


async def _read(receive: "Receive") -> "tuple[bytes, Message | None]":
    """The whole body, and None; what came of it and the message that ended it if the client left before."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(chunks), message
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks), None


class _Replay:
    """Gives a body that was read already once more, then whatever else comes."""

    def __init__(self, body: bytes, left: "Message | None", receive: "Receive") -> None:
        self._first: list[Message] = [{"type": "http.request", "body": body, "more_body": left is not None}]
        if left is not None:
            self._first.append(left)
        self._receive = receive

    async def __call__(self) -> "Message":
        return self._first.pop(0) if self._first else await self._receive()


def _sized(scope: "Scope", length: int) -> "Scope":
    """The scope of the same request with a body of `length` bytes."""
    kept = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*kept, (b"content-length", str(length).encode())]}


async def _refuse(send: "Send", message: str) -> None:
    error: dict[str, Any] = {"message": message, "type": "BadRequestError", "param": "metadata.domain", "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
