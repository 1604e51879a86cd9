"""What requests ask of speculation, through a real server and real HTTP bodies."""

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st

from serve.domains import MAX_LABEL
from serve.request_options import RequestOptions, install, with_options
from tests.local_http import serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class App:
    """An OpenAI-like application that says what it was sent."""

    def __init__(self) -> None:
        self.app = FastAPI()
        for path in (CHAT, TEXT, "/v1/embeddings", "/v1/stream"):
            self.app.post(path)(self._echo)
        self.app.middleware_stack = self.app.build_middleware_stack()  # vLLM hands its application over like this
        install(self.app)
        self.bodies: list[bytes] = []
        self.url = ""

    async def _echo(self, request: Request):
        body = await request.body()
        self.bodies.append(body)
        assert int(request.headers.get("content-length", len(body))) == len(body)
        if b'"stream":' in body.replace(b" ", b""):
            return StreamingResponse(self._stream(request), media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}

    async def _stream(self, request: Request):
        for i in range(3):
            yield f"data: {i}\n\n"
        assert not await request.is_disconnected()

    @property
    def sent(self) -> dict:
        return json.loads(self.bodies[-1])


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    app = App()
    with serving(app.app) as app.url:
        yield app


def _post(app: App, body: object, path: str = CHAT, **options) -> httpx.Response:
    return httpx.post(app.url + path, json=body, **options)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_label_goes_where_vllm_looks_for_it(app: App, path: str):
    body = {"prompt": "ü\ud800", "metadata": {"domain": "sql", "user": "a"}, "vllm_xargs": {"other": 1}}
    raw = json.dumps(body).encode()
    assert httpx.post(app.url + path, content=raw, headers={"content-type": "application/json"}).status_code == 200
    assert app.sent == body | {"vllm_xargs": {"other": 1, "domain": "sql"}}


def test_the_openai_client_sends_it(app: App):
    client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none")
    said = [{"role": "user", "content": "hello"}]
    client.chat.completions.create(model="m", messages=said, metadata={"domain": "sql"})
    assert app.sent["vllm_xargs"] == {"domain": "sql"}
    client.chat.completions.create(model="m", messages=said, extra_body={"metadata": {"domain": "code"}})
    assert app.sent["vllm_xargs"] == {"domain": "code"}
    client.chat.completions.create(model="m", messages=said, extra_body={"vllm_xargs": {"domain": "law"}})
    assert app.sent["vllm_xargs"] == {"domain": "law"}


def test_chunked_bodies_are_read_to_their_end(app: App):
    raw = json.dumps({"text": "x" * 300_000, "metadata": {"domain": "sql"}}).encode()
    chunks = (raw[i : i + 1000] for i in range(0, len(raw), 1000))
    answer = httpx.post(app.url + CHAT, content=chunks, headers={"content-type": "application/json; charset=utf-8"})
    assert answer.request.headers["transfer-encoding"] == "chunked"
    assert answer.status_code == 200
    assert (app.sent["vllm_xargs"], len(app.sent["text"])) == ({"domain": "sql"}, 300_000)


def test_answers_stream(app: App):
    with httpx.stream("POST", app.url + CHAT, json={"stream": True, "metadata": {"domain": "sql"}}) as answer:
        assert list(answer.iter_lines()) == ["data: 0", "", "data: 1", "", "data: 2", ""]
    assert app.sent["vllm_xargs"] == {"domain": "sql"}


@pytest.mark.parametrize("label", [7, True, ["sql"], {"a": "b"}, "x" * (MAX_LABEL + 1)])
def test_a_label_that_is_no_short_string_is_refused_in_openais_form(app: App, label: object):
    before = len(app.bodies)
    answer = _post(app, {"metadata": {"domain": label}})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "metadata.domain", 400)
    assert error["message"].startswith(f"metadata.domain {json.dumps(label)[:20]}")
    assert "must be a string of at most 64 characters" in error["message"]
    assert len(app.bodies) == before
    client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="shorten it or leave it out"):
        client.chat.completions.create(model="m", messages=[], extra_body={"metadata": {"domain": label}})


def test_numbers_of_the_extra_body_go_there_too(app: App):
    client = openai.OpenAI(base_url=f"{app.url}/v1", api_key="none")
    said = [{"role": "user", "content": "hello"}]
    asked = {"max_speculation": 0, "token_deadline_ms": 37.5}
    client.chat.completions.create(model="m", messages=said, extra_body=asked, metadata={"domain": "sql"})
    assert app.sent["vllm_xargs"] == asked | {"domain": "sql"}
    assert not app.sent.keys() & asked.keys()
    assert RequestOptions.of(app.sent["vllm_xargs"]) == RequestOptions("sql", 0, 37.5)
    client.chat.completions.create(model="m", messages=said, extra_body={"vllm_xargs": asked | {"other": "x"}})
    assert RequestOptions.of(app.sent["vllm_xargs"]) == RequestOptions("", 0, 37.5)
    assert RequestOptions.of(None) == RequestOptions()


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        *(("max_speculation", value, "must be a whole number of drafts") for value in (-1, 1.5, "2", True, [3])),
        *(("token_deadline_ms", value, "must be a number of milliseconds above 0") for value in (0, -3, "9", True)),
        ("token_deadline_ms", float("inf"), "must be a number of milliseconds above 0"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_numbers_that_make_no_sense_are_refused(app: App, name: str, value: object, remedy: str, inside: bool):
    asked = {name: value}
    body = json.dumps({"vllm_xargs": asked} if inside else asked).encode()
    answer = httpx.post(app.url + CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == (f"vllm_xargs.{name}" if inside else name)
    assert error["message"].startswith(f"{error['param']} {json.dumps(value)}: {remedy}")


def test_the_longest_label_passes(app: App):
    assert _post(app, {"metadata": {"domain": "x" * MAX_LABEL}}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"metadata": {"domain": "sql"}',
        b'["metadata"]',
        b'{"metadata": null}',
        b'{"metadata": "domain"}',
        b'{"metadata": {"domain": null}}',
        b'{"metadata": {"user": 1}}',
        b'{"vllm_xargs": 3, "metadata": {"domain": "sql"}}',
        b'{ "messages" : [] }',
        b'{"max_speculation": null, "token_deadline_ms":null}',
        b'{"vllm_xargs": {"max_speculation": 3 }}',
        b"[" * 100_000 + b'"metadata"',
        b"",
    ],
)
def test_bodies_with_nothing_to_move_pass_byte_for_byte(app: App, body: bytes):
    httpx.post(app.url + CHAT, content=body, headers={"content-type": "application/json"})
    assert app.bodies[-1] == body


@pytest.mark.parametrize(("path", "kind"), [("/v1/embeddings", "application/json"), (CHAT, "text/plain")])
def test_other_routes_and_kinds_pass_byte_for_byte(app: App, path: str, kind: str):
    body = b'{"metadata": {"domain": 7}}'
    assert httpx.post(app.url + path, content=body, headers={"content-type": kind}).status_code == 200
    assert app.bodies[-1] == body


def test_a_client_that_leaves_in_the_middle_of_its_body_is_seen_to_leave(app: App):
    host, port = app.url.removeprefix("http://").split(":")
    before = len(app.bodies)
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b'{"metadata"')
    assert _post(app, {"prompt": "next"}).status_code == 200
    assert [json.loads(body) for body in app.bodies[before:]] == [{"prompt": "next"}]


def test_without_the_api_key_no_body_is_read():
    from starlette.testclient import TestClient
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    app = App()
    app.app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    client = TestClient(app.app)
    wrong = {"metadata": {"domain": 7}}
    assert client.post(CHAT, json=wrong).status_code == 401
    assert client.post(CHAT, json=wrong, headers={"authorization": "Bearer secret"}).status_code == 400


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), _JSON), st.text(max_size=MAX_LABEL))
def test_nothing_but_the_options_changes(request_: dict, label: str):
    moved = ("vllm_xargs", "max_speculation", "token_deadline_ms")
    request = {k: v for k, v in request_.items() if k not in moved} | {"metadata": {"domain": label}}
    assert json.loads(with_options(json.dumps(request).encode())) == request | {"vllm_xargs": {"domain": label}}
