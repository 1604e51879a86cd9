"""Who may ask: through the application that vLLM builds, and for addresses to listen on."""

import logging
from argparse import Namespace
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from aurora.config import AuroraConfig, ServerConfig, UserError
from serve.access import OPEN_PATHS, AccessMiddleware, is_loopback, open_paths, read_api_keys, refuse_exposure
from serve.admission import Admission
from serve.engine import parse_vllm_args
from serve.history import History
from serve.http import guard
from serve.listen import tls_of

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """vLLM's own application with every route that text models have, guarded as it is served."""
    from vllm.entrypoints.launchers.app import build_app

    level = logging.root.level
    app = build_app(parse_vllm_args("model", ()), ("generate",), None)
    logging.root.setLevel(level)  # which vLLM raises
    history = History(CollectorRegistry())
    guard(app, AuroraConfig(server=ServerConfig(host="0.0.0.0")), KEYS, Admission(4), history)
    return app


@pytest.fixture(scope="module")
def client(app: FastAPI) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


def _routes(app: FastAPI) -> list[tuple[str, str]]:
    """Every path, with a method that its route takes."""
    return [(r.path, sorted(getattr(r, "methods", None) or {"GET"})[0]) for r in app.routes]


def test_every_route_wants_a_key(app: FastAPI, client: TestClient) -> None:
    routes = _routes(app)
    assert len(routes) > 20
    assert {path for path, _ in routes} >= {
        "/v1/chat/completions",
        "/tokenize",
        "/metrics",
        "/openapi.json",
        "/ready",
        "/aurora",
        "/aurora/data",
    }
    for path, method in routes:
        if path in OPEN_PATHS:
            continue
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}, {"x-api-key": ""}):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, f"{method} {path} is open; guard it or list it in OPEN_PATHS"
            assert answer.json()["error"]["code"] == 401
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/nothing", "//health", "/health/../v1/models", "/HEALTH", "/health%2f..", "/v1/models/"]
)
def test_paths_that_nobody_listed_are_closed(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 401


def test_developer_routes_are_absent(client: TestClient) -> None:
    for path in ("/collective_rpc", "/update_weights", "/pause", "/resume", "/sleep", "/wake_up", "/server_info"):
        for method in ("GET", "POST"):
            assert client.request(method, path, headers={"authorization": f"Bearer {KEYS[0]}"}).status_code == 404


def test_what_the_framework_refuses_is_said_as_openai_says_it(client: TestClient) -> None:
    key = {"authorization": f"Bearer {KEYS[0]}", "content-type": "application/json"}
    deep = b"[" * 50_000 + b"]" * 50_000
    for method, path, body, status in (
        ("GET", "/nothing", b"", 404),
        ("GET", "/v1/completions", b"", 405),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", deep, 400),
    ):
        answer = client.request(method, path, content=body, headers=key)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status, path
        assert answer.json()["error"]["message"]
    assert client.get("/v1/completions", headers=key).headers["allow"] == "POST"


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_opens(client: TestClient, key: str) -> None:
    for headers in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer {key}"}, {"x-api-key": key}):
        assert client.get("/version", headers=headers).status_code == 200
        assert client.get("/ready").status_code == 200


def test_only_a_browser_that_asks_for_leave_needs_no_key(client: TestClient) -> None:
    for path in ("/metrics", "/v1/models"):
        assert client.options(path).status_code == 401
        asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
        answer = client.options(path, headers=asks)
        assert answer.text == "Disallowed CORS origin", "no route saw it; --allowed-origins names who may"


def test_a_websocket_without_a_key_is_not_accepted() -> None:
    app = FastAPI()

    @app.websocket("/ws")
    async def talk(websocket: WebSocket) -> None:  # pragma: no cover
        await websocket.accept()

    app.add_middleware(AccessMiddleware, keys=KEYS)
    with pytest.raises(WebSocketDisconnect) as closed, TestClient(app).websocket_connect("/ws"):
        pass
    assert closed.value.code == 1008


def test_metrics_are_open_where_only_this_machine_hears_them() -> None:
    assert "/metrics" in open_paths(ServerConfig())
    assert "/metrics" not in open_paths(ServerConfig(host="192.0.2.1"))
    assert "/aurora/data" in open_paths(ServerConfig())
    assert "/aurora/data" not in open_paths(ServerConfig(host="192.0.2.1"))


def test_a_server_in_reach_of_others_wants_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", "gpu-3.example"):
        with pytest.raises(UserError, match=f"--host {host}: reachable from other machines"):
            refuse_exposure(ServerConfig(host=host), [])
        refuse_exposure(ServerConfig(host=host), ["key"])
        refuse_exposure(ServerConfig(host=host, insecure=True), [])
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert is_loopback(host)
        refuse_exposure(ServerConfig(host=host), [])


def test_keys_come_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_api_keys(file, {"AURORA_API_KEY": "three", "VLLM_API_KEY": ""}) == ["three", "one", "two"]
    assert read_api_keys(None, {"VLLM_API_KEY": "four"}) == ["four"]
    assert read_api_keys(None, {}) == []
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no key; put one key on each line"):
        read_api_keys(file, {})
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no text; give a readable file"):
        read_api_keys(file, {})
    with pytest.raises(UserError, match="No such file or directory; give a readable file"):
        read_api_keys(tmp_path / "none", {})


def test_half_a_pair_of_tls_files_is_refused() -> None:
    none = dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers"))
    assert tls_of(Namespace(**none, ssl_cert_reqs=0)) == {}
    with pytest.raises(UserError, match="--ssl-keyfile and --ssl-certfile belong together"):
        tls_of(Namespace(**none | {"ssl_keyfile": "key.pem"}, ssl_cert_reqs=0))
