"""Requests that nobody wrote by hand: made from the server's own OpenAPI schema, right and wrong, and hostile ones."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

from tests.integration.guarded import KEY, Guarded, start_guarded

pytestmark = pytest.mark.engine

EXAMPLES = 40  # of each route and mode
_HUNG_S = 600  # one that asks for all tokens that fit may take minutes beside other jobs
_HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    limits = ("--set=limits.body_kib=256", "--set=limits.waiting=60")
    server = start_guarded(tiny_model, tmp_path_factory.mktemp("fuzzing"), *limits)
    yield server
    assert server.stop() == 0


def judge(answer: httpx.Response | schemathesis.Response, asked: str) -> int:
    """The status of an answer that no client could complain about."""
    status = answer.status_code
    assert status < 500 or status == 501, (asked, status, answer.content[:500])
    if 400 <= status < 500:
        error = json.loads(answer.content)["error"]
        assert error["message"], asked
        assert error.get("code", status) == status, "Anthropic's errors have none"
    return status


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_made_from_the_schema_are_answered_or_refused(
    guarded: Guarded, mode: GenerationMode, record_property: Callable[[str, object], None]
) -> None:
    schema = schemathesis.openapi.from_url(f"{guarded.url}/openapi.json", headers=_HEADERS)
    statuses: Counter[int] = Counter()
    found: dict[str, str] = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Case) -> None:
            answer = case.call(base_url=guarded.url, headers=_HEADERS, timeout=_HUNG_S)
            statuses[judge(answer, f"{case.method} {case.path} {case.body!r}"[:2000])] += 1

        try:
            send()
        except Unsatisfiable:
            continue  # it takes nothing that could be wrong
        except (
            Exception
        ) as error:  # whatever one route shows, the others are tried, too; all of it fails the test below
            found[operation.label] = f"{type(error).__name__}: {error}"[:3000]
    record_property("statuses", json.dumps(statuses))
    assert not found, json.dumps(found, indent=1)
    assert sum(statuses.values()) > 200
    assert guarded.post({"model": guarded.model(), "prompt": "a", "max_tokens": 3}).status_code == 200


def bodies(model: str) -> list[bytes]:
    """What is no request, and requests that ask for too much."""
    ask = {"model": model, "prompt": "a", "max_tokens": 3}
    deep = b"[" * 60_000 + b"]" * 60_000
    wrong: list[dict[str, Any]] = [
        {"n": 100_000},
        {"best_of": 10**9},
        {"max_tokens": 10**18},
        {"max_tokens": -1},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 7},
        {"top_k": -7},
        {"logprobs": 10**6},
        {"prompt_logprobs": 10**6},
        {"stop": ["x"] * 10_000},
        {"stop": [""]},
        {"seed": 1 << 70},
        {"prompt": [[1] * 5000]},
        {"prompt": [10**9]},
        {"prompt": [-1]},
        {"prompt": [1.5]},
        {"prompt": {}},
        {"prompt": "a" * 200_000},
        {"structured_outputs": {"regex": "(((a{1,99}){1,99}){1,99}){1,99}"}},
        {"structured_outputs": {"regex": "(" * 500}},
        {"structured_outputs": {"json": {"type": "nothing"}}},
        {"logit_bias": {"7": 5}},
        {"min_p": 0.1},
        {"vllm_xargs": {"domain": "x" * 10_000}},
        {"metadata": {"domain": {"a": "b"}}},
        {"max_speculation": 1e300},
        {"stream_options": {"include_usage": "maybe"}},
        {"model": "another"},
        {"model": {}},
        {"priority": "high"},
        {"truncate_prompt_tokens": -7},
        {"kv_transfer_params": {"a": 1}},
    ]
    raw = [
        *(b"", b"{", b"nothing", b"[]", b"7", b"null", b'"text"', deep, b'{"a":' * 30_000),
        b'{"model": "' + model.encode() + b'", "prompt": "a", "temperature": NaN}',
        b'{"model": "' + model.encode() + b'", "prompt": "a", "temperature": Infinity}',
        b'{"model": "' + model.encode() + b'", "prompt": "\\ud800", "max_tokens": 3}',
        b'{"model": "' + model.encode() + b'", "prompt": "\xff\xfe", "max_tokens": 3}',
        b'{"model": "' + model.encode() + b'", "prompt": "a", "max_tokens": 1e999}',
        b'{"prompt": "a", "prompt": ["b"], "max_tokens": 3}',
        b"\x00" * 1000,
        b"a" * (300 << 10),
    ]
    return raw + [json.dumps(ask | fields).encode() for fields in wrong]


@pytest.mark.parametrize(
    "structure",
    [{"json": {"$ref": "#"}}, {"grammar": "root ::= root root"}, {"grammar": 'root ::= "ab" end\nend ::= end "c"'}],
)
def test_a_grammar_that_no_text_satisfies_ends_its_request_only(guarded: Guarded, structure: dict[str, Any]) -> None:
    ask = {"model": guarded.model(), "prompt": "a", "max_tokens": 8}
    for _ in range(5):
        refused = guarded.post({**ask, "structured_outputs": structure})
        assert refused.status_code == 400, refused.text
        assert "admits no further text" in refused.json()["error"]["message"]
        assert guarded.post(ask).status_code == 200


@pytest.mark.timeout(1800)
def test_hostile_requests_leave_memory_flat_and_others_served(
    guarded: Guarded, record_property: Callable[[str, object], None]
) -> None:
    name, headers = guarded.model(), {**_HEADERS, "content-type": "application/json"}
    hostile = bodies(name)
    statuses: Counter[int] = Counter()

    def send(body: bytes) -> None:
        answer = httpx.post(f"{guarded.url}/v1/completions", content=body, headers=headers, timeout=_HUNG_S)
        statuses[judge(answer, repr(body[:200]))] += 1

    def rss() -> int:
        return sum(p.memory_info().rss for p in guarded.processes() if _serves(p.name())) >> 20

    def wave() -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, hostile))

    for _ in range(5):
        wave()
    before, slowest = rss(), 0.0
    for _ in range(20):
        wave()
        began = time.monotonic()
        assert guarded.post({"model": name, "prompt": "a", "max_tokens": 3}).status_code == 200
        slowest = max(slowest, time.monotonic() - began)
    grown = rss() - before
    told = {"before_mib": before, "grown_mib": grown, "sent": len(hostile) * 25, "statuses": statuses}
    record_property("memory", json.dumps(told | {"slowest_other_s": round(slowest, 2)}))
    assert grown < 0.05 * before, told
    assert statuses[200] < 0.4 * sum(statuses.values())


def _serves(name: str) -> bool:
    return "Server" in name or "EngineCore" in name
