import asyncio
import json
import signal
import subprocess
import sys
import time

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest

from aurora.arrivals import read_arrivals
from aurora.config import UserError
from aurora.metrics import EngineReport
from aurora.traffic import TrafficOptions, arrivals, run
from aurora.traffic_result import Record, boundaries, summarise
from serve.exporter import PrometheusExporter
from tests.local_http import serving
from tests.waiting import wait_until


class Endpoint:
    """An OpenAI-style server whose answers and counters follow a script.

    Request n (from 0) is drafted by version 1 + n // 10; each of its 4 verification steps accepts n // 10 drafts.
    """

    def __init__(self):
        self.bodies, self.keys, self.times = [], [], []
        self.broken = {}  # prompt -> how it breaks
        self.key = None
        self.metrics = True
        self.delay_s = 0.0
        self.open = self.most_open = 0
        self.registry = CollectorRegistry()
        self.exporter = PrometheusExporter(self.registry)
        self.app = FastAPI()
        self.app.get("/v1/models")(self._models)
        self.app.get("/metrics")(self._metrics)
        self.app.post("/v1/chat/completions")(self._chat)

    async def _models(self, request: Request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "no"}, 401)
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in ("tiny", "other")]}

    async def _metrics(self, request: Request):
        self.keys.append(request.headers.get("authorization"))
        if not self.metrics:
            return PlainTextResponse("nothing here", 404)
        return PlainTextResponse(generate_latest(self.registry))

    async def _chat(self, request: Request):
        body = await request.json()
        self.times.append(time.monotonic())
        self.bodies.append(body)
        prompt = body["messages"][-1]["content"]
        if self.broken.get(prompt) == "status":
            return JSONResponse({"error": {"message": "too much", "type": "overloaded"}}, 503)
        return StreamingResponse(self._answer(prompt, len(self.bodies) - 1), media_type="text/event-stream")

    async def _answer(self, prompt, number):
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            yield chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            await asyncio.sleep(self.delay_s)
            if self.broken.get(prompt) == "slow":
                await asyncio.sleep(120)
            if self.broken.get(prompt) == "error":
                yield chunk(error={"message": "engine\ndied", "code": 500})
                return
            for text in ("re: ", prompt):
                yield chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])
            if self.broken.get(prompt) == "cut":
                return
            self._count(number // 10)
            yield chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
            yield chunk(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8})
            yield "data: [DONE]\n\n"
        finally:
            self.open -= 1

    def _count(self, accepted):
        self.exporter.update(
            EngineReport(
                request_steps=4,
                emitted_tokens=4 * (1 + accepted),
                draft_steps={1 + accepted: 4},
                accepted_tokens={1 + accepted: 4 * accepted},
                drafter_version=1 + accepted,
            )
        )


def chunk(**fields):
    body = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "tiny", **fields}
    return f"data: {json.dumps(body if 'error' not in fields else fields)}\n\n"


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    with serving(endpoint.app) as endpoint.url:
        yield endpoint


@pytest.fixture
def send(endpoint, tmp_path, capsys, monkeypatch):
    """Send prompts (or rows) to the endpoint; returns exit code, JSON result and what was printed."""
    monkeypatch.delenv("AURORA_API_KEY", raising=False)

    def send(rows, **options):
        file = dataset(tmp_path, rows)
        result = tmp_path / "result.json"
        code = run(TrafficOptions(dataset=file, **{"url": endpoint.url, "json_file": result, **options}))
        return code, json.loads(result.read_text()), capsys.readouterr()

    return send


def dataset(tmp_path, rows):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row if isinstance(row, dict) else {"prompt": row}) for row in rows))
    return str(file)


def prompts(count):
    return [f"p{i}" for i in range(count)]


def test_a_run_is_an_arrival_trace_without_what_failed(endpoint, send, tmp_path):
    endpoint.broken = {"p1": "cut"}
    endpoint.delay_s = 0.05
    assert send(prompts(4), concurrency=1, trace=tmp_path / "trace.jsonl")[0] == 1
    trace = read_arrivals(tmp_path / "trace.jsonl")
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([3] * 3, [5] * 3)
    assert trace.seconds[1] > 2 * endpoint.delay_s, "the one that failed came between the first two"


def test_a_run_without_failures(endpoint, send):
    code, result, printed = send(prompts(100), concurrency=1, max_tokens=7, temperature=0.5, top_p=0.9)
    assert code == 0
    assert (result["requests"], result["failures"], result["completion_tokens"]) == (100, 0, 500)
    assert result["tokens_per_s"] == pytest.approx(500 / result["duration_s"])
    assert 0 < result["ttft_p50_s"] <= result["latency_p50_s"] <= result["latency_p99_s"]
    assert result["acceptance_length_tenths"] == pytest.approx([1 + tenth for tenth in range(10)])
    assert result["acceptance_length_first_tenth"] == pytest.approx(1)
    assert result["acceptance_length_last_tenth"] == pytest.approx(10)
    assert result["acceptance_length"] == pytest.approx(5.5)
    assert result["tokens_per_step_last_tenth"] == pytest.approx(10)
    assert result["drafter_versions"] == list(range(1, 11))
    assert [b["messages"][0]["content"] for b in endpoint.bodies] == prompts(100)
    first = endpoint.bodies[0]
    assert (first["model"], first["max_tokens"], first["temperature"], first["top_p"]) == ("tiny", 7, 0.5, 0.9)
    assert first["stream_options"] == {"include_usage": True}
    assert "100/100" in printed.err
    for row in ("requests", "failures", "tokens/s", "first token", "first tenth", "last tenth", "versions seen"):
        assert row in printed.out


def test_domains_are_sent_where_asked_for(endpoint, send):
    rows = [{"prompt": "p0", "domain": "sql"}, {"prompt": "p1"}]
    for asked, expected in ((True, [{"domain": "sql"}, None]), (False, [None, None])):
        endpoint.bodies.clear()
        send(rows, concurrency=1, send_domain=asked)
        assert [body.get("metadata") for body in endpoint.bodies] == expected


def test_concurrency_is_reached_and_not_exceeded(endpoint, send):
    endpoint.delay_s = 0.05
    _, result, _ = send(prompts(12), concurrency=4)
    assert result["requests"] == 12
    assert endpoint.most_open == 4


def test_rate_mode_sends_whatever_is_open(endpoint, send):
    endpoint.delay_s = 1.0
    _, result, _ = send(prompts(20), concurrency=1, rate=10, seed=3)
    assert result["requests"] == 20
    assert endpoint.most_open > 4


def test_arrivals_are_a_seeded_poisson_process():
    times = [t for t, _ in zip(arrivals(20, 0), range(5000), strict=False)]
    assert times[-1] == pytest.approx(5000 / 20, rel=0.05)
    assert times == sorted(times)
    assert times[:5] == [t for t, _ in zip(arrivals(20, 0), range(5), strict=False)]
    assert times[0] != next(arrivals(20, 1))


def test_each_turn_carries_the_conversation_so_far(endpoint, send):
    code, result, _ = send([{"turns": ["one", "two"]}, {"prompt": "three"}], concurrency=1)
    assert (code, result["requests"]) == (0, 3)
    said = [[(m["role"], m["content"]) for m in body["messages"]] for body in endpoint.bodies]
    first = [("user", "one"), ("assistant", "re: one"), ("user", "two")]
    assert said == [first[:1], first, [("user", "three")]]


def test_failures_are_counted_and_shown_and_the_rest_goes_on(endpoint, send):
    endpoint.broken = {"p1": "status", "p3": "error", "p5": "cut", "p7": "slow", "one": "status"}
    rows = [*prompts(9), {"turns": ["one", "never sent"]}]
    code, result, printed = send(rows, concurrency=2, timeout=3)
    assert code == 1
    assert (result["requests"], result["failures"], result["completion_tokens"]) == (10, 5, 25)
    assert "too much" in printed.out
    assert "engine died" in printed.out
    assert "ended before the answer was complete" in printed.out
    assert "no complete answer within --timeout 3 s" in printed.out
    assert sum(result["errors"].values()) == 5
    assert all(m["content"] != "never sent" for body in endpoint.bodies for m in body["messages"])


def test_the_api_key_reaches_every_route_and_no_print(endpoint, send, monkeypatch, tmp_path):
    endpoint.key = "s3cret"
    with pytest.raises(UserError, match=r"refuses the API key \(HTTP 401\); set AURORA_API_KEY"):
        send(["a"])
    monkeypatch.setenv("AURORA_API_KEY", "s3cret")
    code, _, printed = send(["a"])
    assert code == 0
    assert set(endpoint.keys) == {"Bearer s3cret"}
    assert "s3cret" not in printed.out + printed.err
    monkeypatch.delenv("AURORA_API_KEY")
    (tmp_path / "key").write_text("s3cret\n")
    assert send(["a"], api_key_file=tmp_path / "key")[0] == 0
    with pytest.raises(UserError, match=r"--api-key-file .*: No such file or directory; put a key on line 1"):
        send(["a"], api_key_file=tmp_path / "none")


def test_a_server_without_metrics_leaves_acceptance_unknown(endpoint, send):
    endpoint.metrics = False
    code, result, printed = send(prompts(3))
    assert code == 0
    assert result["acceptance_length_first_tenth"] is None
    assert result["acceptance_length_last_tenth"] is None
    assert result["drafter_versions"] == []
    assert f"acceptance unknown: GET {endpoint.url}/metrics: Error code: 404" in printed.err


def test_the_model_and_both_spellings_of_the_url(endpoint, send):
    assert send(["a"], model="other", url=f"{endpoint.url}/v1/")[0] == 0
    assert endpoint.bodies[0]["model"] == "other"
    with pytest.raises(UserError, match=r"--model nope: not served at .*; choose one of tiny, other"):
        send(["a"], model="nope")


def test_an_unreachable_server_is_one_line_and_writes_nothing(send, tmp_path):
    with pytest.raises(UserError, match=r"no server answers at http://127\.0\.0\.1:9 \(.*\); start one with") as caught:
        send(["a"], url="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_bad_data_set_is_named_before_anything_is_sent(endpoint, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: not JSON"):
        run(TrafficOptions(dataset=str(file), url=endpoint.url))
    with pytest.raises(UserError, match="no such file"):
        run(TrafficOptions(dataset=str(tmp_path / "none.jsonl"), url=endpoint.url))
    assert endpoint.bodies == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"concurrency": 0}, "--concurrency 0: must be above 0"),
        ({"rate": -1.0}, "--rate -1.0: must be above 0"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"rate": float("nan")}, "--rate nan"),
        ({"temperature": -0.1}, "--temperature -0.1: must be between 0 and 2"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"url": "localhost:8000"}, "--url localhost:8000: must begin with http"),
    ],
)
def test_options_that_cannot_be_used(option, message):
    with pytest.raises(UserError) as caught:
        TrafficOptions(dataset="x", **option)
    assert str(caught.value).startswith(message)


def test_a_json_file_that_cannot_be_written_is_refused_first(tmp_path):
    with pytest.raises(UserError, match="no such directory; create it first"):
        TrafficOptions(dataset="x", json_file=tmp_path / "none" / "result.json")


def test_interrupt_prints_and_writes_what_was_done(endpoint, tmp_path):
    endpoint.broken = {"p5": "slow"}
    call = "import sys; from pathlib import Path; from aurora.traffic import TrafficOptions, run; " + (
        "sys.exit(run(TrafficOptions(sys.argv[1], url=sys.argv[2], concurrency=1, json_file=Path(sys.argv[3]))))"
    )
    result = tmp_path / "result.json"
    arguments = [sys.executable, "-c", call, dataset(tmp_path, prompts(10)), endpoint.url, str(result)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(endpoint.bodies) >= 6, 60, "fewer than six requests arrived")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: the table covers what was done" in out
    written = json.loads(result.read_text())
    assert (written["requests"], written["failures"], written["interrupted"]) == (5, 0, True)
    assert written["acceptance_length_last_tenth"] is None


@pytest.mark.parametrize(
    ("conversations", "expected"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (10, list(range(1, 11))),
        (15, [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]),
        (300, list(range(30, 301, 30))),
    ],
)
def test_boundaries_of_tenths(conversations, expected):
    assert boundaries(conversations) == expected


def test_a_run_of_nothing_but_failures():
    result = summarise([Record(0.1, error="no")], [None, None], duration_s=0.1)
    assert (result.requests, result.failures, result.tokens_per_s, result.ttft_p50_s) == (1, 1, 0.0, None)
    assert result.acceptance_length_last_tenth is None
