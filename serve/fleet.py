"""The replicas behind one router: which are up, what they are doing, and which one answers the next request."""

import asyncio
import itertools
import json
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aurora.routing import POLICIES, Arrival, Candidate, EarliestFinish, FleetTimes, LengthPredictor, PrefixMap

CHARACTERS_PER_TOKEN = 4  # where nobody has counted tokens
_BLOCK = 512  # characters of a prompt that are looked up together
_CACHE_BLOCKS = 1 << 14
_LONGEST = 4096  # tokens of an answer without `max_tokens`, for all that is known
_KNOWN = 8  # requests of a domain after which a replica's drafters have seen it
_MAX_DOMAINS = 256
_REST_S = 1.0  # that a replica which took nothing more is left alone
_GAIN_MEMORY, _MOST_GAIN = 0.98, 2.0
_LEFTOVER = 0.1  # of an answer that is longer than expected is expected to follow


class NoReplica(Exception):
    """No replica is up."""


@dataclass(frozen=True)
class Ask:
    """What a request's body says of the work that it is."""

    label: str | None
    prompt_tokens: int
    longest: int
    blocks: tuple[int, ...]  # hashes of its prefixes

    @classmethod
    def of(cls, body: bytes) -> "Ask":
        """From the JSON of a completion or chat completion; what is no such thing counts as a short prompt."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            request = {}
        text = _text(request)
        limits = [request.get(name) for name in ("max_completion_tokens", "max_tokens")]
        longest = next((n for n in limits if isinstance(n, int) and n > 0), _LONGEST)
        tokens = len(text) // CHARACTERS_PER_TOKEN
        return cls(_label(request), tokens, longest, _blocks(text, str(request.get("cache_salt") or "")))


def _text(request: dict[str, Any]) -> str:
    """The prompt as text, or in a form of it that has equal prefixes where the prompt has."""
    messages, prompt = request.get("messages"), request.get("prompt")
    if isinstance(messages, list):
        return "".join(json.dumps(message, sort_keys=True) for message in messages)
    return prompt if isinstance(prompt, str) else json.dumps(prompt) if prompt is not None else ""


def _label(request: dict[str, Any]) -> str | None:
    for holder in (request.get("metadata"), request.get("vllm_xargs")):
        if isinstance(holder, dict) and isinstance(holder.get("domain"), str) and holder["domain"]:
            return str(holder["domain"])
    return None


def _blocks(text: str, salt: str) -> tuple[int, ...]:
    """Hashes of the prefixes of 1, 2, ... whole blocks."""
    data = text.encode(errors="surrogatepass")
    starts = range(0, len(data) - _BLOCK + 1, _BLOCK)
    hashes = itertools.accumulate(
        starts, lambda before, at: zlib.crc32(data[at : at + _BLOCK], before), initial=zlib.crc32(salt.encode())
    )
    return tuple(hash_ << 16 | i & 0xFFFF for i, hash_ in enumerate(itertools.islice(hashes, 1, None)))


@dataclass(eq=False)
class Work:
    """One request at one replica."""

    ask: Ask
    expected: float  # tokens of its answer
    new_tokens: int  # of its prompt
    began_s: float
    area_before: float
    known_domain: bool
    emitted: float = 0.0

    @property
    def remaining(self) -> float:
        return max(self.expected - self.emitted, _LEFTOVER * max(self.expected, self.emitted))


@dataclass(eq=False)
class Replica:
    """One server."""

    name: str
    url: str
    places: int  # requests that it takes
    up: bool = True
    draining: bool = False
    rests_until_s: float = -math.inf
    open: set[Work] = field(default_factory=set)
    domains: Counter[str] = field(default_factory=Counter)
    _area: float = 0.0  # integral of the number of open requests
    _at_s: float = 0.0

    def area(self, now_s: float) -> float:
        """Request seconds so far."""
        self._area += len(self.open) * (now_s - self._at_s)
        self._at_s = now_s
        return self._area

    def takes(self, now_s: float) -> bool:
        return self.up and not self.draining and len(self.open) < self.places and self.rests_until_s <= now_s


class Fleet:
    """All replicas. Not for threads: call from one event loop."""

    def __init__(self, policy: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = POLICIES[policy]()
        self._clock = clock
        self._replicas: dict[str, Replica] = {}
        self._lengths = LengthPredictor()
        self._times = FleetTimes()
        self._prefixes = PrefixMap(_BLOCK // CHARACTERS_PER_TOKEN, _CACHE_BLOCKS)
        self._residuals = {True: 0.0, False: 0.0}  # log of measured over predicted seconds, domain known or not
        self._room = asyncio.Condition()

    @property
    def replicas(self) -> list[Replica]:
        """By name."""
        return [self._replicas[name] for name in sorted(self._replicas)]

    @property
    def places(self) -> int:
        """Requests that all replicas take together, those that are down but expected back included."""
        return sum(replica.places for replica in self._replicas.values())

    @property
    def living(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.up]

    async def join(self, name: str, url: str, places: int) -> None:
        """A replica serves at `url`: a new one, or one that was restarted, whose caches are empty."""
        self._prefixes.forget(name)
        self._times.forget(name)
        self._replicas[name] = Replica(name, url, places, _at_s=self._clock())
        await self._changed()

    async def leave(self, name: str) -> None:
        """It is gone for good. Its open requests end by themselves."""
        self._replicas.pop(name, None)
        await self._changed()

    async def down(self, replica: Replica) -> None:
        """It does not answer."""
        replica.up = False
        self._prefixes.forget(replica.name)
        await self._changed()

    async def back(self, replica: Replica) -> None:
        """It answers again."""
        replica.up = True
        await self._changed()

    def rest(self, replica: Replica) -> None:
        """It takes nothing more at the moment."""
        replica.rests_until_s = self._clock() + _REST_S

    async def take(self, ask: Ask) -> tuple[Replica, Work]:
        """A place for a request at the replica of the policy's choice; waits for one.

        Raises NoReplica where none is up: then there is nothing to wait for.
        """
        async with self._room:
            while True:
                now_s = self._clock()
                if not self.living:
                    raise NoReplica
                able = [replica for replica in self.replicas if replica.takes(now_s)]
                if able:
                    return self._begin(able, ask, now_s)
                try:
                    async with asyncio.timeout(_REST_S / 4):
                        await self._room.wait()
                except TimeoutError:
                    continue

    def _begin(self, able: list[Replica], ask: Ask, now_s: float) -> tuple[Replica, Work]:
        expected = self._lengths.expected(ask.label, ask.prompt_tokens, ask.longest)
        if isinstance(self._policy, EarliestFinish):
            self._policy.domain_gain = self.domain_gain
        arrival = Arrival(ask.prompt_tokens, expected, self._times.prefill_tokens_per_s)
        candidates = [self._candidate(replica, ask) for replica in able]
        chosen = self._policy.choose(candidates, arrival)
        replica, seen = able[chosen], candidates[chosen]
        new = max(ask.prompt_tokens - seen.cached_tokens, 0)
        work = Work(ask, expected, new, now_s, replica.area(now_s), seen.has_domain)
        replica.open.add(work)
        self._prefixes.served(replica.name, ask.blocks)
        return replica, work

    def _candidate(self, replica: Replica, ask: Ask) -> Candidate:
        return Candidate(
            replica.name,
            len(replica.open),
            sum(work.remaining for work in replica.open),
            self._times.tokens_per_s(replica.name, len(replica.open) + 1),
            self._prefixes.cached(replica.name, ask.blocks),
            ask.label is not None and replica.domains[ask.label] >= _KNOWN,
        )

    @property
    def domain_gain(self) -> float:
        """How many times faster requests were where their domain was known."""
        return min(max(math.exp(self._residuals[False] - self._residuals[True]), 1.0), _MOST_GAIN)

    async def end(self, replica: Replica, work: Work, *, whole: bool) -> None:
        """A request has left its replica; `whole`: its answer was complete."""
        now_s = self._clock()
        area = replica.area(now_s)
        replica.open.discard(work)
        seconds = now_s - work.began_s
        if whole and work.emitted > 0 and seconds > 0:
            self._learn(replica, work, seconds, (area - work.area_before) / seconds - 1)
        await self._changed()

    def _learn(self, replica: Replica, work: Work, seconds: float, beside: float) -> None:
        beside, label = max(beside, 0.0), work.ask.label
        predicted = self._times.predicted_s(replica.name, work.new_tokens, work.emitted, beside)
        if predicted > 0 and label is not None:
            known = self._residuals[work.known_domain]
            self._residuals[work.known_domain] += (1 - _GAIN_MEMORY) * (math.log(seconds / predicted) - known)
        self._times.observe(replica.name, work.new_tokens, work.emitted, beside, seconds)
        self._lengths.observe(label, work.ask.prompt_tokens, round(work.emitted))
        if label is not None and (label in replica.domains or len(replica.domains) < _MAX_DOMAINS):
            replica.domains[label] += 1

    async def _changed(self) -> None:
        async with self._room:
            self._room.notify_all()
