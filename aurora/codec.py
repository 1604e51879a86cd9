"""How the target's states travel in a trace: as bf16 bit patterns, or quantised to a fraction of their bytes.

A state has a few channels that hold half of its energy; quantised beside them, the others would drown. So a quantised
vector is written in three parts:

1. its largest elements as they are (one in `_ELEMENTS_PER_OUTLIER`), index and bf16 value;
2. the scale of the rest, bf16;
3. the rest, rotated by a fixed random orthogonal matrix, which makes its elements nearly Gaussian, in units of the
   scale and on the levels of the optimal quantiser for a Gaussian (Max 1960; Lloyd 1982).

The rotation is a product of two small matrices made of Hadamard's (as in QuIP#, Tseng et al. 2024) and, for widths that
are not a power of two, the cosine transform. The last hidden state, a label, gets more bits than the tapped states,
which are inputs of a drafter that bears noise. A vector that is not finite comes back as NaN, whole.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bits16 = npt.NDArray[np.uint16]  # bf16 bit patterns
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

TAPS = 3  # tapped states in a row of `aux`
_ELEMENTS_PER_OUTLIER = 144
_REACH = 4.0  # the scale is such that no rotated element exceeds it
_CELLS = 4096  # of equal width over -_REACH .. _REACH; levels are found by cell
_LLOYD_ROUNDS = 300
_CHUNK = 1 << 18  # elements at once: what they need stays in the cache
_NAN, _INFINITY, _MAGNITUDE = np.uint16(0x7FC0), np.uint16(0x7F80), np.uint16(0x7FFF)
_MAX_BF16 = np.float32(3.3895314e38)
_SMALLEST_NORMAL = np.float32(np.finfo(np.float32).tiny)


class VectorCodec(Protocol):
    """A way to write vectors of bf16 bit patterns."""

    def row_bytes(self, width: int) -> int:
        """Bytes of one vector of `width` elements."""

    def encode(self, rows: Bits16) -> npt.NDArray[np.generic]:
        """[n, width] to what travels, n rows of `row_bytes(width)` bytes."""

    def decode(self, payload: npt.NDArray[np.generic], width: int) -> Bits16:
        """What `encode` made, back to [n, width]. Raises ValueError saying how the payload is damaged."""


@dataclass(frozen=True)
class Plain:
    """Bit patterns as they are, uint16."""

    def row_bytes(self, width: int) -> int:
        return 2 * width

    def encode(self, rows: Bits16) -> npt.NDArray[np.generic]:
        return rows

    def decode(self, payload: npt.NDArray[np.generic], width: int) -> Bits16:
        _check(payload, np.dtype(np.uint16), self.row_bytes(width))
        return payload.view(np.uint16)


@dataclass(frozen=True)
class Rotated:
    """Outliers, scale and `bits` (1 to 8) for each element; the module's docstring tells the steps."""

    bits: int

    def row_bytes(self, width: int) -> int:
        return 2 + 4 * outliers(width) + self.bits * _plane_bytes(width)

    @property
    def worst_error(self) -> float:
        """Bound of the error of every rotated element, in units of its vector's scale."""
        levels, cells = _levels(1 << self.bits)
        edges = np.linspace(-_REACH, _REACH, _CELLS + 1)
        return float(max(np.abs(edges[:-1] - levels[cells]).max(), np.abs(edges[1:] - levels[cells]).max()))

    def encode(self, rows: Bits16) -> Bytes:
        some = max(_CHUNK // rows.shape[1], 1)
        starts = range(0, max(len(rows), 1), some)
        return np.concatenate([self._encode(rows[start : start + some]) for start in starts])

    def _encode(self, rows: Bits16) -> Bytes:
        width = rows.shape[1]
        sizes = rows & _MAGNITUDE
        finite = sizes.max(axis=1) < _INFINITY
        where = np.argpartition(sizes, width - outliers(width) - 1, axis=1)[:, width - outliers(width) :]
        rest = _to_float(rows)
        np.put_along_axis(rest, where, 0, axis=1)
        rest[~finite] = 0
        units, scale = _in_units(rest)
        cells = ((units + _REACH) * (_CELLS / (2 * _REACH))).astype(np.int16)
        codes = _levels(1 << self.bits)[1].take(cells, mode="clip")
        parts = [
            np.where(finite, scale, _NAN)[:, None].view(np.uint8),
            where.astype(np.uint16).view(np.uint8),
            np.take_along_axis(rows, where, axis=1).view(np.uint8),
            *(np.packbits(codes & np.uint8(1 << bit), axis=1) for bit in range(self.bits)),
        ]
        return np.concatenate(parts, axis=1)

    def decode(self, payload: npt.NDArray[np.generic], width: int) -> Bits16:
        _check(payload, np.dtype(np.uint8), self.row_bytes(width))
        count, kept, plane = len(payload), outliers(width), _plane_bytes(width)
        head, planes = np.split(payload.view(np.uint8), [2 + 4 * kept], axis=1)
        scale = _to_float(np.ascontiguousarray(head[:, :2]).view(np.uint16))
        broken = ~np.isfinite(scale[:, 0])
        scale[broken] = 0
        where = np.ascontiguousarray(head[:, 2 : 2 + 2 * kept]).view(np.uint16)
        if where.size and int(where.max()) >= width:
            raise ValueError(f"index {int(where.max())} of an outlier lies outside a vector of {width} elements")
        codes = np.zeros((count, width), np.uint8)
        for bit in range(self.bits):
            ones = np.unpackbits(planes[:, bit * plane : (bit + 1) * plane], axis=1, count=width)
            codes |= ones << np.uint8(bit)
        rest = _rotate(_levels(1 << self.bits)[0][codes], back=True)
        with np.errstate(over="ignore"):
            rows = _to_bits(np.clip(rest * scale, -_MAX_BF16, _MAX_BF16))
        np.put_along_axis(
            rows, where.astype(np.int64), np.ascontiguousarray(head[:, 2 + 2 * kept :]).view(np.uint16), 1
        )
        rows[broken] = _NAN
        return rows


@dataclass(frozen=True)
class TraceCodec:
    """How one row of a trace is written."""

    hidden: VectorCodec  # of the last hidden state, [n, H]
    aux: VectorCodec  # of each of the tapped states, [n, TAPS * H]
    whole: bool  # rows that nothing is learned from are kept, too

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of the states of one row of which nothing is left out."""
        return self.hidden.row_bytes(hidden_size) + TAPS * self.aux.row_bytes(hidden_size)

    def encode_aux(self, aux: Bits16) -> npt.NDArray[np.generic]:
        """[n, TAPS * H] to what travels, [n, *]."""
        rows, width = aux.shape
        taps = np.ascontiguousarray(aux).reshape(rows * TAPS, width // TAPS)
        encoded = self.aux.encode(taps)
        return encoded.reshape(rows, TAPS * encoded.shape[1])

    def decode_aux(self, payload: npt.NDArray[np.generic], hidden_size: int) -> Bits16:
        """What `encode_aux` made, back to [n, TAPS * H]. Raises ValueError for a damaged payload."""
        if payload.ndim != 2 or payload.shape[1] % TAPS:
            raise ValueError(f"an array of shape {payload.shape} does not hold {TAPS} states a row")
        rows, size = payload.shape
        taps = np.ascontiguousarray(payload).reshape(rows * TAPS, size // TAPS)
        return self.aux.decode(taps, hidden_size).reshape(rows, TAPS * hidden_size)


CODECS = {
    "bf16": TraceCodec(Plain(), Plain(), whole=True),
    "int8": TraceCodec(Rotated(8), Rotated(8), whole=False),
    "compact": TraceCodec(Rotated(6), Rotated(3), whole=False),
    "tiny": TraceCodec(Rotated(4), Rotated(2), whole=False),
}


def outliers(width: int) -> int:
    """Elements of a vector that are written as they are."""
    return width // _ELEMENTS_PER_OUTLIER


def _plane_bytes(width: int) -> int:
    return -(-width // 8)


def _check(payload: npt.NDArray[np.generic], dtype: np.dtype[np.generic], row_bytes: int) -> None:
    if payload.dtype != dtype or payload.ndim != 2 or payload.shape[1] * payload.itemsize != row_bytes:
        found = f"{payload.dtype} of shape {payload.shape}"
        raise ValueError(f"states are {found}, not {dtype} with {row_bytes} bytes a vector")


def _to_float(bits: Bits16) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bits(rows: Floats) -> Bits16:
    """To the nearest bf16, ties to even."""
    bits = rows.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _in_units(rows: Floats) -> tuple[Floats, Bits16]:
    """Rows [n, d], rotated, in units of their scale, and the scale's bits [n].

    The scale is the root mean square, or more where an element would exceed _REACH, rounded up to bf16. Vectors below
    the smallest normal number become zero.
    """
    peak = np.abs(rows).max(axis=1, keepdims=True)
    empty = peak < _SMALLEST_NORMAL
    peak[empty] = 1
    rotated = _rotate(rows / peak)
    spread = np.sqrt(np.square(rotated).mean(axis=1, keepdims=True))
    unit = np.maximum(spread, np.abs(rotated).max(axis=1, keepdims=True) / _REACH)
    with np.errstate(over="ignore"):
        scale = np.minimum(unit * peak, _MAX_BF16)
    bits = ((scale.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)
    bits[empty] = 0
    return rotated / np.where(empty, peak, _to_float(bits) / peak), bits[:, 0]


@lru_cache
def _levels(count: int) -> tuple[Floats, Bytes]:
    """The `count` levels that quantise a standard Gaussian with the least squared error, and the level of each cell.

    Lloyd's method on the Gaussian's mass in the cells, from levels as dense as the cube root of its density (Panter &
    Dite 1951).
    """
    centres = (np.arange(_CELLS) + 0.5) * (2 * _REACH / _CELLS) - _REACH
    mass = np.exp(-(centres**2) / 2)
    spread = np.cumsum(np.cbrt(mass))
    levels = centres[np.searchsorted(spread, (np.arange(count) + 0.5) / count * spread[-1])]
    for _ in range(_LLOYD_ROUNDS):
        cells = np.searchsorted((levels[1:] + levels[:-1]) / 2, centres)
        levels = np.bincount(cells, mass * centres, count) / np.bincount(cells, mass, count)
    return levels.astype(np.float32), cells.astype(np.uint8)


@lru_cache
def _rotation(width: int) -> tuple[Floats, Floats, Floats]:
    """Signs [a, b] and orthogonal matrices [a, a], [b, b] with a * b = width, a a power of two and close to b."""
    power = width & -width
    a = min(power, 1 << (math.isqrt(width).bit_length() - 1))
    b = width // a
    digest = hashlib.shake_256(b"signs").digest(_plane_bytes(width))
    signs = 1.0 - 2.0 * np.unpackbits(np.frombuffer(digest, np.uint8), count=width)
    rest = b & -b
    right = np.kron(_hadamard(rest), _cosine(b // rest))
    return signs.reshape(a, b).astype(np.float32), _hadamard(a).astype(np.float32), right.astype(np.float32)


def _rotate(rows: Floats, back: bool = False) -> Floats:
    """Rows [n, d] times the fixed orthogonal matrix, or its inverse."""
    signs, left, right = _rotation(rows.shape[1])
    blocks = rows.reshape(-1, *signs.shape)
    turned = left.T @ (blocks @ right) * signs if back else left @ ((blocks * signs) @ right.T)
    return turned.reshape(rows.shape).astype(np.float32, copy=False)


def _hadamard(size: int) -> npt.NDArray[np.float64]:
    """Sylvester's construction, orthonormal; `size` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def _cosine(size: int) -> npt.NDArray[np.float64]:
    """The orthonormal cosine transform (DCT-II)."""
    order = np.arange(size)
    matrix = np.cos(np.pi * (order[None] + 0.5) * order[:, None] / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
