"""The text that n-gram drafts come from: each live request's own, and what earlier requests of its group were told.

A group is a tenant and a domain; what one group was told is never drafted for another. Only answers are shared, never
prompts. Memory is bounded: beyond `limit_bytes` the group that was used longest ago is forgotten.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drafters.ngram import ORDER, NgramTable, Pool, Proposals, Tokens, Turn

_GROUP_SLOTS = 1 << 20  # contexts of a group: about 200,000 tokens
_OWN_SLOTS = 1 << 16  # contexts of a request at most: about 13,000 tokens, 3 MiB
Group = tuple[str, str]  # (tenant, domain)


@dataclass
class _Request:
    group: Group
    text: Tokens  # room for all of it
    length: int
    prompt: int
    own: NgramTable
    place: int  # of it in the pool
    learned: int = 0  # tokens that it knows

    @property
    def said(self) -> Tokens:
        return self.text[: self.length]


@dataclass
class _Shared:
    table: NgramTable
    place: int  # in the pool


class ServedText:
    """Texts of live requests, and tables of what finished ones said."""

    def __init__(self, limit_bytes: int, group_slots: int = _GROUP_SLOTS) -> None:
        self._pool = Pool()
        self._limit = limit_bytes
        self._group_slots = group_slots
        self._shared: OrderedDict[Group, _Shared] = OrderedDict()
        self._requests: dict[str, _Request] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def nbytes(self) -> int:
        """Size of the shared tables, once they are full."""
        return sum(shared.table.nbytes for shared in self._shared.values())

    def begin(self, request_id: str, group: Group, prompt: Sequence[int] | Tokens, room: int) -> None:
        """Follow a request whose answer has at most `room` tokens."""
        text = np.empty(len(prompt) + room, np.int32)
        text[: len(prompt)] = prompt
        own = NgramTable(min(2 * ORDER * len(text), _OWN_SLOTS))
        self._requests[request_id] = _Request(group, text, len(prompt), len(prompt), own, self._pool.put(own, text))

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """The target said `tokens`; what exceeds the room is left out."""
        request = self._requests[request_id]
        begin, end = request.length, min(request.length + len(tokens), len(request.text))
        request.text[begin:end] = tokens[: end - begin]
        request.length = end

    def propose(self, request_ids: Sequence[str], k: int) -> Proposals:
        """Up to `k` tokens that may follow in each request's text."""
        requests = [self._requests[request_id] for request_id in request_ids]
        places = {group: shared.place for group, shared in self._shared.items()}
        turns = [Turn(r.place, places.get(r.group, 0), r.learned, r.length) for r in requests]
        for request in requests:
            request.learned = request.length
        return self._pool.propose(turns, k)

    def finish(self, request_id: str) -> None:
        """The request is over: its answer may be drafted for others of its group."""
        request = self._requests.pop(request_id)
        self._pool.remove(request.place)
        shared = self._shared.pop(request.group, None) or self._new_shared()
        self._shared[request.group] = shared
        begin = max(request.prompt - ORDER, 0)
        shared.table.learn(request.said[begin:], request.prompt - begin)
        while len(self._shared) > 1 and self.nbytes > self._limit:
            _, oldest = self._shared.popitem(last=False)
            self._pool.remove(oldest.place)

    def _new_shared(self) -> _Shared:
        table = NgramTable(self._group_slots)
        return _Shared(table, self._pool.put(table))
