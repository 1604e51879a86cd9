"""The text that n-gram drafts come from: each live request's own, and what earlier requests of its group were told.

A group is a tenant and a domain; what one group was told is never drafted for another. Only answers are shared, never
prompts. Memory is bounded: beyond `limit_bytes` the group that was used longest ago is forgotten.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drafters.ngram import ORDER, NgramTable, Proposal, Tokens, compile_kernels, propose

_GROUP_SLOTS = 1 << 20  # contexts of a group: about 200,000 tokens
_OWN_SLOTS = 1 << 16  # contexts of a request at most: about 13,000 tokens, 3 MiB
_NOTHING = NgramTable(0)
Group = tuple[str, str]  # (tenant, domain)


@dataclass
class _Request:
    group: Group
    text: Tokens  # room for all of it
    length: int
    prompt: int
    own: NgramTable

    @property
    def said(self) -> Tokens:
        return self.text[: self.length]


class ServedText:
    """Texts of live requests, and tables of what finished ones said."""

    def __init__(self, limit_bytes: int, group_slots: int = _GROUP_SLOTS) -> None:
        compile_kernels()
        self._limit = limit_bytes
        self._group_slots = group_slots
        self._shared: OrderedDict[Group, NgramTable] = OrderedDict()
        self._requests: dict[str, _Request] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def nbytes(self) -> int:
        """Size of the shared tables, once they are full."""
        return sum(table.nbytes for table in self._shared.values())

    def begin(self, request_id: str, group: Group, prompt: Sequence[int] | Tokens, room: int) -> None:
        """Follow a request whose answer has at most `room` tokens."""
        text = np.empty(len(prompt) + room, np.int32)
        text[: len(prompt)] = prompt
        own = NgramTable(min(2 * ORDER * len(text), _OWN_SLOTS))
        own.learn(text[: len(prompt)], 0)
        self._requests[request_id] = _Request(group, text, len(prompt), len(prompt), own)

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """The target said `tokens`; what exceeds the room is left out."""
        request = self._requests[request_id]
        begin, end = request.length, min(request.length + len(tokens), len(request.text))
        request.text[begin:end] = tokens[: end - begin]
        request.length = end
        request.own.learn(request.text[max(begin - ORDER, 0) : end], min(begin, ORDER))

    def propose(self, request_id: str, k: int) -> Proposal:
        """Up to `k` tokens that may follow."""
        request = self._requests[request_id]
        return propose(request.own, self._shared.get(request.group, _NOTHING), request.said, k)

    def finish(self, request_id: str) -> None:
        """The request is over: its answer may be drafted for others of its group."""
        request = self._requests.pop(request_id)
        table = self._shared.pop(request.group, None) or NgramTable(self._group_slots)
        self._shared[request.group] = table
        begin = max(request.prompt - ORDER, 0)
        table.learn(request.said[begin:], request.prompt - begin)
        while len(self._shared) > 1 and self.nbytes > self._limit:
            self._shared.popitem(last=False)
