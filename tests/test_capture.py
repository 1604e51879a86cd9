"""What capture makes of the runner's state: the domain of each trace, for as long as its request lives."""

from types import SimpleNamespace

import numpy as np
import torch

from serve.capture import Capture, TraceSink, Versions

HIDDEN = 4


def _runner(requests: list[str]) -> SimpleNamespace:
    """The parts of vLLM's model runner that capture reads, for requests that decode one token each."""
    count = len(requests)
    batch = SimpleNamespace(
        req_ids=requests,
        num_reqs=count,
        vocab_size=100,
        num_computed_tokens_cpu=np.full(count, 5),
        num_tokens_no_spec=np.full(count, 6),
        num_prompt_tokens=np.full(count, 3),
        temperature_cpu=np.zeros(count),
        top_p_cpu=np.ones(count),
        top_k_cpu=np.full(count, 100),
    )
    ids = SimpleNamespace(cpu=torch.arange(count))
    return SimpleNamespace(input_batch=batch, requests=dict.fromkeys(requests), input_ids=ids)


def _step(capture: Capture, sink: TraceSink) -> dict[str, str]:
    """One decode step of all requests of the runner: the domain that each one's trace says."""
    requests = capture.runner.input_batch.req_ids
    rows = torch.zeros(len(requests), HIDDEN)
    state = SimpleNamespace(
        scheduler_output=SimpleNamespace(num_scheduled_tokens=dict.fromkeys(requests, 1)),
        spec_decode_metadata=None,
        hidden_states=rows,
        aux_hidden_states=[rows] * 3,
    )
    capture.record(state, torch.ones(len(requests), 1, dtype=torch.int64), Versions(1, frozenset()))
    return {trace.request_id: trace.domain for trace in sink.drain(1 << 20)}


def test_traces_carry_the_domain_that_their_request_began_with() -> None:
    sink = TraceSink(1 << 20)
    capture = Capture(_runner(["a", "b"]), sink, prompt_tokens=10, top_m=0)
    capture.begin({"a": "sql"})
    for _ in range(3):
        assert _step(capture, sink) == {"a": "sql", "b": ""}
        capture.begin({})


def test_domains_of_requests_that_ended_are_forgotten() -> None:
    sink = TraceSink(1 << 20)
    capture = Capture(_runner(["a"]), sink, prompt_tokens=10, top_m=0)
    capture.begin({"a": "sql"})
    capture.runner = _runner(["b", "c"])
    capture.begin({"b": "cluster-3"})
    assert _step(capture, sink) == {"b": "cluster-3", "c": ""}
    assert capture._domains == {"b": "cluster-3"}
