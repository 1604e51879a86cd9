"""What the scheduler tells the portfolio of its requests, and the worker through its notes."""

import time
from types import SimpleNamespace

from vllm import SamplingParams
from vllm.v1.request import Request

from aurora.config import SpeculationConfig
from serve.portfolio import Portfolio
from serve.scheduler import AuroraScheduler
from serve.token_sources import SourceNotes


def _request(name: str, prompt: list[int], salt: str | None = None, **arguments: object) -> Request:
    params = SamplingParams(max_tokens=8, extra_args=dict(arguments) or None)
    return Request(name, prompt, params, None, cache_salt=salt)


def _scheduler(*requests: Request, **fields: object) -> AuroraScheduler:
    """A scheduler without an engine: only what `_begin` works with."""
    scheduler = object.__new__(AuroraScheduler)
    scheduler.portfolio = Portfolio(SpeculationConfig(drafters=("ngram",), ngram_mib=1, **fields), 4)
    scheduler.controller = scheduler.portfolio.controller
    scheduler.requests = {request.request_id: request for request in requests}
    scheduler.running, scheduler.waiting = [], []
    scheduler.num_spec_tokens, scheduler.max_model_len, scheduler.block_size = 4, 512, 16
    scheduler.max_num_running_reqs, scheduler.max_num_scheduled_tokens = 8, 64
    scheduler._options, scheduler._first_token_s, scheduler._step_s = {}, {}, 0.05
    scheduler._token_deadline_ms, scheduler._sources = None, SourceNotes()
    _free_blocks(scheduler, 100)
    return scheduler


def _free_blocks(scheduler: AuroraScheduler, free: int) -> None:
    scheduler.kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: free))


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


def test_a_request_gets_no_longer_drafts_than_it_asked_for() -> None:
    scheduler = _scheduler(*(_request(f"{k}", [1, 2], max_speculation=k) for k in (0, 2, 9)), _request("any", [1, 2]))
    scheduler._begin(["0", "2", "9", "any"])
    assert [scheduler._limit(scheduler.requests[r], emitting=1) for r in ("0", "2", "9", "any")] == [0, 2, 4, 4]
    scheduler._finish(["0", "2", "9", "any"])
    assert not scheduler._options


def test_prompts_to_be_read_are_known_ahead() -> None:
    decoding, half, queued = _request("decoding", [1] * 5), _request("half", [1] * 40), _request("queued", [1] * 30)
    half.num_computed_tokens, half.is_prefill_chunk = 30, True
    scheduler = _scheduler(decoding, half, queued)
    scheduler.running, scheduler.waiting = [decoding, half], [queued]
    assert scheduler._ahead([], emitting=1).prefill_tokens == 10 + 30
    scheduler.max_num_scheduled_tokens = 25
    assert scheduler._ahead([], emitting=1).prefill_tokens == 24, "one token of the budget is for the one that decodes"
    scheduler.max_num_running_reqs = 2
    assert scheduler._ahead([], emitting=1).prefill_tokens == 10, "there is no place for the one in the queue"
    scheduler.max_num_running_reqs = 8
    _free_blocks(scheduler, 1)
    assert scheduler._ahead([], emitting=1).prefill_tokens == 10, "there are no blocks for it"


def test_drafts_leave_room_for_the_tokens_that_come_anyway() -> None:
    requests = [_request(f"{i}", [1] * 5) for i in range(5)]
    scheduler = _scheduler(*requests)
    scheduler.running = requests
    assert scheduler._ahead([], emitting=1).room == 64 - 5
    scheduler.max_num_scheduled_tokens = 8
    assert scheduler._ahead([], emitting=1).room == 3
    for free, room in ((10, 3), (7, 2), (5, 0), (2, 0)):
        _free_blocks(scheduler, free)
        assert scheduler._ahead([], emitting=1).room == room


def test_needs_are_what_deadlines_say() -> None:
    scheduler = _scheduler(_request("own", [1], token_deadline_ms=10), _request("any", [1]), objective="slo")
    scheduler._begin(["own", "any"])
    for request in scheduler.requests.values():
        request.append_output_token_ids([1, 1, 1])
    assert scheduler._ahead(["own", "any"], emitting=1).needs == {"own": 0.0, "any": 0.0}, "nothing was emitted yet"
    scheduler._first_token_s = dict.fromkeys(["own", "any"], time.perf_counter() - 0.1)
    needs = scheduler._ahead(["own", "any"], emitting=1).needs
    assert needs["any"] == 0.0, "it has no deadline"
    assert 15 - 2 <= needs["own"] < 16, "by the end of the step 15 tokens are due after the first, 2 are there"
    later = scheduler._ahead(["own"], emitting=2).needs["own"]
    assert 20 - 3 <= later < 21, "a step later another 5 are due, and one more is there"
    scheduler._token_deadline_ms = 100.0
    assert scheduler._ahead(["any"], emitting=1).needs["any"] < 0, "one or two were due, two are there"
