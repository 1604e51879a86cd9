"""Drafting from what was said before: votes for the token after each n-gram, in tables of fixed size.

A request drafts from its own table (prompt and output) and from one that earlier requests filled. The longest context
that either of them knows decides; its votes, newer ones weighing more, name the next token, and so on for each further
draft. A table is a hash table whose buckets forget the context that was seen longest ago: it never grows and ages by
itself. The inner loops are compiled by numba; `Pool` drafts for all requests of a step in one call. (n-gram drafting:
Saxena 2023, prompt lookup; over served traffic: Oliaro et al. 2024, SuffixDecoding.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit
from numba.typed import List

Tokens = npt.NDArray[np.int32]
Votes = npt.NDArray[np.float32]

ORDER = 5  # longest context, in tokens
_WAYS = 4  # candidates for the next token that a context keeps
_PROBES = 4  # slots of a bucket
_DECAY = np.float32(0.8)  # of a context's older votes at each new one
_NONE = np.int64(-1)


class Slots(NamedTuple):
    """The arrays of a table of S slots."""

    keys: npt.NDArray[np.uint64]  # [S] hash of the context; 0: empty
    stamps: npt.NDArray[np.uint32]  # [S] clock at the last vote
    tokens: Tokens  # [S, _WAYS] candidates
    votes: Votes  # [S, _WAYS]; 0: no candidate


class NgramTable:
    """Votes for the token after each context of 1 to `ORDER` tokens; 44 bytes a slot."""

    def __init__(self, slots: int) -> None:
        """slots: contexts that it can hold, rounded up to a power of two; a token learned takes up to `ORDER`."""
        size = 1 << max(slots - 1, _PROBES).bit_length()
        ways = (size, _WAYS)
        self.slots = Slots(  # zeros cost no memory until they are written
            np.zeros(size, np.uint64), np.zeros(size, np.uint32), np.zeros(ways, np.int32), np.zeros(ways, np.float32)
        )
        self._clock = 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.slots)

    def learn(self, text: Tokens, begin: int) -> None:
        """Count that each token of text[begin:] followed the contexts before it; earlier tokens are context only."""
        _learn(self.slots, text, begin, self._clock)
        self._clock += len(text) - begin


class Basis(NamedTuple):
    """What each drafted token rests on; arrays of [requests, k], meaningless where there is no draft."""

    orders: npt.NDArray[np.int64]  # length of the context that decided
    shares: Votes  # the token's part of that context's votes
    votes: Votes  # all votes of that context


@dataclass(frozen=True)
class Proposals:
    """Drafted tokens of some requests; each may have fewer than were asked for."""

    tokens: list[list[int]]
    basis: Basis


class Turn(NamedTuple):
    """What to draft from for one request: places in a pool, and how much of the text there is."""

    own: int  # of its own table and text
    shared: int  # of the table of earlier requests; 0: none
    learned: int  # tokens of the text that its own table knows
    length: int  # tokens of the text


class Pool:
    """Tables in numbered places, each with the text that it learns, if any."""

    def __init__(self) -> None:
        """Compiles the inner loops, if need be: seconds, once per machine, which no request should wait for."""
        self._tables, self._texts = _new_lists(NgramTable(0).slots, np.zeros(0, np.int32))
        self._free: list[int] = []
        place = self.put(NgramTable(0), np.zeros(2, np.int32))
        self.propose([Turn(place, 0, 0, 2)], 1)
        self.remove(place)

    def put(self, table: NgramTable, text: Tokens | None = None) -> int:
        """Place of a new table. text: room for all of its text, filled as it grows."""
        place = self._free.pop() if self._free else len(self._tables)
        _put(self._tables, self._texts, place, table.slots, np.zeros(0, np.int32) if text is None else text)
        return place

    def remove(self, place: int) -> None:
        """Free a place."""
        _put(self._tables, self._texts, place, NgramTable(0).slots, np.zeros(0, np.int32))
        self._free.append(place)

    def propose(self, turns: Sequence[Turn], k: int) -> Proposals:
        """Learn what is new in each text and draft up to `k` tokens after it; fewer where nothing is known."""
        shape = (len(turns), k)
        tokens = np.zeros(shape, np.int32)
        basis = Basis(np.ones(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
        given = np.array(turns, np.int64).reshape(len(turns), len(Turn._fields))
        counts = _propose_each(self._tables, self._texts, given, tokens, basis).tolist()
        return Proposals([row[:n] for row, n in zip(tokens.tolist(), counts, strict=True)], basis)


@njit(cache=True)
def _extended(key: np.uint64, token: np.int32) -> np.uint64:
    """The key of a context with one more token in front (splitmix64's finaliser, Steele et al. 2014)."""
    key = key ^ (np.uint64(token) + np.uint64(0x9E3779B97F4A7C15))
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


@njit(cache=True)
def _find(slots: Slots, key: np.uint64) -> np.int64:
    """Slot of `key`, or -1."""
    mask = np.uint64(len(slots.keys) - 1)
    for probe in range(_PROBES):
        slot = np.int64((key + np.uint64(probe)) & mask)
        if slots.keys[slot] == key:
            return slot
    return _NONE


@njit(cache=True)
def _claim(slots: Slots, key: np.uint64) -> np.int64:
    """Slot of `key`; a new one takes the first empty, else the oldest slot of its bucket."""
    mask = np.uint64(len(slots.keys) - 1)
    chosen = _NONE
    for probe in range(_PROBES):
        slot = np.int64((key + np.uint64(probe)) & mask)
        if slots.keys[slot] == key:
            return slot
        if slots.keys[slot] == 0:
            chosen = slot
            break
        if chosen == _NONE or slots.stamps[slot] < slots.stamps[chosen]:
            chosen = slot
    slots.keys[chosen] = key
    slots.votes[chosen] = 0.0
    return chosen


@njit(cache=True)
def _vote(tokens: Tokens, votes: Votes, token: np.int32) -> None:
    """Add a vote for `token` to one slot ([_WAYS] each); the weakest candidate makes room."""
    way, weakest = _NONE, np.int64(0)
    for w in range(_WAYS):
        votes[w] *= _DECAY
        if votes[w] > 0 and tokens[w] == token:
            way = np.int64(w)
        if votes[w] < votes[weakest]:
            weakest = np.int64(w)
    if way == _NONE:
        way = weakest
        tokens[way] = token
        votes[way] = 0.0
    votes[way] += np.float32(1.0)


@njit(cache=True)
def _learn(slots: Slots, text: Tokens, begin: int, clock: int) -> None:
    for i in range(begin, len(text)):
        key = np.uint64(0)
        for order in range(1, min(ORDER, i) + 1):
            key = _extended(key, text[i - order])
            slot = _claim(slots, key)
            slots.stamps[slot] = clock + i - begin
            _vote(slots.tokens[slot], slots.votes[slot], text[i])


@njit(cache=True)
def _new_lists(slots: Slots, text: Tokens) -> tuple[Any, Any]:
    """Numba's lists of tables and of texts; place 0 holds an empty one for good."""
    tables, texts = List(), List()
    tables.append(slots)
    texts.append(text)
    return tables, texts


@njit(cache=True)
def _put(tables: Any, texts: Any, place: int, slots: Slots, text: Tokens) -> None:
    if place == len(tables):
        tables.append(slots)
        texts.append(text)
    else:
        tables[place] = slots
        texts[place] = text


@njit(cache=True)
def _propose_each(
    tables: Any, texts: Any, turns: npt.NDArray[np.int64], tokens: Tokens, basis: Basis
) -> npt.NDArray[np.int64]:
    """`Pool.propose`: turns [n, Turn], tokens and basis [n, k] to fill; returns how many drafts each has, [n]."""
    counts, k = np.zeros(len(turns), np.int64), tokens.shape[1]
    for i in range(len(turns)):
        own, shared, learned, length = turns[i]
        text = texts[own][:length]
        _learn(tables[own], text, learned, learned)
        begin = min(length, ORDER)
        tail = np.empty(begin + k, np.int32)
        tail[:begin] = text[length - begin :]
        row = Basis(basis.orders[i], basis.shares[i], basis.votes[i])
        counts[i] = _propose(tables[own], tables[shared], tail, begin, row)
        tokens[i, : counts[i]] = tail[begin : begin + counts[i]]
    return counts


@njit(cache=True)
def _propose(own: Slots, shared: Slots, tail: Tokens, begin: int, basis: Basis) -> int:
    """Fill tail[begin:] with drafts; returns how many there are."""
    chain = np.empty(ORDER, np.uint64)
    for end in range(begin, len(tail)):
        d = end - begin
        key = np.uint64(0)
        longest = min(ORDER, end)
        for order in range(1, longest + 1):
            key = _extended(key, tail[end - order])
            chain[order - 1] = key
        basis.orders[d] = 0
        for order in range(longest, 0, -1):
            a, b = _find(own, chain[order - 1]), _find(shared, chain[order - 1])
            if a != _NONE or b != _NONE:
                tail[end], most, total = _poll(own, a, shared, b)
                basis.orders[d], basis.shares[d], basis.votes[d] = order, most / total, total
                break
        if basis.orders[d] == 0:
            return d
    return len(tail) - begin


@njit(cache=True)
def _poll(own: Slots, a: np.int64, shared: Slots, b: np.int64) -> tuple[np.int32, np.float32, np.float32]:
    """(winner, its votes, all votes) of slot `a` of one table and slot `b` of the other together; -1: none there."""
    tokens, votes = np.zeros(2 * _WAYS, np.int32), np.zeros(2 * _WAYS, np.float32)
    if a != _NONE:
        tokens[:_WAYS], votes[:_WAYS] = own.tokens[a], own.votes[a]
    if b != _NONE:
        tokens[_WAYS:], votes[_WAYS:] = shared.tokens[b], shared.votes[b]
    best, most = 0, np.float32(-1.0)
    for w in range(2 * _WAYS):
        both = votes[w]
        for v in range(_WAYS, 2 * _WAYS):
            if w < _WAYS and tokens[v] == tokens[w]:
                both += votes[v]
        if both > most:
            best, most = w, both
    return tokens[best], most, votes.sum()
