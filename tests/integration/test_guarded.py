"""A server in reach of other machines: who gets in, what is open, what it takes on."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest

from serve.access import OPEN_PATHS
from tests.integration.guarded import KEY, Guarded, start_guarded
from tests.waiting import wait_until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    limits = ("--set=limits.waiting=2", "--set=limits.n=8", "--set=limits.body_kib=64")
    directory = tmp_path_factory.mktemp("guarded")
    server = start_guarded(tiny_model, directory, *limits, "--host=0.0.0.0", keys=f"another\n{KEY}\n")
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    yield server
    assert server.stop() == 0


def test_no_route_without_the_key(guarded: Guarded) -> None:
    paths = list(httpx.get(f"{guarded.url}/openapi.json", headers={"x-api-key": KEY}).json()["paths"])
    assert len(paths) > 10
    assert "/aurora" in OPEN_PATHS
    for path in [*paths, "/metrics", "/docs", "/openapi.json", "/aurora/data", *OPEN_PATHS]:
        expected = 200 if path in OPEN_PATHS else 401
        assert httpx.get(guarded.url + path).status_code == expected, path
    assert guarded.client().completions.create(model=guarded.model(), prompt="a", max_tokens=3).usage


def test_other_machines_hear_the_api_and_nothing_else(guarded: Guarded) -> None:
    listening = {c.laddr for p in guarded.processes() for c in p.net_connections("inet") if c.status == "LISTEN"}
    assert len(listening) > 5, "Ray's processes and the engine"
    heard = {a.port for a in listening if not ip_address(a.ip.removeprefix("::ffff:")).is_loopback}
    assert heard == {int(guarded.url.rsplit(":", 1)[1])}


def test_keys_and_text_are_in_no_log_and_no_process_list(guarded: Guarded) -> None:
    text = "a text that is nobody's business"
    answer = guarded.post({"model": guarded.model(), "prompt": text, "max_tokens": 3, "metadata": {"domain": 7}})
    assert answer.status_code == 400
    answer = guarded.post({"model": guarded.model(), "prompt": text, "max_tokens": 40, "ignore_eos": True})
    assert answer.status_code == 200
    secrets = [KEY.encode(), text.encode()]
    command_lines = " ".join(" ".join(process.cmdline()) for process in guarded.processes())
    assert "raylet" in command_lines
    assert KEY not in command_lines

    def reported() -> bool:
        return any(guarded.run_dir.rglob("run-*.wandb"))

    wait_until(reported, 60, "the W&B run was opened")
    page = httpx.get(f"{guarded.url}/metrics", headers={"x-api-key": KEY}).content
    assert b"aurora_steps_total" in page
    logs = guarded.ray_logs()
    assert len(logs) > 3
    for content in [page, *(f.read_bytes() for f in [*logs, *guarded.run_dir.rglob("*")] if f.is_file())]:
        assert not any(secret in content for secret in secrets)


def test_what_is_too_much_is_refused_and_serving_goes_on(guarded: Guarded) -> None:
    name = guarded.model()
    ask = {"model": name, "prompt": "a", "max_tokens": 3}
    assert guarded.post({**ask, "prompt": "a" * (65 << 10)}).status_code == 413
    for wrong in ({"n": 100_000}, {"max_tokens": 10**9}, {"prompt": [[1] * 5000]}, {"temperature": "hot"}):
        answer = guarded.post({**ask, **wrong})
        assert answer.status_code in (400, 422), (wrong, answer.text)
        assert answer.json()["error"]["message"]
    chat = {"model": name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    hostile = "{% for i in range(10**9) %}{{ i }}{% endfor %}"
    assert guarded.post({**chat, "chat_template": hostile}, "/v1/chat/completions").status_code == 400
    for headers in ({"x": "y" * (65 << 10)}, {f"h{i}": "y" * 1000 for i in range(70)}):
        with socket.create_connection(("127.0.0.1", int(guarded.url.rsplit(":", 1)[1])), timeout=30) as raw:
            lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
            raw.sendall(f"GET /health HTTP/1.1\r\nHost: h\r\n{lines}\r\n".encode())
            assert raw.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert guarded.post(ask).status_code == 200


def test_overload_is_answered_with_a_time_to_come_back(guarded: Guarded) -> None:
    ask = {"model": guarded.model(), "prompt": "a", "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: guarded.post(ask), range(24)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503}
    assert codes.count(200) >= 6, "four run, two wait"
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
    assert guarded.post(ask).status_code == 200
