"""The replay: traces in, sequences to train on and to judge by out.

It consumes traces in the order in which each request made them. A trace that does not continue its request's sequence
(an earlier one was dropped on the way) ends that sequence and begins another at its own position, so rows are never
put together wrongly. Beyond its bound the oldest sequences leave and are counted. It is told what each pass over a
sequence showed and draws those more often that still teach. It has no clock, thread or lock.
"""

import hashlib
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from aurora.trace import TABLE_VERSION, DraftTrace
from trainer.sequence import OpenSequence, Sequence, check_trace

MIN_STARTS = 4  # a growing sequence is trained on from here
_NEW = 0.5  # share of draws from the sequences that were never trained on, while there are any
_FLOOR = 0.1  # weight of a sequence that has no more to teach
_MEMORY = 0.5  # of what earlier passes over a sequence showed


@dataclass(frozen=True)
class ReplayStats:
    """What the replay holds and what went wrong on the way in."""

    sequences: int
    held_out: int
    starts: int  # rows to train from
    mib: float
    evicted: int  # sequences that left for the bound
    gaps: int  # traces that did not continue their request
    duplicates: int
    domains: int


class Queue:
    """Sequences in order of arrival, bounded in bytes; the growing ones count with what they hold so far."""

    def __init__(self, limit_bytes: float) -> None:
        self.sequences: OrderedDict[int, OpenSequence] = OrderedDict()
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.evicted = 0

    def grow(self, key: int, sequence: OpenSequence, trace: DraftTrace) -> list[tuple[int, OpenSequence]]:
        """Append `trace` to `sequence`, which is put in as the newest if it is not here.

        Returns the sequences that had to leave, with their keys; the newest always stays.
        """
        if key not in self.sequences:
            self.sequences[key] = sequence
            self.nbytes += sequence.nbytes
        before = sequence.nbytes
        sequence.append(trace)
        self.nbytes += sequence.nbytes - before
        left = []
        while self.nbytes > self.limit_bytes and len(self.sequences) > 1:
            gone, oldest = self.sequences.popitem(last=False)
            self.nbytes -= oldest.nbytes
            left.append((gone, oldest))
        self.evicted += len(left)
        return left

    def usable(self) -> list[OpenSequence]:
        """Sequences that are long enough, oldest first."""
        return [s for s in self.sequences.values() if s.starts >= MIN_STARTS]


class Replay:
    """Sequences for training and, apart from them, held-out ones for the gate."""

    def __init__(self, hidden_size: int, vocab_size: int, limit_mib: float, holdout: float) -> None:
        self.hidden_size = hidden_size
        self.holdout = holdout
        self.emitted_counts = torch.zeros(vocab_size, dtype=torch.int64)  # [V]: how often each token was emitted
        self._train = Queue(limit_mib * 2**20 * (1 - holdout))
        self._held_out = Queue(limit_mib * 2**20 * holdout)
        self._open: dict[str, tuple[int, OpenSequence]] = {}
        # By request and position of the sequences to train on: share of wrong first drafts, None before the first pass.
        self._missed: dict[tuple[str, int], float | None] = {}
        self._key = 0
        self.received = 0  # rows of the target taken in so far
        self.newest_version = TABLE_VERSION  # of the drafters in the traces
        self._gaps = 0
        self._duplicates = 0

    def add(self, trace: DraftTrace) -> None:
        """Take one trace. Raises ValueError when it contradicts itself or the target."""
        check_trace(trace, self.hidden_size)
        self.newest_version = max(self.newest_version, trace.drafter_version)
        key, sequence = self._open.get(trace.request_id) or self._begin(trace)
        if sequence.rows and sequence.knows(trace):
            self._duplicates += 1
            return
        if sequence.rows and not sequence.continues(trace):
            self._gaps += 1
            key, sequence = self._begin(trace)
        queue = self._held_out if is_held_out(trace.request_id, self.holdout) else self._train
        before = sequence.starts
        for gone, old in queue.grow(key, sequence, trace):
            self._missed.pop((old.request_id, old.position), None)
            if old.request_id in self._open and self._open[old.request_id][0] == gone:
                del self._open[old.request_id]
        if queue is self._train:
            self._missed.setdefault((sequence.request_id, sequence.position), None)
            self.received += sequence.starts - before
            self._count(trace)

    def _begin(self, trace: DraftTrace) -> tuple[int, OpenSequence]:
        self._key += 1
        self._open[trace.request_id] = (self._key, OpenSequence.begin(trace))
        return self._open[trace.request_id]

    def _count(self, trace: DraftTrace) -> None:
        ids = torch.from_numpy(trace.emitted_ids.astype("int64"))
        self.emitted_counts.index_add_(0, ids, torch.ones_like(ids))

    def sample(self, starts: int, rng: random.Random) -> list[tuple[Sequence, range]]:
        """Sequences and the rows of each to start from, `starts` rows in all (fewer when there are not as many).

        A domain is drawn with the square root of its rows, which keeps small and past domains alive. Within it half of
        the draws go to sequences never trained on, the others to all of them in proportion to what they still teach:
        the share of first drafts that were wrong in their last passes. A long sequence gives a random window.
        """
        pools: dict[str, list[OpenSequence]] = {}
        for sequence in self._train.usable():
            pools.setdefault(sequence.domain, []).append(sequence)
        weights = {domain: sum(s.starts for s in pool) ** 0.5 for domain, pool in pools.items()}
        drawn: list[tuple[Sequence, range]] = []
        while starts > 0 and pools:
            domain = rng.choices(list(pools), [weights[d] for d in pools])[0]
            sequence = self._draw(pools[domain], rng)
            pools[domain].remove(sequence)
            if not pools[domain]:
                del pools[domain]
            drawn.append((sequence.snapshot(), _window(sequence, starts, rng)))
            starts -= len(drawn[-1][1])
        return drawn

    def _draw(self, pool: list[OpenSequence], rng: random.Random) -> OpenSequence:
        missed = [self._missed[s.request_id, s.position] for s in pool]
        new = [s for s, share in zip(pool, missed, strict=True) if share is None]
        if new and rng.random() < _NEW:
            return rng.choice(new)
        return rng.choices(pool, [1.0 if share is None else max(share, _FLOOR) for share in missed])[0]

    def learned(self, sequence: Sequence, missed: float) -> None:
        """A pass over `sequence` showed this share of wrong first drafts; one that has left is passed over."""
        name = sequence.request_id, sequence.position
        if name in self._missed:
            before = self._missed[name]
            self._missed[name] = missed if before is None else missed + _MEMORY * (before - missed)

    def held_out(self, count: int) -> list[Sequence]:
        """The newest `count` held-out sequences."""
        return [s.snapshot() for s in self._held_out.usable()[-count:]]

    @property
    def ready(self) -> bool:
        """Whether there is anything to train on."""
        return any(s.starts >= MIN_STARTS for s in self._train.sequences.values())

    def composition(self) -> dict[str, int]:
        """Rows to train from, by domain."""
        rows: Counter[str] = Counter()
        for sequence in self._train.sequences.values():
            rows[sequence.domain] += sequence.starts
        return dict(rows)

    def stats(self) -> ReplayStats:
        sequences = self._train.sequences.values()
        return ReplayStats(
            sequences=len(sequences),
            held_out=len(self._held_out.sequences),
            starts=sum(s.starts for s in sequences),
            mib=round((self._train.nbytes + self._held_out.nbytes) / 2**20, 3),
            evicted=self._train.evicted + self._held_out.evicted,
            gaps=self._gaps,
            duplicates=self._duplicates,
            domains=len(Counter(s.domain for s in sequences)),
        )


def is_held_out(request_id: str, share: float) -> bool:
    """Whether a request belongs to the gate: the same answer in every process and after every restart."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def staleness(drawn: Iterable[Sequence], newest: int) -> float | None:
    """Mean of the versions by which the neural drafts of sequences are behind `newest`; None without such drafts."""
    behind = [newest - d.version for sequence in drawn for d in sequence.drafts if d.version > TABLE_VERSION]
    return sum(behind) / len(behind) if behind else None


def _window(sequence: OpenSequence, starts: int, rng: random.Random) -> range:
    first, end = sequence.rows - 1 - sequence.starts, sequence.rows - 1
    begin = rng.randint(first, max(first, end - starts))
    return range(begin, min(end, begin + starts))
