"""What the server tells the trainer: one `DraftTrace` for each verification step (or prefill chunk) of each request.

A trace is self-describing but not self-contained: its rows start at `position`, and the context before them is what the
earlier traces of the same `request_id` carried. `context_ids` of step 0 is empty; a request's sequence is put together
again by position (`trainer.buffer`). Hidden states travel as bf16 bit patterns in uint16 arrays, because numpy has no
bfloat16.
"""

from typing import Any

import msgspec
import numpy as np

SCHEMA_VERSION = 1
# Where a drafter version is named, published versions of the neural drafter count from 1, those of the draft model
# from -1 downwards, and this stands for the n-gram table.
TABLE_VERSION = 0


class DraftTrace(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One engine step of one request. n = rows the target computed, k = drafted tokens among them.

    Row i is the target's state after reading `input_ids[i]` at position `position + i`. In a verification step
    `input_ids = [last emitted token, draft 1 .. draft k]`, so row 0 judges draft 1 and row k gives the bonus token;
    rows past `accepted` lie on the rejected branch. In a prefill chunk k = 0 and `input_ids` are prompt tokens.
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
    hidden: np.ndarray  # [n, H] uint16 (bf16 bits): the target's last hidden state, input of its frozen head
    aux: np.ndarray  # [n, 3H] uint16 (bf16 bits): the tapped layers' states, concatenated
    drafter_version: int  # version that drafted input_ids[1:]: above 0 neural, below 0 draft model, TABLE_VERSION
    temperature: float
    top_p: float
    top_k: int  # 0: unlimited
    domain: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of array payload."""
        arrays = (self.input_ids, self.emitted_ids, self.draft_q, self.top_q_ids, self.top_q, self.hidden, self.aux)
        return sum(a.nbytes for a in arrays)

    @property
    def is_prefill(self) -> bool:
        return self.position + len(self.input_ids) - self.k <= self.prompt_tokens


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
    raise TypeError(f"a trace cannot carry a {type(value).__name__}")


def _decode_array(kind: type, value: Any) -> Any:
    if kind is not np.ndarray:
        raise TypeError(f"a trace cannot carry a {kind.__name__}")
    dtype, shape, data = value
    if np.dtype(dtype).hasobject:
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
