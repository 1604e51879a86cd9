"""What the server tells the trainer: one `DraftTrace` for each verification step (or prefill chunk) of each request.

A trace is self-describing but not self-contained: its rows start at `position`, and the context before them is what the
earlier traces of the same `request_id` carried. `context_ids` of step 0 is empty; a request's sequence is put together
again by position (`trainer.buffer`). The target's states travel in the form of a codec (`aurora.codec`); "bf16" is bit
patterns in uint16 arrays, because numpy has no bfloat16. Codecs that are not `whole` leave out what nothing is learned
from: the last hidden state of prompt rows, which judge no draft, and the tapped states of rejected rows, which no
drafter reads.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec
import numpy as np

from aurora.codec import CODECS, TAPS, TraceCodec

SCHEMA_VERSION = 2
# Where a drafter version is named, published versions of the neural drafter count from 1, those of the draft model
# from -1 downwards, and this stands for the n-gram table.
TABLE_VERSION = 0
TARGET = "target"
SOURCES = (TARGET, "ngram", "eagle3", "model")  # who may have written a token


def source_of(version: int) -> str:
    """Which kind of drafter a version is of, as named in `SOURCES`."""
    return "ngram" if version == TABLE_VERSION else "eagle3" if version > 0 else "model"


class DraftTrace(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One engine step of one request. n = rows the target computed, k = drafted tokens among them.

    Row i is the target's state after reading `input_ids[i]` at position `position + i`. In a verification step
    `input_ids = [last emitted token, draft 1 .. draft k]`, so row 0 judges draft 1 and row k gives the bonus token;
    rows past `accepted` lie on the rejected branch. In a prefill chunk k = 0 and `input_ids` are prompt tokens.
    Where the target was never run on the rejected branch (a replay) `hidden` and `aux` end with the accepted rows.
    """

    schema: int = SCHEMA_VERSION
    request_id: str
    step: int  # engine step, monotonic within one engine's life
    time_s: float  # wall clock, seconds since the epoch
    position: int  # position of input_ids[0] in the request's sequence
    prompt_tokens: int  # length of the prompt: positions below it are prompt
    input_ids: np.ndarray  # [n] int32
    emitted_ids: np.ndarray  # [accepted + 1] int32: accepted drafts, then correction or bonus token; [0] in mid-prefill
    k: int  # drafted tokens verified in this step
    accepted: int  # leading drafts that the target accepted, 0..k
    draft_q: np.ndarray  # [k] float32: probability with which the drafter proposed each draft (1.0 for greedy drafting)
    top_q_ids: np.ndarray  # [k, m] int32: the drafter's m likeliest tokens at each draft; m = 0 for greedy drafting
    top_q: np.ndarray  # [k, m] float32
    codec: str = "bf16"  # form of the two arrays below, a name in `aurora.codec.CODECS`
    hidden: np.ndarray  # [n, H] uint16 (bf16 bits), or encoded: the target's last hidden state, its head's input
    aux: np.ndarray  # [n, 3H] uint16 (bf16 bits), or encoded: the tapped layers' states, concatenated
    drafter_version: int  # version that drafted input_ids[1:]: above 0 neural, below 0 draft model, TABLE_VERSION
    temperature: float
    top_p: float
    top_k: int  # 0: unlimited
    domain: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of array payload, as encoded."""
        arrays = (self.input_ids, self.emitted_ids, self.draft_q, self.top_q_ids, self.top_q, self.hidden, self.aux)
        return sum(a.nbytes for a in arrays)

    @property
    def is_prefill(self) -> bool:
        return self.position + len(self.input_ids) - self.k <= self.prompt_tokens


_PLAIN_DTYPE = re.compile(r"[<>|=]?[biuf][1248]")  # numbers and truth values


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
    raise TypeError(f"a trace cannot carry a {type(value).__name__}")


def _decode_array(kind: type, value: Any) -> Any:
    if kind is not np.ndarray:
        raise TypeError(f"a trace cannot carry a {kind.__name__}")
    dtype, shape, data = value
    if not isinstance(dtype, str) or not _PLAIN_DTYPE.fullmatch(dtype):  # numpy reads much more than that, as Python
        raise ValueError(f"array dtype {dtype!r} is not plain data")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_decoder = msgspec.msgpack.Decoder(list[DraftTrace], dec_hook=_decode_array)


def encode_traces(traces: list[DraftTrace]) -> bytes:
    """Pack traces for transport."""
    return _encoder.encode(traces)


def decode_traces(payload: bytes) -> list[DraftTrace]:
    """Unpack what `encode_traces` made; arrays are read-only views of `payload`.

    Raises ValueError when the payload is damaged or of another schema version.
    """
    try:
        traces = _decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise ValueError(f"not a trace payload: {error}") from error
    for trace in traces:
        if trace.schema != SCHEMA_VERSION:
            raise ValueError(
                f"trace schema {trace.schema} is not {SCHEMA_VERSION}: server and trainer differ in version"
            )
    return traces


def carried(codec: TraceCodec, rows: int, position: int, prompt_tokens: int, rejected: int) -> tuple[int, int]:
    """Of a trace of `rows` rows: the first row whose last hidden state travels, one past the last whose taps travel."""
    return (0, rows) if codec.whole else (min(max(prompt_tokens - position, 0), rows), rows - rejected)


def _carried(codec: TraceCodec, trace: DraftTrace) -> tuple[int, int]:
    rejected = trace.k - trace.accepted
    return carried(codec, len(trace.input_ids), trace.position, trace.prompt_tokens, rejected)


def pack_states(trace: DraftTrace, name: str) -> DraftTrace:
    """A trace of codec "bf16" with its states in the form of another codec."""
    codec = CODECS[name]
    first, end = _carried(codec, trace)
    hidden, aux = codec.hidden.encode(trace.hidden[first:]), codec.encode_aux(trace.aux[:end])
    return msgspec.structs.replace(trace, codec=name, hidden=hidden, aux=aux)


def unpack_states(traces: Sequence[DraftTrace], hidden_size: int) -> Iterator[DraftTrace]:
    """The same traces with codec "bf16"; what was left out is zero.

    Raises ValueError naming the trace and what is wrong with its states.
    """
    for name, group in groupby(traces, key=lambda trace: trace.codec):
        codec = CODECS.get(name)
        if codec is None:
            raise ValueError(
                f"trace codec {name!r} is none of {', '.join(CODECS)}: server and trainer differ in version"
            )
        if codec.whole:
            yield from group
        else:
            yield from _unpack(list(group), codec, hidden_size)


def _unpack(traces: list[DraftTrace], codec: TraceCodec, hidden_size: int) -> Iterator[DraftTrace]:
    """Decode all rows of all traces in one piece, then cut it."""
    bounds = [_carried(codec, trace) for trace in traces]
    for trace, (first, end) in zip(traces, bounds, strict=True):
        rows = len(trace.input_ids)
        # A recording knows nothing of rejected rows: its traces end with the accepted ones (`trainer.recording`).
        judged = first + len(trace.hidden)
        if not 0 <= end <= rows or judged not in (rows, end) or len(trace.aux) != end:
            found = f"{len(trace.hidden)} last hidden and {len(trace.aux)} tapped states"
            where = f"trace of {trace.request_id} at position {trace.position}"
            raise ValueError(f"{where}: {found} contradict its {rows} rows")
    hidden = codec.hidden.decode(np.concatenate([trace.hidden for trace in traces]), hidden_size)
    aux = codec.decode_aux(np.concatenate([trace.aux for trace in traces]), hidden_size)
    hidden_at = aux_at = 0
    for trace, (first, end) in zip(traces, bounds, strict=True):
        rows = first + len(trace.hidden)
        full = np.zeros((rows, hidden_size), np.uint16), np.zeros((rows, TAPS * hidden_size), np.uint16)
        full[0][first:] = hidden[hidden_at : (hidden_at := hidden_at + rows - first)]
        full[1][:end] = aux[aux_at : (aux_at := aux_at + end)]
        yield msgspec.structs.replace(trace, codec="bf16", hidden=full[0], aux=full[1])
