"""Several replicas in simulated time behind a router that knows of them what a live one knows (`aurora.routing`).

Each replica batches by itself (`aurora.batching`); requests come in one stream and are routed when they come. How long
answers get is predicted from those that have ended, how fast replicas are is learned from them, prefix caches hold the
blocks that were sent last. The router's one lead over a live one: of the step under way it knows the tokens already.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aurora.arrivals import ArrivalTrace
from aurora.batching import NOBODY, WAITING, Engine, Load, State, Until
from aurora.replica_states import advance_all, give, new_fleet
from aurora.routing import Arrival, Candidate, FleetTimes, LengthPredictor, Policy, PrefixMap
from aurora.speculation_rules import Rule

_LONGEST = 1 << 20  # tokens that an answer is expected to have at most
_REPORT_EVERY = 2000  # requests between two looks at the progress
_STEPS = 20_000  # of each replica, between two looks at the end


class Known(NamedTuple):
    """What is known of requests beyond their lengths; empty: nothing."""

    labels: Sequence[str | None] = ()
    blocks: Sequence[Sequence[int]] = ()  # hashes of each prompt's blocks, each of all that is before it, too
    block_tokens: int = 1

    @classmethod
    def of(cls, trace: ArrivalTrace, prefix_cache: bool = True) -> "Known":
        """What the trace says; prefix_cache: whether replicas keep prompts."""
        return cls(trace.labels, trace.blocks if prefix_cache else (), trace.block_tokens)


class Router:
    """Sends each request to a replica when it comes, and learns from those that end."""

    def __init__(self, policy: Policy, replicas: int, load: Load, known: Known, kv_tokens: int) -> None:
        """kv_tokens: that each replica's cache holds."""
        self._policy, self._load, self._known = policy, load, known
        self._names = [str(i) for i in range(replicas)]
        self._lengths = LengthPredictor()
        self._times = FleetTimes()
        self._prefixes = PrefixMap(known.block_tokens, max(kv_tokens // known.block_tokens, 1))
        self._open = [0] * replicas
        self._open_s = [0.0] * replicas  # sum of open requests over time, until `_since`
        self._since = [0.0] * replicas
        self._read = 0  # places of `State.ended` that were looked at
        self._ending: list[tuple[float, int]] = []  # (time, request) of ends that lie ahead: of steps under way
        self.replica = np.full(len(load.arrival), NOBODY)
        self._came_at = np.zeros(len(load.arrival))  # `_open_s` of its replica when the request came

    def hear(self, now: float, fleet: State) -> None:
        """Learn of the requests that have ended by `now`."""
        for request in fleet.ended[self._read : fleet.ended[-1]].tolist():
            heapq.heappush(self._ending, (float(fleet.finish[request]), request))
        self._read = int(fleet.ended[-1])
        while self._ending and self._ending[0][0] <= now:
            self._learn(*heapq.heappop(self._ending), fleet)

    def route(self, request: int, fleet: State) -> tuple[int, float, int]:
        """Replica, expected tokens of the answer, tokens of its prompt in the prefix cache."""
        now, prompt = float(self._load.arrival[request]), int(self._load.prompt[request])
        self.hear(now, fleet)
        expected = self._lengths.expected(self._label(request), prompt, _LONGEST)
        cached = [self._cached(name, request, prompt) for name in self._names]
        candidates = [
            Candidate(name, count, tokens, self._times.tokens_per_s(name, count + 1), found)
            for name, count, tokens, found in zip(
                self._names, self._open, fleet.clock[:, WAITING].tolist(), cached, strict=True
            )
        ]
        chosen = self._policy.choose(candidates, Arrival(prompt, expected, self._times.prefill_tokens_per_s))
        if self._known.blocks:
            self._prefixes.served(self._names[chosen], self._known.blocks[request])
        self._count(chosen, now, 1)
        self.replica[request], self._came_at[request] = chosen, self._open_s[chosen]
        return chosen, expected, cached[chosen]

    def _learn(self, finish: float, request: int, fleet: State) -> None:
        replica = int(self.replica[request])
        self._count(replica, finish, -1)
        prompt, said = int(self._load.prompt[request]), int(self._load.output[request])
        self._lengths.observe(self._label(request), prompt, said)
        seconds = finish - float(self._load.arrival[request])
        beside = (self._open_s[replica] - self._came_at[request]) / seconds - 1
        new = prompt - int(fleet.cached[request])
        self._times.observe(self._names[replica], new, said, max(beside, 0.0), seconds)

    def _count(self, replica: int, now: float, more: int) -> None:
        self._open_s[replica] += self._open[replica] * (now - self._since[replica])
        self._open[replica] += more
        self._since[replica] = now

    def _label(self, request: int) -> str | None:
        return self._known.labels[request] if self._known.labels else None

    def _cached(self, name: str, request: int, prompt: int) -> int:
        """Tokens of the prompt that the replica has: not the last one, whose logits are wanted."""
        if not self._known.blocks:
            return 0
        return min(self._prefixes.cached(name, self._known.blocks[request]), prompt - 1)


def simulate_fleet(load: Load, engine: Engine, rules: Rule, policy: Policy, known: Known) -> Iterator[State]:
    """Serve the load; yields the state now and then, and at the end. rules: `same_rules` of each replica."""
    replicas = len(rules.costs)
    fleet = new_fleet(len(load.arrival), replicas, engine.max_seqs, rules.k_max)
    router = Router(policy, replicas, load, known, engine.kv_tokens)
    for request, now in enumerate(load.arrival.tolist()):
        advance_all(fleet, load, engine, rules, Until(1 << 62, now))
        give(fleet, request, *router.route(request, fleet))
        if request % _REPORT_EVERY == 0:
            yield fleet
    while fleet.ended[-1] < len(load.arrival):
        advance_all(fleet, load, engine, rules, Until(_STEPS, np.inf))
        yield fleet
