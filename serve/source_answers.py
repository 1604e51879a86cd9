"""Answers that say who wrote their tokens: an ASGI middleware around vLLM's chat completions and completions.

A request with `aurora_token_sources: true` gets `"aurora": {"sources": [...], "texts": [...]}` in every chunk that has
tokens, or in the whole answer: one of `aurora.trace.SOURCES` and one piece of text for each of the choice's
`token_ids`, which the request gets along with it. Everything else of the answer stays as vLLM wrote it, byte for byte.
"""

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from serve.asgi import Replay, header, read_body, send_error, sized
from serve.request_options import SOURCES_OPTION, BadOption, concerned
from serve.token_sources import SourceBook

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_WORD = f'"{SOURCES_OPTION}"'.encode()
_EVENT_END = b"\n\n"
_DATA = b"data: "

TextOf = Callable[[int], str]  # what one more token adds to a text
NewText = Callable[[], TextOf]


class SourceAnswers:
    """Innermost of the middlewares: bodies have been checked by `serve.request_options`."""

    def __init__(self, app: "ASGIApp", book: SourceBook, new_text: NewText) -> None:
        self._app = app
        self._book = book
        self._new_text = new_text

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if not concerned(scope):
            await self._app(scope, receive, send)
            return
        body, left = await read_body(receive)
        request = _asking(body) if left is None and _WORD in body else None
        if request is None:
            await self._app(scope, Replay(body, left, receive), send)
            return
        try:
            _check(request)
        except BadOption as error:
            await send_error(send, HTTPStatus.BAD_REQUEST, str(error), error.name)
            return
        await self._answer(request, scope, receive, send)

    async def _answer(self, request: dict[str, Any], scope: "Scope", receive: "Receive", send: "Send") -> None:
        name = self._book.open()
        try:
            body = _marked(request, name)
            answer = _Answer(send, self._book, name, self._new_text())
            await self._app(sized(scope, len(body)), Replay(body, None, receive), answer)
        finally:
            self._book.close(name)


def install(app: "Starlette", book: SourceBook, client: Any) -> None:
    """Add it to an application that does not serve yet, inside of `request_options`; client: vLLM's engine client."""
    from starlette.middleware import Middleware

    book.listen(client.output_processor)
    app.user_middleware.append(Middleware(SourceAnswers, book=book, new_text=lambda: text_of(client.tokenizer)))
    app.middleware_stack = None


def text_of(tokenizer: Any) -> TextOf:
    """Texts of a sequence's tokens, told one after another; a character of several tokens comes with its last one.

    Without a tokenizer (`--skip-tokenizer-init`) all are "".
    """
    from tokenizers.decoders import DecodeStream

    fast = getattr(tokenizer, "_tokenizer", None)
    if fast is None:
        return lambda token: str(tokenizer.decode([token])) if tokenizer is not None else ""
    stream = DecodeStream(skip_special_tokens=True)

    def text(token: int) -> str:
        nonlocal stream
        try:
            return stream.step(fast, token) or ""
        except Exception as error:  # the library raises no other; vLLM mends it in the same way
            if "prefix" not in str(error).lower():
                raise
            stream = DecodeStream(skip_special_tokens=True)
            return stream.step(fast, token) or ""

    return text


def _asking(body: bytes) -> dict[str, Any] | None:
    """The request, if it is one that asks for sources; what is no request vLLM refuses in its own words."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) and request.get(SOURCES_OPTION) is True else None


def _check(request: dict[str, Any]) -> None:
    """Raise BadOption for requests with several answers: their tokens would be mixed up."""
    prompt = request.get("prompt")
    several = isinstance(prompt, list) and any(not isinstance(token, int) for token in prompt)
    if several or request.get("n") not in (None, 1) or request.get("best_of") not in (None, 1):
        raise BadOption(SOURCES_OPTION, value=True, remedy="works for one prompt and one answer; ask for n 1")
    if request.get("use_beam_search"):
        raise BadOption(SOURCES_OPTION, value=True, remedy="does not work with use_beam_search; leave one of them out")


def _marked(request: dict[str, Any], name: str) -> bytes:
    """The request as vLLM gets it: it hands `vllm_xargs` to the scheduler."""
    kept = {key: value for key, value in request.items() if key != SOURCES_OPTION}
    arguments = {**(request.get("vllm_xargs") or {}), SOURCES_OPTION: name}
    return json.dumps(kept | {"vllm_xargs": arguments, "return_token_ids": True}).encode()


class _Answer:
    """Sends an answer on with its sources."""

    def __init__(self, send: "Send", book: SourceBook, name: str, text: TextOf) -> None:
        self._send = send
        self._book = book
        self._name = name
        self._text = text
        self._head: Message | None = None
        self._body = b""  # that has come and was not sent yet

    async def __call__(self, message: "Message") -> None:
        if message["type"] == "http.response.start":
            self._head = message
            if self._streams:
                await self._send(message)
        elif message["type"] == "http.response.body" and self._head is not None:
            self._body += message.get("body", b"")
            await (self._pass_events if self._streams else self._pass_whole)(message.get("more_body", False))
        else:
            await self._send(message)

    @property
    def _streams(self) -> bool:
        assert self._head is not None
        kind = header({"headers": self._head["headers"]}, b"content-type")
        return kind.startswith(b"text/event-stream")

    async def _pass_events(self, more: bool) -> None:
        *events, self._body = self._body.split(_EVENT_END)
        done = b"".join(self._event(event) + _EVENT_END for event in events)
        if not more:
            done, self._body = done + self._body, b""
        if done or not more:
            await self._send({"type": "http.response.body", "body": done, "more_body": more})

    async def _pass_whole(self, more: bool) -> None:
        if more:
            return
        assert self._head is not None
        body = self._told(self._body)
        await self._send({**self._head, "headers": sized({"headers": self._head["headers"]}, len(body))["headers"]})
        await self._send({"type": "http.response.body", "body": body})

    def _event(self, event: bytes) -> bytes:
        return _DATA + self._told(event.removeprefix(_DATA)) if event.startswith(_DATA) else event

    def _told(self, answer: bytes) -> bytes:
        """A JSON answer or chunk, with the sources of its tokens as its last member."""
        tokens = _tokens_of(answer)
        if not tokens:
            return answer
        said = {"sources": self._book.take(self._name, len(tokens)), "texts": [self._text(t) for t in tokens]}
        head, _, tail = answer.rpartition(b"}")
        return head + b',"aurora":' + json.dumps(said, ensure_ascii=False).encode() + b"}" + tail


def _tokens_of(answer: bytes) -> list[int]:
    """The tokens of the only choice; none in errors, in "[DONE]" and in chunks that have none."""
    try:
        choices = json.loads(answer).get("choices")
    except (ValueError, AttributeError):
        return []
    return (choices[0].get("token_ids") or []) if choices else []
