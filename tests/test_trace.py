import contextlib
import math
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.trace import SCHEMA_VERSION, DraftTrace, decode_traces, encode_traces

HIDDEN = 3


@st.composite
def traces(draw: st.DrawFn) -> DraftTrace:
    k, m = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    rows = k + draw(st.integers(1, 4))
    accepted = draw(st.integers(0, k))

    def array(dtype: type, *shape: int) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)

    return DraftTrace(
        request_id=draw(st.text()),
        step=draw(st.integers(0, 2**40)),
        time_s=draw(st.floats(0, 1e10)),
        position=draw(st.integers(0, 10**6)),
        prompt_tokens=draw(st.integers(1, 10**6)),
        input_ids=array(np.int32, rows),
        emitted_ids=array(np.int32, accepted + 1),
        k=k,
        accepted=accepted,
        draft_q=array(np.float32, k),
        top_q_ids=array(np.int32, k, m),
        top_q=array(np.float32, k, m),
        hidden=array(np.uint16, rows, HIDDEN),
        aux=array(np.uint16, rows, 3 * HIDDEN),
        drafter_version=draw(st.integers(0, 1000)),
        temperature=draw(st.floats(0, 2)),
        top_p=draw(st.floats(0, 1)),
        top_k=draw(st.integers(0, 100)),
        domain=draw(st.text()),
    )


def same(a: DraftTrace, b: DraftTrace) -> bool:
    for name in DraftTrace.__struct_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            if (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
                return False
        elif x != y:
            return False
    return True


@given(st.lists(traces(), max_size=3))
def test_traces_come_back_bit_for_bit(sent: list[DraftTrace]) -> None:
    received = decode_traces(encode_traces(sent))
    assert len(received) == len(sent)
    assert all(map(same, sent, received))


@given(traces(), st.data())
def test_a_damaged_payload_decodes_or_is_refused_with_a_value_error(trace: DraftTrace, data: st.DataObject) -> None:
    payload = bytearray(encode_traces([trace]))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        decode_traces(bytes(payload))


@given(traces(), st.data())
def test_a_truncated_payload_is_refused(trace: DraftTrace, data: st.DataObject) -> None:
    payload = encode_traces([trace])
    with pytest.raises(ValueError, match="not a trace payload"):
        decode_traces(payload[: data.draw(st.integers(0, len(payload) - 1))])


def test_views_that_are_not_contiguous_travel_too(make_trace: Callable[..., DraftTrace]) -> None:
    wide = np.arange(36, dtype=np.uint16).reshape(3, 12)
    (received,) = decode_traces(encode_traces([make_trace(hidden=wide[:, ::3])]))
    np.testing.assert_array_equal(received.hidden, wide[:, ::3])


def test_another_schema_is_refused(make_trace: Callable[..., DraftTrace]) -> None:
    with pytest.raises(ValueError, match=f"schema {SCHEMA_VERSION + 1}.*differ in version"):
        decode_traces(encode_traces([make_trace(schema=SCHEMA_VERSION + 1)]))


def test_arrays_of_objects_are_refused_both_ways(make_trace: Callable[..., DraftTrace]) -> None:
    with pytest.raises(TypeError, match="cannot carry a complex"):
        encode_traces([make_trace(hidden=1j)])
    items = msgspec.msgpack.decode(encode_traces([make_trace()]))
    position = DraftTrace.__struct_fields__.index("input_ids")
    items[0][position] = ["|O", [1], b"12345678"]
    with pytest.raises(ValueError, match="not plain data"):
        decode_traces(msgspec.msgpack.encode(items))


@pytest.mark.parametrize(
    ("position", "rows", "k", "prefill"), [(0, 8, 0, True), (4, 4, 0, True), (8, 1, 0, False), (8, 3, 2, False)]
)
def test_prefill_is_told_by_position(
    make_trace: Callable[..., DraftTrace], position: int, rows: int, k: int, prefill: bool
) -> None:
    assert make_trace(position=position, input_ids=np.zeros(rows, np.int32), k=k).is_prefill is prefill


def test_bytes_count_every_array(make_trace: Callable[..., DraftTrace]) -> None:
    trace = make_trace()
    arrays = [getattr(trace, name) for name in DraftTrace.__struct_fields__]
    assert trace.nbytes == sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))
