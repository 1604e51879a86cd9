"""What the scheduler tells the portfolio, and through its notes the worker, of requests that are new."""

from vllm import SamplingParams
from vllm.v1.request import Request

from aurora.config import SpeculationConfig
from serve.portfolio import Portfolio
from serve.scheduler import AuroraScheduler


def _request(name: str, prompt: list[int], salt: str | None = None, **arguments: str) -> Request:
    params = SamplingParams(max_tokens=8, extra_args=dict(arguments) or None)
    return Request(name, prompt, params, None, cache_salt=salt)


def _scheduler(*requests: Request, **fields: object) -> AuroraScheduler:
    """A scheduler without an engine: only what `_begin` works with."""
    scheduler = object.__new__(AuroraScheduler)
    scheduler.portfolio = Portfolio(SpeculationConfig(drafters=("ngram",), ngram_mib=1, **fields), 4)
    scheduler.requests = {request.request_id: request for request in requests}
    return scheduler


def test_the_notes_name_domains_of_new_requests_once() -> None:
    scheduler = _scheduler(_request("a", [1, 2], domain="sql"), _request("b", [3, 4]))
    scheduler._begin(["a", "b"])
    assert scheduler._began == {"a": "sql"}
    assert [scheduler.portfolio.domain_of(r) for r in ("a", "b")] == ["sql", ""]
    scheduler._begin(["a", "b"])
    assert scheduler._began == {}


def test_prompts_without_a_label_are_clustered_where_that_is_switched_on() -> None:
    requests = [_request(f"{i}", [i, *range(1000, 1040), i], salt=f"{i % 2}") for i in range(30)]
    scheduler = _scheduler(*requests, cluster_domains=True)
    for request in requests:
        scheduler._begin([request.request_id])
    assert scheduler._began["29"].startswith("cluster-")
