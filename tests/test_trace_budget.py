"""The budget of traces and training: bytes are those that are sent, the sampling rate keeps every share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.codec import CODECS, TAPS
from aurora.trace import DraftTrace, encode_traces, pack_states
from aurora.trace_budget import Shares, Speeds, Traffic, budget, bytes_beside_states, train_rows_per_s

TRAFFIC = Traffic(
    tokens_per_s=70.0, requests_per_s=0.5, prompt_rows=100.0, drafted_per_token=1.2, accepted_per_token=0.4
)


def _trace(rows: int, prompt: bool, drafts: int, accepted: int, hidden_size: int) -> DraftTrace:
    rng = np.random.default_rng(0)
    hidden, aux = (rng.integers(0, 1 << 14, (rows, n * hidden_size)).astype(np.uint16) for n in (1, TAPS))
    emitted = np.zeros(0 if prompt else accepted + 1, np.int32)
    return DraftTrace(
        request_id="chatcmpl-" + "0" * 32,
        step=1 << 20,
        time_s=1e9,
        position=0 if prompt else 1 << 10,
        prompt_tokens=1 << 10,
        input_ids=np.zeros(rows, np.int32),
        emitted_ids=emitted,
        k=drafts,
        accepted=accepted,
        draft_q=np.ones(drafts, np.float32),
        top_q_ids=np.zeros((drafts, 0), np.int32),
        top_q=np.zeros((drafts, 0), np.float32),
        hidden=hidden,
        aux=aux,
        drafter_version=7,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )


@pytest.mark.parametrize("name", sorted(CODECS))
def test_bytes_are_those_of_the_traces_that_are_sent(name: str):
    traces = [_trace(100, True, 0, 0, 576), *[_trace(4, False, 3, 1, 576)] * 50]
    sent = len(encode_traces([pack_states(trace, name) if name != "bf16" else trace for trace in traces]))
    second = Traffic(100.0, 1.0, 100.0, drafted_per_token=1.5, accepted_per_token=0.5)
    assert second.rows == 100 + 200
    assert second.bytes_per_s(CODECS[name], 576) == pytest.approx(sent, rel=0.02)


def test_a_trace_without_drafts_has_little_beside_its_states():
    assert 100 < bytes_beside_states(0) < bytes_beside_states(4) < 300


@given(
    st.integers(1, 10_000),
    st.builds(Speeds, *[st.floats(1, 1e9)] * 4),
    st.builds(Shares, *[st.floats(0.01, 1)] * 4),
)
def test_the_sampling_rate_keeps_every_share_and_is_the_largest_that_does(replicas, speeds, shares):
    found = budget(replicas, TRAFFIC, 1e5, speeds, shares)
    for name, load in found.loads.items():
        assert load * found.rate <= getattr(shares, name) * (1 + 1e-9)
    assert 0 < found.rate <= 1
    assert found.rate == 1 or found.loads[found.first] * found.rate == pytest.approx(getattr(shares, found.first))
    assert found.rows_per_s == pytest.approx(replicas * TRAFFIC.rows)


def test_twice_the_replicas_are_twice_the_load_of_all_but_their_own_cores():
    speeds = Speeds(1e4, 1e4, 1e3, 1e9)
    one, two = (budget(n, TRAFFIC, 1e5, speeds, Shares()).loads for n in (10, 20))
    assert two["encode"] == one["encode"]
    for name in ("link", "decode", "train"):
        assert two[name] == pytest.approx(2 * one[name])


def test_training_speed_is_operations_over_those_of_a_row():
    assert train_rows_per_s(1000, 3, 18_000) == 1.0
