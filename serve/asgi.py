"""What Aurora's ASGI middlewares share: bodies that are read once and handed on, and errors in OpenAI's form."""

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send


class BodyTooLarge(Exception):
    """A body has more bytes than are read."""


async def read_body(receive: "Receive", limit: int | None = None) -> "tuple[bytes, Message | None]":
    """The whole body, and None; what came of it and the message that ended it if the client left before.

    Raises BodyTooLarge as soon as more than `limit` bytes came; None: any number.
    """
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(chunks), message
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if limit is not None and size > limit:
            raise BodyTooLarge
        if not message.get("more_body", False):
            return b"".join(chunks), None


class Replay:
    """Gives a body that was read already once more, then whatever else comes."""

    def __init__(self, body: bytes, left: "Message | None", receive: "Receive") -> None:
        self._first: list[Message] = [{"type": "http.request", "body": body, "more_body": left is not None}]
        if left is not None:
            self._first.append(left)
        self._receive = receive

    async def __call__(self) -> "Message":
        return self._first.pop(0) if self._first else await self._receive()


def header(scope: "Scope", name: bytes) -> bytes:
    """The value of a header, given in lower case; empty without one. Of several the last."""
    return bytes(dict(scope["headers"]).get(name, b""))


def path_of(scope: "Scope") -> str:
    """The path that routes see."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def sized(scope: "Scope", length: int) -> "Scope":
    """The scope of the same request with a body of `length` bytes."""
    kept = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*kept, (b"content-length", str(length).encode())]}


def error_body(status: HTTPStatus, message: str, param: str | None = None) -> bytes:
    """An error as OpenAI's clients read it; its type is the name of the status, as in vLLM."""
    kind = "".join(word.capitalize() for word in status.name.split("_")).removesuffix("Error") + "Error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": int(status)}
    return json.dumps({"error": error}).encode()


async def send_error(
    send: "Send",
    status: HTTPStatus,
    message: str,
    param: str | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Answer a request with an error. Whatever of its body was not read is not wanted: the connection is closed."""
    body = error_body(status, message, param)
    mine = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": int(status), "headers": mine})
    await send({"type": "http.response.body", "body": body})
