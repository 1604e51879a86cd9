"""One request as the trainer sees it, put together from its traces.

Row t of a sequence is the target's state after reading `ids[t]` at position `position + t`. Drafting starts at row t
with `ids[t + 1]` as the newest token; depth j predicts `ids[t + 2 + j]`, which the target judges with row t + 1 + j. A
verification trace whose row 0 is row r of the sequence was therefore drafted from row r - 1, and its row j judges depth
j.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from aurora.trace import DraftTrace


@dataclass(frozen=True, eq=False)
class Draft:
    """A draft that the target verified and left after `accepted` tokens, with what it would have said further on."""

    start: int  # row of the sequence from which it was drafted
    accepted: int
    path: np.ndarray  # [k] int64: the drafted tokens; token j - 1 is read at depth j and chosen at depth j - 1
    q: np.ndarray  # [k] float32: probability with which each was drafted; 1 for greedy drafting
    temperature: float  # of the drafter when it drew them
    hidden: Tensor  # [k - accepted or 0, H] bf16: states that judge depths accepted + 1 .. k; 0 rows: not known
    version: int  # drafter that drew it, or `aurora.trace.TABLE_VERSION`


@dataclass(frozen=True, eq=False)
class Sequence:
    """T contiguous rows of one request; they may begin after the prompt's start and end before the request does."""

    request_id: str
    domain: str
    position: int  # of row 0
    prompt_tokens: int
    ids: np.ndarray  # [T] or, when the token after the last row is known, [T + 1]; int64
    hidden: Tensor  # [T, H] bf16: the target's last hidden state
    aux: Tensor  # [T, 3H] bf16: the tapped layers
    drafts: tuple[Draft, ...]

    @property
    def first_start(self) -> int:
        """First row whose next token the target generated."""
        return first_start(self.position, self.prompt_tokens)

    @property
    def end_start(self) -> int:
        """One past the last row that a following row judges."""
        return len(self.hidden) - 1


def first_start(position: int, prompt_tokens: int) -> int:
    """Row of the last prompt token in a sequence that begins at `position`, or 0 when it begins later."""
    return max(prompt_tokens - 1 - position, 0)


@dataclass(eq=False)
class OpenSequence:
    """A sequence that still grows. `append` takes the request's traces in order and says whether they continue it."""

    request_id: str
    domain: str
    position: int
    prompt_tokens: int
    rows: int = 0
    nbytes: int = 0
    _ids: list[np.ndarray] = field(default_factory=list)
    _hidden: list[np.ndarray] = field(default_factory=list)
    _aux: list[np.ndarray] = field(default_factory=list)
    _drafts: list[Draft] = field(default_factory=list)
    _next: int | None = None  # token after the last row

    @classmethod
    def begin(cls, trace: DraftTrace) -> "OpenSequence":
        return cls(trace.request_id, trace.domain, trace.position, trace.prompt_tokens)

    @property
    def starts(self) -> int:
        """Rows that can be trained from."""
        return max(self.rows - 1 - first_start(self.position, self.prompt_tokens), 0)

    def knows(self, trace: DraftTrace) -> bool:
        """Whether all accepted rows of `trace` are here already: a duplicate, or a preempted request computed again."""
        return trace.position + accepted_rows(trace) <= self.position + self.rows

    def continues(self, trace: DraftTrace) -> bool:
        """Whether `trace` begins where this sequence ends, with the token that was emitted there."""
        follows = trace.position == self.position + self.rows
        return follows and (self._next is None or self._next == int(trace.input_ids[0]))

    def append(self, trace: DraftTrace) -> None:
        """Add the accepted rows, and what was drafted. The trace must continue this sequence."""
        assert self.rows == 0 or self.continues(trace)
        count = accepted_rows(trace)
        if trace.k:
            self._add_draft(trace)
        self._ids.append(trace.input_ids[:count].astype(np.int64))
        self._hidden.append(trace.hidden[:count].copy())
        self._aux.append(trace.aux[:count].copy())
        self._next = int(trace.emitted_ids[-1]) if len(trace.emitted_ids) else None
        self.rows += count
        self.nbytes += 8 * count + trace.hidden[:count].nbytes + trace.aux[:count].nbytes

    def _add_draft(self, trace: DraftTrace) -> None:
        start = self.rows + len(trace.input_ids) - trace.k - 2
        if start < 0:
            return
        judges = to_bf16(trace.hidden[accepted_rows(trace) :])
        path = trace.input_ids[-trace.k :].astype(np.int64)
        greedy = trace.temperature == 0  # then the likeliest token was drafted, whatever its probability was
        q = np.ones(trace.k, np.float32) if greedy else trace.draft_q.copy()
        temperature = 1.0 if greedy else trace.temperature
        self._drafts.append(Draft(start, trace.accepted, path, q, temperature, judges, trace.drafter_version))
        self.nbytes += judges.nbytes + path.nbytes + q.nbytes

    def snapshot(self) -> Sequence:
        """The sequence as it stands, immutable. Its arrays stay valid when this one grows."""
        for parts in (self._ids, self._hidden, self._aux):
            parts[:] = [np.concatenate(parts)] if len(parts) > 1 else parts
        known = [np.array([self._next], dtype=np.int64)] if self._next is not None else []
        return Sequence(
            self.request_id,
            self.domain,
            self.position,
            self.prompt_tokens,
            np.concatenate([*self._ids, *known]),
            _view_bf16(self._hidden[0]),
            _view_bf16(self._aux[0]),
            tuple(self._drafts),
        )


def accepted_rows(trace: DraftTrace) -> int:
    """Leading rows of a trace that belong to the request's true sequence."""
    return len(trace.input_ids) - trace.k + trace.accepted


def check_trace(trace: DraftTrace, hidden_size: int) -> None:
    """Raise ValueError naming the field of a trace that contradicts the others or the target's hidden size."""
    n = len(trace.input_ids)
    rows = len(trace.hidden)
    rules: dict[str, Callable[[], bool]] = {
        "k": lambda: 0 <= trace.accepted <= trace.k < n or (n > 0 and trace.k == trace.accepted == 0),
        "draft_q": lambda: trace.draft_q.shape == (trace.k,),
        "hidden": lambda: (
            rows in (n, accepted_rows(trace))
            and trace.hidden.shape == (rows, hidden_size)
            and trace.hidden.dtype == np.uint16
        ),
        "aux": lambda: trace.aux.shape == (rows, 3 * hidden_size) and trace.aux.dtype == np.uint16,
        "emitted_ids": lambda: len(trace.emitted_ids) in {0, trace.accepted + 1},
        "position": lambda: trace.position >= 0,
    }
    for name, holds in rules.items():
        if not holds():
            where = f"trace of {trace.request_id} at position {trace.position}"
            raise ValueError(f"{where}: {name} contradicts its {n} rows or the target's hidden size {hidden_size}")


def to_bf16(bits: np.ndarray) -> Tensor:
    """A bfloat16 tensor with a copy of bf16 bit patterns (uint16)."""
    return _view_bf16(bits.copy())


def from_bf16(rows: Tensor) -> np.ndarray:
    """The bit patterns (uint16) of a bfloat16 tensor."""
    return rows.contiguous().view(torch.uint16).numpy()


def _view_bf16(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)
