"""How workers share a batch: equal numbers of rollout starts, in the order of the windows; a window may be cut.

A share carries the rows that its rollouts read and no more, in every step anew: to pack and unpack them takes a
thousandth of the step (`scripts/trainer_scaling.py` says how much), so that workers which remember what they were sent
would save nothing. A cut window's later parts repeat its context rows, whose keys and values each worker then computes
for itself.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from trainer.rollout import MAX_CONTEXT
from trainer.sequence import Draft, Sequence, from_bf16, to_bf16

Windows = Seq[tuple[Sequence, range]]


class Place(NamedTuple):
    """Where a worker's rows belong in the whole batch."""

    windows: tuple[int, ...]  # of each sequence in the share
    of: int  # windows of the whole batch
    counts: bool  # False: the batch has fewer rows than workers, and this one only computes along

    @classmethod
    def whole(cls, windows: int) -> "Place":
        return cls(tuple(range(windows)), windows, counts=True)

    def spread(self, firsts: Seq[tuple[int, int]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Two numbers of each sequence of the share, by window of the whole batch."""
        found = [[0.0] * self.of, [0.0] * self.of]
        for window, values in zip(self.windows, firsts, strict=True):
            for column, value in zip(found, values, strict=True):
                column[window] += value
        return tuple(found[0]), tuple(found[1])


@dataclass(frozen=True, eq=False)
class Share:
    """One worker's part of a batch. All rows of its sequences up to the last start are context."""

    windows: list[tuple[Sequence, range]]
    place: Place

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as NumPy arrays: a tensor that is a view would take all of its storage along."""
        return _unpacked, ([(_packed(sequence), starts) for sequence, starts in self.windows], self.place)


def split(windows: Windows, workers: int, depths: int) -> list[Share]:
    """A share for each worker; with fewer starts than workers some repeat the last start, uncounted."""
    total = sum(len(starts) for _, starts in windows)
    edges = [worker * total // workers for worker in range(workers + 1)]
    return [_share(windows, a, b, depths) for a, b in pairwise(edges)]


def _share(windows: Windows, begin: int, end: int, depths: int) -> Share:
    """Starts `begin` .. `end - 1` of all windows' starts, counted through."""
    counts = begin < end
    if not counts:
        total = sum(len(starts) for _, starts in windows)
        begin, end = total - 1, total
    found, of, before = [], [], 0
    for place, (sequence, starts) in enumerate(windows):
        mine = starts[max(begin - before, 0) : max(end - before, 0)]
        before += len(starts)
        if mine:
            found.append(cut(sequence, mine, max(0, starts[0] - MAX_CONTEXT), depths))
            of.append(place)
    return Share(found, Place(tuple(of), len(windows), counts))


def cut(sequence: Sequence, starts: range, first: int, depths: int) -> tuple[Sequence, range]:
    """What rollouts of `depths` depths from `starts` read when context begins at row `first`: views, no copies."""
    end = min(starts[-1] + 1 + depths, len(sequence.hidden))
    drafts = tuple(replace(draft, start=draft.start - first) for draft in sequence.drafts if draft.start in starts)
    part = replace(
        sequence,
        position=sequence.position + first,
        ids=sequence.ids[first : end + 1],
        hidden=sequence.hidden[first:end],
        aux=sequence.aux[first : starts[-1] + 1],
        drafts=drafts,
    )
    return part, range(starts.start - first, starts.stop - first)


def _packed(sequence: Sequence) -> dict[str, Any]:
    """The fields of `sequence`, bf16 tensors as bit patterns."""
    drafts = tuple({**vars(draft), "hidden": from_bf16(draft.hidden)} for draft in sequence.drafts)
    return {**vars(sequence), "hidden": from_bf16(sequence.hidden), "aux": from_bf16(sequence.aux), "drafts": drafts}


def _unpacked(windows: list[tuple[dict[str, Any], range]], place: Place) -> Share:
    return Share([(_sequence(fields), starts) for fields, starts in windows], place)


def _sequence(fields: dict[str, Any]) -> Sequence:
    drafts = tuple(Draft(**{**draft, "hidden": to_bf16(draft["hidden"])}) for draft in fields["drafts"])
    tensors = {name: to_bf16(fields[name]) for name in ("hidden", "aux")}
    return Sequence(**{**fields, **tensors, "drafts": drafts, "ids": fields["ids"].copy()})
