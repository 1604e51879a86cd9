"""The hours of several replicas as one: what the page behind a router shows.

Counts add up and ratios are those of the sums, so that a replica which did more weighs more; what cannot be added
(who drafts with which version) is said replica by replica.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from aurora.metrics import EngineReport, speed_up
from serve.history import COUNTS, GAUGES, SWAPS, Hour, Point, Swap, Version, most_drafted

SPAN_S = 10.0  # of a merged point: each busy replica tells at least once
_LATE_S = 2.0  # that a replica's clock may be behind
_STATE = tuple(name.removeprefix("aurora_") for name in (*GAUGES, *COUNTS))
_ADDED = frozenset(name.removeprefix("aurora_") for name in (*COUNTS, "aurora_traces_waiting"))
_WORST_IS_LOW = frozenset({"trainer_alive"})


def span_start(time_s: float) -> float:
    """From where replicas are asked, so that the span that `time_s` lies in is whole."""
    return math.floor(time_s / SPAN_S) * SPAN_S


def merged(found: Mapping[str, Hour], away: Iterable[str], since_s: float, now_s: float, chosen: str = "") -> Hour:
    """One hour of what replicas say since `span_start(since_s)`, with points after `since_s`.

    away: replicas that did not answer. chosen: the one to show alone; all, if it is not among `found`.
    """
    names = sorted({*found, *away})
    live = {name: dict(found[name].live) if name in found else None for name in names}
    if chosen in found:
        alone = found[chosen]
        points = [point for point in alone.points if point.time_s > since_s]
        return replace(alone, points=points, replica=chosen, replicas=live)
    return Hour(
        now_s=now_s,
        points=_points(found.values(), since_s, now_s),
        swaps=_swaps(found),
        versions=_versions(found.values()),
        live=_newest(hour.live for hour in found.values()),
        state=_state([hour.state for hour in found.values()]),
        alarms=_alarms(found),
        replicas=live,
    )


def _points(hours: Iterable[Hour], since_s: float, now_s: float) -> list[Point]:
    """A point for each span that is over, at its end."""
    spans: dict[float, list[list[Point]]] = defaultdict(list)
    for hour in hours:
        own: dict[float, list[Point]] = defaultdict(list)
        for point in hour.points:
            own[math.ceil(point.time_s / SPAN_S) * SPAN_S].append(point)
        for end_s, points in own.items():
            spans[end_s].append(points)
    return [_sum(spans[end_s], end_s) for end_s in sorted(spans) if since_s < end_s <= now_s - _LATE_S]


def _sum(by_replica: Sequence[Sequence[Point]], end_s: float) -> Point:
    """What replicas did in one span. Side by side their speeds add up, one after another a replica's do not."""
    points = [point for own in by_replica for point in own]
    drafts = sum(point.draft_steps for point in points)
    accepted = sum(point.accepted for point in points)
    plain_s, measured_s = sum(point.plain_s for point in points), sum(point.measured_s for point in points)
    speeds = [speed for own in by_replica if (speed := _speed(own)) is not None]
    return Point(
        time_s=end_s,
        speed_up=speed_up(EngineReport(plain_s=plain_s, measured_s=measured_s)),
        tokens_per_s=sum(speeds) if speeds else None,
        acceptance_length=1 + accepted / drafts if drafts else None,
        emitted=sum(point.emitted for point in points),
        plain_s=plain_s,
        measured_s=measured_s,
        draft_steps=drafts,
        accepted=accepted,
        domains=most_drafted(_added(point.domains for point in points)),
        sources={kind: count for kind, (count,) in _added(_as_lists(point.sources) for point in points).items()},
        version=max(point.version for point in points),
    )


def _speed(points: Iterable[Point]) -> float | None:
    """Tokens a second of engine time of one replica."""
    told = [(point.emitted, point.emitted / point.tokens_per_s) for point in points if point.tokens_per_s]
    return sum(tokens for tokens, _ in told) / sum(busy_s for _, busy_s in told) if told else None


def _as_lists(counts: Mapping[str, int]) -> dict[str, list[int]]:
    return {name: [count] for name, count in counts.items()}


def _added(dicts: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for counts in dicts:
        for name, numbers in counts.items():
            before = total.get(name, [0] * len(numbers))
            total[name] = [a + b for a, b in zip(before, numbers, strict=True)]
    return total


def _swaps(found: Mapping[str, Hour]) -> list[Swap]:
    swaps = [replace(swap, replica=name) for name, hour in found.items() for swap in hour.swaps]
    return sorted(swaps, key=lambda swap: swap.time_s)[-SWAPS:]


def _versions(hours: Iterable[Hour]) -> list[Version]:
    """Each version once, though every replica may have a mirror of the store: as it first came, and its rejection."""
    kept: dict[tuple[str, int], Version] = {}
    for version in (version for hour in hours for version in hour.versions):
        key = (version.kind, version.number)
        kept[key] = _both(kept[key], version) if key in kept else version
    return [kept[key] for key in sorted(kept)]


def _both(a: Version, b: Version) -> Version:
    rejected = min((v for v in (a, b) if v.rejected_s is not None), key=lambda v: v.rejected_s or 0.0, default=a)
    return replace(
        rejected, published_s=min(a.published_s, b.published_s), gated=b.gated if a.gated is None else a.gated
    )


def _newest(lives: Iterable[Mapping[str, int]]) -> dict[str, int]:
    newest: dict[str, int] = {}
    for live in lives:
        for kind, version in live.items():
            newest[kind] = max(version, newest.get(kind, 0))
    return newest


def _state(states: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Counts add up; of anything else the worst replica's."""
    kept: dict[str, float | None] = {}
    for name in _STATE:
        values = [value for state in states if (value := state.get(name)) is not None]
        how = sum if name in _ADDED else min if name in _WORST_IS_LOW else max
        kept[name] = how(values) if values else None
    return kept


def _alarms(found: Mapping[str, Hour]) -> dict[str, str]:
    raised: dict[str, list[str]] = defaultdict(list)
    meaning: dict[str, str] = {}
    for name, hour in found.items():
        for kind, what in hour.alarms.items():
            raised[kind].append(name)
            meaning[kind] = what
    return {kind: f"{meaning[kind]} ({', '.join(names)})" for kind, names in raised.items()}
