"""Codecs of the target's states: bytes, error bounds, what is exact, what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aurora.codec import CODECS, TAPS, Rotated, TraceCodec, outliers

ROTATED = [pytest.param(codec, id=f"{codec.bits} bits") for codec in (Rotated(8), Rotated(6), Rotated(3), Rotated(2))]
WIDTHS = st.sampled_from([1, 7, 48, 144, 288])


def bits(rows: np.ndarray) -> np.ndarray:
    """The upper halves of float32: bf16, rounded towards zero."""
    return (np.ascontiguousarray(rows, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def floats(rows: np.ndarray) -> np.ndarray:
    return (rows.astype(np.uint32) << 16).view(np.float32)


def gaussian(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return bits(np.random.default_rng(seed).standard_normal((rows, width)))


@st.composite
def vectors(draw: st.DrawFn, low: int = 0, high: int = 0x7F7F) -> np.ndarray:
    """bf16 patterns [0-4 rows, width] of magnitude `low` .. `high`, of any sign."""
    shape = (draw(st.integers(0, 4)), draw(WIDTHS))
    magnitude = draw(hnp.arrays(np.uint16, shape, elements=st.integers(low, high)))
    return magnitude | (draw(hnp.arrays(np.uint16, shape, elements=st.integers(0, 1))) << 15).astype(np.uint16)


@given(vectors(high=0x7FFF))
def test_plain_is_bit_for_bit(rows: np.ndarray) -> None:
    plain = CODECS["bf16"].hidden
    np.testing.assert_array_equal(plain.decode(plain.encode(rows), rows.shape[1]), rows)


@given(st.integers(72, 1024).map(lambda eighth: 8 * eighth))
def test_compact_is_a_quarter_of_bf16_from_576_on(width: int) -> None:
    sizes = {name: codec.row_bytes(width) for name, codec in CODECS.items()}
    assert sizes["bf16"] == 8 * width
    assert sizes["int8"] <= 4.125 * width
    assert sizes["compact"] <= 2 * width
    assert sizes["tiny"] <= 1.375 * width


@pytest.mark.parametrize("codec", ROTATED)
@given(rows=vectors(high=0x7FFF))
def test_every_row_takes_its_bytes_and_the_same_each_time(codec: Rotated, rows: np.ndarray) -> None:
    count, width = rows.shape
    encoded = codec.encode(rows)
    assert (encoded.dtype, encoded.shape) == (np.uint8, (count, codec.row_bytes(width)))
    assert encoded.tobytes() == codec.encode(rows).tobytes()
    decoded = codec.decode(encoded, width)
    assert (decoded.dtype, decoded.shape) == (np.uint16, rows.shape)


@pytest.mark.parametrize("codec", ROTATED)
@given(rows=vectors(low=0x0800, high=0x7B00))  # 4e-34 .. 7e35: their scales are normal numbers
def test_the_error_of_a_vector_is_bounded_by_its_scale(codec: Rotated, rows: np.ndarray) -> None:
    """An orthogonal matrix keeps lengths: sqrt(d) elements of at most the worst error, and bf16's own rounding."""
    width = rows.shape[1]
    encoded = codec.encode(rows)
    scale = floats(np.ascontiguousarray(encoded[:, :2]).view(np.uint16))[:, 0].astype(np.float64)
    truth, decoded = (floats(x).astype(np.float64) for x in (rows, codec.decode(encoded, width)))
    error = np.linalg.norm(truth - decoded, axis=1)
    rounding = 2.0**-8 * np.linalg.norm(decoded, axis=1)
    bound = np.sqrt(width) * codec.worst_error * scale
    assert (error <= 1.001 * (bound + rounding)).all()
    largest = -np.sort(-np.abs(truth), axis=1)
    rest = np.linalg.norm(largest[:, outliers(width) :], axis=1)
    assert (scale <= 1.01 * rest).all(), "outliers do not count"


@pytest.mark.parametrize(("levels", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_gaussian_vectors_lose_what_the_optimal_quantiser_loses(levels: int, error: float) -> None:
    """Max 1960, table I. The outliers, which are exact, make it a little less."""
    rows = gaussian(200, 4096)
    truth, decoded = floats(rows), floats(Rotated(levels).decode(Rotated(levels).encode(rows), 4096))
    assert 0.9 * error < np.square(truth - decoded).mean() / np.square(truth).mean() < 1.02 * error


@pytest.mark.parametrize("codec", ROTATED)
def test_channels_that_stand_out_are_exact_and_cost_the_others_nothing(codec: Rotated) -> None:
    rows = gaussian(50, 576)
    loud = rows.copy()
    loud[:, [3, 77, 300, 511]] = bits(np.array([300.0, -1000.0, 50.0, 12345.0]))
    decoded = codec.decode(codec.encode(loud), 576)
    np.testing.assert_array_equal(decoded[:, [3, 77, 300, 511]], loud[:, [3, 77, 300, 511]])
    errors = [np.square(floats(codec.decode(codec.encode(x), 576)) - floats(x)).mean() for x in (rows, loud)]
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("codec", ROTATED)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_vector_that_is_not_finite_never_becomes_finite(codec: Rotated, value: float) -> None:
    rows = gaussian(3, 576)
    rows[1, 40] = bits(np.array([value]))[0]
    decoded = floats(codec.decode(codec.encode(rows), 576))
    assert np.isnan(decoded[1]).all()
    np.testing.assert_array_equal(decoded[::2], floats(codec.decode(codec.encode(rows[::2]), 576)))


@pytest.mark.parametrize("codec", ROTATED)
@given(rows=vectors())
def test_finite_vectors_stay_finite_and_zero_stays_zero(codec: Rotated, rows: np.ndarray) -> None:
    width = rows.shape[1]
    assert np.isfinite(floats(codec.decode(codec.encode(rows), width))).all()
    assert not floats(codec.decode(codec.encode(np.zeros_like(rows)), width)).any()


@pytest.mark.parametrize("codec", ROTATED)
@given(data=st.data())
def test_damaged_bytes_decode_or_are_refused(codec: Rotated, data: st.DataObject) -> None:
    size = codec.row_bytes(576)
    payload = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)[None]
    where = np.ascontiguousarray(payload[:, 2 : 2 + 2 * outliers(576)]).view(np.uint16)
    if where.max() < 576:
        assert codec.decode(payload, 576).shape == (1, 576)
    else:
        with pytest.raises(ValueError, match=f"index {where.max()} of an outlier .* 576 elements"):
            codec.decode(payload, 576)


def test_payloads_of_another_form_are_refused_by_what_is_wrong() -> None:
    compact, rows = CODECS["compact"], gaussian(2, 576)
    encoded = compact.hidden.encode(rows)
    with pytest.raises(ValueError, match=r"uint8 of shape \(2, 449\), not uint8 with 450 bytes"):
        compact.hidden.decode(encoded[:, :-1], 576)
    with pytest.raises(ValueError, match=r"uint16 of shape \(2, 576\), not uint8"):
        compact.hidden.decode(rows, 576)
    with pytest.raises(ValueError, match=r"uint8 of shape .*, not uint16 with 1152 bytes"):
        CODECS["bf16"].hidden.decode(encoded, 576)
    with pytest.raises(ValueError, match=r"shape \(2, 701\) does not hold 3 states"):
        compact.decode_aux(compact.encode_aux(gaussian(2, TAPS * 576))[:, :-1], 576)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_no_rows_are_no_bytes(codec: TraceCodec) -> None:
    none = np.zeros((0, TAPS * 64), np.uint16)
    encoded = codec.encode_aux(none)
    assert encoded.size == 0
    assert codec.decode_aux(encoded, 64).shape == none.shape


def test_tapped_states_are_encoded_one_by_one() -> None:
    """One of them ten thousand times as large does not drown the others."""
    codec, rows = CODECS["int8"], gaussian(4, TAPS * 144)
    rows[:, 288:] = bits(1e4 * floats(rows[:, 288:]))
    decoded = codec.decode_aux(codec.encode_aux(rows), 144)
    for tap in np.split(np.stack([floats(rows), floats(decoded)]), TAPS, axis=2):
        assert np.linalg.norm(tap[0] - tap[1]) < 0.02 * np.linalg.norm(tap[0])
