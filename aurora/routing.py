"""Which replica answers a request: policies, and what they rest on. Pure: the live router and the simulator share it.

`earliest_finish` sends a request where its last token is expected first. A replica shares its speed among the requests
that are open, so that a request of r tokens among n others of R tokens together waits for r tokens of its own and for
at most r of each of theirs (processor sharing: Kleinrock 1967):

    finish = (prompt - cached) / prefill speed + (r + min(R, n r)) / (decode speed with one more * domain gain)
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

MAX_LABELS = 256  # kinds of requests that are told apart
_PRIOR = 4.0  # requests that a group's mean needs to count as much as what it is shrunk to
_PACE_PRIOR, _PACE_MEMORY = 16.0, 0.99  # requests that a pace of 1 counts for; of a finished request
AS_GOOD = 1.25  # times the earliest finish: no estimate is better than that
_MOST_OVER = 3.0  # logarithm of a ratio that is believed
_MEMORY = 0.98  # of a finished request, for each one that ends after it


@dataclass(frozen=True)
class Candidate:
    """What is known of one replica when a request arrives."""

    name: str
    open_requests: int
    waiting_tokens: float  # that its open requests are still expected to emit, all together
    tokens_per_s: float  # that it would emit over all its requests with this one more; 0: unknown
    cached_tokens: int = 0  # of this prompt, believed to be in its prefix cache
    has_domain: bool = False  # whether its drafters have seen this request's domain
    draining: bool = False


@dataclass(frozen=True)
class Arrival:
    """What is known of a request when it arrives."""

    prompt_tokens: int
    expected_tokens: float  # of its answer
    prefill_tokens_per_s: float = 0.0  # 0: unknown, or too fast to matter


class Policy(Protocol):
    """Picks a replica; may remember what it did."""

    def choose(self, candidates: Sequence[Candidate], arrival: Arrival) -> int:
        """Index of the chosen one. `candidates` holds at least one; one that drains is taken only if all do."""
        ...


class RoundRobin:
    """One after the other, whatever they do."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, candidates: Sequence[Candidate], _arrival: Arrival) -> int:
        living = _living(candidates)
        self._next += 1
        return living[(self._next - 1) % len(living)]


class LeastLoaded:
    """The one with the fewest open requests; of equals the one with the fewest tokens to emit."""

    def choose(self, candidates: Sequence[Candidate], _arrival: Arrival) -> int:
        return min(_living(candidates), key=lambda i: (candidates[i].open_requests, candidates[i].waiting_tokens, i))


class EarliestFinish:
    """The one whose last token is expected first; of those that are about as good the one with the fewest requests.

    Speeds are estimates: to follow every small difference of theirs would crowd one replica after the other.
    """

    def __init__(self, domain_gain: float = 1.0) -> None:
        """domain_gain: how much faster a replica emits whose drafters know the domain (>= 1)."""
        self.domain_gain = domain_gain

    def choose(self, candidates: Sequence[Candidate], arrival: Arrival) -> int:
        known = [c.tokens_per_s for c in candidates if c.tokens_per_s > 0]
        if not known:
            return LeastLoaded().choose(candidates, arrival)
        usual = sum(known) / len(known)
        finish = {i: self.finish_s(candidates[i], arrival, usual) for i in _living(candidates)}
        good = [i for i, seconds in finish.items() if seconds <= AS_GOOD * min(finish.values())]
        return min(good, key=lambda i: (candidates[i].open_requests, finish[i], i))

    def finish_s(self, candidate: Candidate, arrival: Arrival, usual_tokens_per_s: float) -> float:
        """Seconds until the answer is complete; `usual_tokens_per_s` stands in for an unknown speed."""
        mine = arrival.expected_tokens
        ahead = min(candidate.waiting_tokens, candidate.open_requests * mine)
        speed = candidate.tokens_per_s or usual_tokens_per_s
        if candidate.has_domain:
            speed *= self.domain_gain
        new = max(arrival.prompt_tokens - candidate.cached_tokens, 0)
        prefill_s = new / arrival.prefill_tokens_per_s if arrival.prefill_tokens_per_s else 0.0
        return prefill_s + (mine + ahead) / speed


POLICIES: Mapping[str, type[RoundRobin | LeastLoaded | EarliestFinish]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "earliest_finish": EarliestFinish,
}


def _living(candidates: Sequence[Candidate]) -> list[int]:
    return [i for i, c in enumerate(candidates) if not c.draining] or list(range(len(candidates)))


class LengthPredictor:
    """Expected length of an answer: the mean of its label and prompt size, shrunk to its label's, shrunk to all.

    Means forget: a finished request weighs `_MEMORY` less with each that ends after it in the same group.
    """

    def __init__(self, usual: float = 128.0) -> None:
        """usual: tokens expected before any request has ended."""
        self._usual = usual
        self._groups: OrderedDict[tuple[str | None, int | None], tuple[float, float]] = OrderedDict()  # weight, tokens

    def observe(self, label: str | None, prompt_tokens: int, emitted: int) -> None:
        """An answer of `emitted` tokens is complete."""
        for group in self._path(label, prompt_tokens):
            weight, tokens = self._groups.pop(group, (0.0, 0.0))
            self._groups[group] = (weight * _MEMORY + 1.0, tokens * _MEMORY + emitted)
        while len(self._groups) > MAX_LABELS:
            self._groups.popitem(last=False)

    def expected(self, label: str | None, prompt_tokens: int, cap: int) -> float:
        """Tokens of an answer that has at most `cap` (>= 1)."""
        mean = self._usual
        for group in self._path(label, prompt_tokens):
            weight, tokens = self._groups.get(group, (0.0, 0.0))
            mean = (tokens + _PRIOR * mean) / (weight + _PRIOR)
        return min(max(mean, 1.0), cap)

    @staticmethod
    def _path(label: str | None, prompt_tokens: int) -> tuple[tuple[str | None, int | None], ...]:
        everything, labelled = (None, None), (label, None)
        sized = (label, prompt_tokens.bit_length())
        return (everything, labelled, sized) if label is not None else (everything, sized)


class PrefixMap:
    """What each replica is believed to have in its prefix cache: the blocks that it served last.

    A block's hash covers everything before it, too, so that equal hashes mean equal prefixes.
    """

    def __init__(self, block_tokens: int, capacity_blocks: int) -> None:
        """capacity_blocks: blocks that a replica's cache keeps; the one used longest ago leaves first."""
        self._block_tokens = block_tokens
        self._capacity = capacity_blocks
        self._blocks: dict[str, OrderedDict[int, None]] = {}

    def cached(self, name: str, blocks: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that replica `name` need not read again."""
        held = self._blocks.get(name, OrderedDict())
        missing = next((i for i, block in enumerate(blocks) if block not in held), len(blocks))
        return missing * self._block_tokens

    def served(self, name: str, blocks: Sequence[int]) -> None:
        """Replica `name` was sent a prompt of these blocks."""
        held = self._blocks.setdefault(name, OrderedDict())
        for block in reversed(blocks):  # a prefix outlives what follows it
            held.pop(block, None)
            held[block] = None
        while len(held) > self._capacity:
            held.popitem(last=False)

    def forget(self, name: str) -> None:
        """Its cache is gone."""
        self._blocks.pop(name, None)


class RequestTimes:
    """How long a replica takes, learned from finished requests by least squares that forget, coefficients >= 0:

    seconds = new prompt tokens * p + emitted tokens * (a + b * requests that were open beside it)
    """

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._targets = np.zeros(3)
        self._fit: npt.NDArray[np.float64] = np.zeros(3)

    def observe(self, new_prompt_tokens: float, emitted: float, beside: float, seconds: float) -> None:
        """A request took `seconds`, with `beside` others open on average. What counts is the relative error."""
        from scipy.optimize import nnls

        row = np.array([new_prompt_tokens, emitted, emitted * beside]) / max(seconds, 1e-6)
        self._products = _MEMORY * self._products + np.outer(row, row)
        self._targets = _MEMORY * self._targets + row
        scale = np.sqrt(np.maximum(self._products.diagonal(), 1e-12))
        normal = self._products / np.outer(scale, scale) + 1e-6 * np.eye(3)
        root = np.linalg.cholesky(normal)
        self._fit = nnls(root.T, np.linalg.solve(root, self._targets / scale))[0] / scale

    def tokens_per_s(self, open_requests: int) -> float:
        """Tokens a second over all requests with `open_requests` (>= 1) open; 0 while unknown."""
        _, alone, each = self._fit
        seconds = alone + each * (open_requests - 1)
        return open_requests / float(seconds) if seconds > 0 else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second; 0 while unknown or too fast to tell."""
        return 1 / float(self._fit[0]) if self._fit[0] > 0 else 0.0

    def predicted_s(self, new_prompt_tokens: float, emitted: float, beside: float) -> float:
        """Seconds that a request was to take; 0 while unknown."""
        return float(self._fit @ np.array([new_prompt_tokens, emitted, emitted * beside]))


class FleetTimes:
    """How long replicas take: what all of them have in common (`RequestTimes`), and each one's pace beside it.

    One replica alone ends too few requests, and too few different ones, to tell what an open request more costs: fits
    of its own differ by chance, and the replica that seems fast is sent everything.
    """

    def __init__(self) -> None:
        self.common = RequestTimes()
        self._paces: dict[str, tuple[float, float]] = {}  # weight, sum of log(seconds / predicted)

    def observe(self, name: str, new_prompt_tokens: float, emitted: float, beside: float, seconds: float) -> None:
        """A request took replica `name` so long (`RequestTimes.observe`)."""
        predicted = self.common.predicted_s(new_prompt_tokens, emitted, beside)
        if predicted > 0:
            weight, total = self._paces.get(name, (0.0, 0.0))
            over = min(max(math.log(max(seconds, 1e-6) / predicted), -_MOST_OVER), _MOST_OVER)
            self._paces[name] = weight * _PACE_MEMORY + 1, total * _PACE_MEMORY + over
        self.common.observe(new_prompt_tokens, emitted, beside, seconds)

    def pace(self, name: str) -> float:
        """Seconds that it takes for each one that replicas take usually."""
        weight, total = self._paces.get(name, (0.0, 0.0))
        return math.exp(total / (weight + _PACE_PRIOR))

    def tokens_per_s(self, name: str, open_requests: int) -> float:
        """Tokens a second over all of its requests with `open_requests` (>= 1) open; 0 while unknown."""
        return self.common.tokens_per_s(open_requests) / self.pace(name)

    def predicted_s(self, name: str, new_prompt_tokens: float, emitted: float, beside: float) -> float:
        """Seconds that a request was to take at replica `name`; 0 while unknown."""
        return self.common.predicted_s(new_prompt_tokens, emitted, beside) * self.pace(name)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second of a usual replica; 0 while unknown or too fast to tell."""
        return self.common.prefill_tokens_per_s

    def forget(self, name: str) -> None:
        """It is another one now."""
        self._paces.pop(name, None)
