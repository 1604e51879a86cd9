"""Capture: which rows of a step become which trace, in every codec, and the domain of each trace."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aurora.codec import CODECS
from aurora.trace import DraftTrace, encode_traces, pack_states, unpack_states
from serve.capture import Capture, TraceSink, Versions

H = 32
PROMPTS = {"early": 12, "late": 9, "text": 3}


SCHEDULED = {"early": 6, "late": 7, "text": 3}


class Step:
    """What the runner holds in a step: an early piece of a prompt, the end of another, two drafts of which one held."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        total = sum(SCHEDULED.values())
        self.rows = [torch.randn(total + 2, H, generator=generator) for _ in range(4)]  # vLLM pads the batch
        self.sampled = torch.tensor([[5, -1, -1], [6, -1, -1], [7, 8, -1]])
        ids = torch.arange(total + 2, dtype=torch.int32)
        batch = SimpleNamespace(
            num_reqs=3,
            req_ids=list(SCHEDULED),
            num_computed_tokens_cpu=np.array([0, 2, 8]),
            num_tokens_no_spec=np.array([12, 9, 9]),
            num_prompt_tokens=np.array(list(PROMPTS.values())),
            temperature_cpu=np.zeros(3),
            top_p_cpu=np.ones(3),
            top_k_cpu=np.full(3, 100),
            vocab_size=100,
        )
        self.runner = SimpleNamespace(
            input_batch=batch,
            input_ids=SimpleNamespace(cpu=ids),
            requests=dict.fromkeys(SCHEDULED),
            _get_spec_decode_draft_probs=lambda _metadata: None,
        )

    @property
    def state(self) -> Any:
        return SimpleNamespace(
            scheduler_output=SimpleNamespace(num_scheduled_tokens=SCHEDULED),
            spec_decode_metadata=SimpleNamespace(num_draft_tokens=[0, 0, 2]),
            hidden_states=self.rows[0],
            aux_hidden_states=self.rows[1:],
        )

    def captured(self, codec: str, prompt_tokens: int = 100) -> list[DraftTrace]:
        sink = TraceSink(1 << 20)
        capture = Capture(self.runner, sink, prompt_tokens, 0, codec)
        capture.record(self.state, self.sampled, Versions(1, {}))
        return sink.drain(1 << 20)


def test_each_request_becomes_one_trace_with_its_own_rows() -> None:
    step = Step(0)
    early, late, text = step.captured("bf16")
    bits = [rows.to(torch.bfloat16).view(torch.uint16).numpy() for rows in step.rows]
    for trace, span in ((early, slice(0, 6)), (late, slice(6, 13)), (text, slice(13, 16))):
        np.testing.assert_array_equal(trace.input_ids, np.arange(16)[span])
        np.testing.assert_array_equal(trace.hidden, bits[0][span])
        np.testing.assert_array_equal(trace.aux, np.concatenate([b[span] for b in bits[1:]], axis=1))
    assert [(t.position, t.k, t.accepted, t.emitted_ids.tolist()) for t in (early, late, text)] == [
        (0, 0, 0, []),
        (2, 0, 0, [6]),
        (8, 2, 1, [7, 8]),
    ]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("prompt_tokens", [100, 4, 0])
def test_what_is_captured_is_what_packing_the_same_traces_gives(codec: str, prompt_tokens: int) -> None:
    step = Step(1)
    packed = [pack_states(trace, codec) for trace in step.captured("bf16", prompt_tokens)]
    found = step.captured(codec, prompt_tokens)
    assert [t.nbytes for t in found] == [t.nbytes for t in packed]
    for a, b in zip(unpack_states(found, H), unpack_states(packed, H), strict=True):
        assert (a.request_id, a.position, a.prompt_tokens) == (b.request_id, b.position, b.prompt_tokens)
        for x, y in ((a.hidden, b.hidden), (a.aux, b.aux)):
            np.testing.assert_allclose(_values(x), _values(y), atol=0.01)


def _values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_only_the_newest_prompt_rows_are_kept() -> None:
    assert [(t.request_id, t.position, len(t.input_ids)) for t in Step(2).captured("compact", prompt_tokens=4)] == [
        ("late", 5, 4),
        ("text", 8, 3),
    ]


def test_the_bound_of_the_sink_counts_what_travels() -> None:
    traces = {codec: Step(3).captured(codec) for codec in CODECS}
    sizes = {codec: sum(t.nbytes for t in found) for codec, found in traces.items()}
    assert sizes["tiny"] < sizes["compact"] < sizes["int8"] < sizes["bf16"]
    sink = TraceSink(sizes["compact"])
    for trace in traces["compact"]:
        sink.put(trace)
    assert (len(sink), sink.dropped) == (3, 0)
    for trace in traces["bf16"]:
        sink.put(trace)
    assert sink.dropped > 3
    assert len(encode_traces(traces["compact"])) < sizes["compact"] + 1000


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
    rows = torch.zeros(len(requests), H)
    state = SimpleNamespace(
        scheduler_output=SimpleNamespace(num_scheduled_tokens=dict.fromkeys(requests, 1)),
        spec_decode_metadata=None,
        hidden_states=rows,
        aux_hidden_states=[rows] * 3,
    )
    capture.record(state, torch.ones(len(requests), 1, dtype=torch.int64), Versions(1, {}))
    return {trace.request_id: trace.domain for trace in sink.drain(1 << 20)}


def test_traces_carry_the_domain_that_their_request_began_with() -> None:
    sink = TraceSink(1 << 20)
    capture = Capture(_runner(["a", "b"]), sink, prompt_tokens=10, top_m=0, codec="bf16")
    capture.begin({"a": "sql"})
    for _ in range(3):
        assert _step(capture, sink) == {"a": "sql", "b": ""}
        capture.begin({})


def test_domains_of_requests_that_ended_are_forgotten() -> None:
    sink = TraceSink(1 << 20)
    capture = Capture(_runner(["a"]), sink, prompt_tokens=10, top_m=0, codec="bf16")
    capture.begin({"a": "sql"})
    capture.runner = _runner(["b", "c"])
    capture.begin({"b": "cluster-3"})
    assert _step(capture, sink) == {"b": "cluster-3", "c": ""}
    assert capture._domains == {"b": "cluster-3"}
