import contextlib
import math
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.codec import CODECS
from aurora.trace import SCHEMA_VERSION, DraftTrace, decode_traces, encode_traces, pack_states, unpack_states

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


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_count_every_array_as_it_travels(make_trace: Callable[..., DraftTrace], codec: str) -> None:
    trace = pack_states(make_trace(), codec)
    arrays = [getattr(trace, name) for name in DraftTrace.__struct_fields__]
    assert trace.nbytes == sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))


def step(make_trace: Callable[..., DraftTrace], width: int, **fields: int) -> DraftTrace:
    """A step of `rows` rows whose states are Gaussian."""
    rows, accepted = fields.pop("rows"), fields.get("accepted", 0)
    rng = np.random.default_rng(rows)
    hidden, aux = ((rng.standard_normal((rows, w), np.float32).view(np.uint32) >> 16) for w in (width, 3 * width))
    return make_trace(
        input_ids=np.arange(rows, dtype=np.int32),
        emitted_ids=np.arange(accepted + 1, dtype=np.int32),
        hidden=hidden.astype(np.uint16),
        aux=aux.astype(np.uint16),
        **{"k": 0, "accepted": 0} | fields,
    )


def values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def assert_near(found: np.ndarray, truth: np.ndarray, error: float) -> None:
    difference = np.linalg.norm(values(found) - values(truth), axis=1)
    assert (difference <= error * np.linalg.norm(values(truth), axis=1)).all()


STEPS = [  # fields of a step; rows without last hidden state, rows with tapped states
    ({"rows": 9, "position": 0, "prompt_tokens": 20}, 9, 9),
    ({"rows": 9, "position": 15, "prompt_tokens": 20}, 5, 9),
    ({"rows": 1, "position": 20, "prompt_tokens": 20}, 0, 1),
    ({"rows": 5, "position": 21, "prompt_tokens": 20, "k": 4, "accepted": 1}, 0, 2),
    ({"rows": 3, "position": 30, "prompt_tokens": 20, "k": 2, "accepted": 2}, 0, 3),
]


@pytest.mark.parametrize(
    ("codec", "errors"), [("int8", (0.02, 0.02)), ("compact", (0.06, 0.25)), ("tiny", (0.15, 0.45))]
)
def test_states_come_back_nearly_where_something_is_learned_from_them(
    make_trace: Callable[..., DraftTrace], codec: str, errors: tuple[float, float]
) -> None:
    """Prompt rows judge no draft, and no drafter reads the taps of rejected rows."""
    sent = [step(make_trace, 64, **fields) for fields, _, _ in STEPS]
    received = decode_traces(encode_traces([pack_states(trace, codec) for trace in sent]))
    for trace, packed, found, (_, first, end) in zip(sent, received, unpack_states(received, 64), STEPS, strict=True):
        size = CODECS[codec].hidden.row_bytes(64), 3 * CODECS[codec].aux.row_bytes(64)
        assert (packed.hidden.nbytes, packed.aux.nbytes) == ((len(trace.input_ids) - first) * size[0], end * size[1])
        assert found.hidden.shape == trace.hidden.shape
        assert found.aux.shape == trace.aux.shape
        assert_near(found.hidden[first:], trace.hidden[first:], errors[0])
        assert_near(found.aux[:end], trace.aux[:end], errors[1])
        assert not found.hidden[:first].any()
        assert not found.aux[end:].any()
        plain = {"codec": "bf16", "hidden": trace.hidden, "aux": trace.aux}
        assert same(msgspec.structs.replace(found, **plain), trace)


def test_traces_of_several_codecs_keep_their_order(make_trace: Callable[..., DraftTrace]) -> None:
    sent = [step(make_trace, 64, **fields) for fields, _, _ in STEPS]
    names = ["bf16", "compact", "compact", "bf16", "int8"]
    found = list(unpack_states([pack_states(t, name) for t, name in zip(sent, names, strict=True)], 64))
    assert [t.position for t in found] == [t.position for t in sent]
    assert {t.codec for t in found} == {"bf16"}
    assert same(found[0], sent[0])
    assert same(found[3], sent[3])


def test_states_that_contradict_their_trace_are_refused(make_trace: Callable[..., DraftTrace]) -> None:
    good = pack_states(step(make_trace, 64, **STEPS[3][0]), "compact")

    def refused(message: str, **fields: object) -> None:
        with pytest.raises(ValueError, match=message):
            list(unpack_states([good, msgspec.structs.replace(good, **fields)], 64))

    refused("codec 'zip' is none of bf16, int8, compact, tiny: server and trainer", codec="zip")
    refused(
        r"trace of r at position 21: 4 last hidden and 2 tapped states contradict its 5 rows", hidden=good.hidden[1:]
    )
    refused(r"5 last hidden and 2 tapped states contradict its 5 rows", accepted=3)
    refused(r"contradict its 5 rows", accepted=9)
    with pytest.raises(ValueError, match=r"states are uint8 .*, not uint8 with 98 bytes"):
        list(unpack_states([good], 128))
