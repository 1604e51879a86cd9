"""Servers that lose their clients, their engine or are told to stop under traffic."""

import json
import signal
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import trustme

from tests.integration.conftest import SMALL
from tests.integration.guarded import KEY, Guarded, start_guarded
from tests.integration.process import START_LIMIT_S
from tests.waiting import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    settings = ("--set=server.hang_s=8", "--set=limits.waiting=60")
    server = start_guarded(tiny_model, tmp_path_factory.mktemp("guarded"), *settings)
    yield server
    assert server.stop() == 0


def test_clients_that_vanish_leave_nothing_behind(guarded: Guarded) -> None:
    ask = {"model": guarded.model(), "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}

    def vanish(_: int) -> None:
        with httpx.stream(
            "POST", f"{guarded.url}/v1/completions", json=ask, headers={"x-api-key": KEY}, timeout=60
        ) as answer:
            if answer.status_code == 200:
                next(answer.iter_lines())

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(vanish, range(50)))

    def running() -> float:
        page = httpx.get(f"{guarded.url}/metrics", headers={"x-api-key": KEY}, timeout=60).text
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc{")
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(names))

    wait_until(lambda: running() == 0, 60, "no request and no KV block is held")
    assert guarded.post({**ask, "stream": False, "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize("how", ["kill", "suspend"])
def test_an_engine_that_died_or_hangs_is_started_anew(guarded: Guarded, how: str) -> None:
    ask = {"model": guarded.model(), "prompt": "a", "max_tokens": 3}
    engine = next(p for p in guarded.processes() if "EngineCore" in p.name())
    getattr(engine, how)()
    seen = []

    def is_back() -> bool:
        try:
            seen.append(httpx.get(f"{guarded.url}/health", timeout=10).status_code)
        except httpx.HTTPError:
            seen.append(0)
        return seen[-1] == 200 and 503 in seen

    wait_until(is_back, START_LIMIT_S, "others are told to come back, then another engine answers at the same address")
    assert guarded.post(ask).status_code == 200
    if how == "suspend":
        said = "".join(f.read_text(errors="replace") for f in guarded.ray_logs() if f.suffix == ".err")
        assert "the engine has not answered for 8 s (server.hang_s); the server restarts" in said


def test_a_stop_lets_open_streams_finish(tiny_model: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("localhost")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    own.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    tls = (f"--ssl-keyfile={tmp_path / 'key.pem'}", f"--ssl-certfile={tmp_path / 'certificate.pem'}")
    server = Guarded(str(tiny_model), tmp_path / "run", ("--no-speculation", *SMALL, *tls))
    try:
        server.wait_ready(START_LIMIT_S)
        assert server.url.startswith("https://127.0.0.1:")
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(tmp_path / "authority.pem")), timeout=120)
        url = server.url.replace("127.0.0.1", "localhost")
        name = trusting.get(f"{url}/v1/models").json()["data"][0]["id"]
        ask = {"model": name, "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with trusting.stream("POST", f"{url}/v1/completions", json=ask) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)

            def refused() -> bool:
                return trusting.post(f"{url}/v1/completions", json=ask | {"max_tokens": 1}).status_code == 503

            wait_until(refused, 30, "new requests are refused")
            assert trusting.get(f"{url}/ready").status_code == 503
            assert trusting.get(f"{url}/health").status_code == 200
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0
    finally:
        server.stop()
