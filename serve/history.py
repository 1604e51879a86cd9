"""The last hour of one server, for its web page: a point every few seconds, swaps, versions and what is wrong now.

It is told of every engine report and reads the process's own metrics; the page asks for what is new. Counts, kinds and
domain names only, never text. Everything is bounded.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from aurora.alarms import KINDS, NEVER_RIGHT, OFF, UNSAVED
from aurora.metrics import EngineReport, acceptance_length, merge, speed_up, tokens_per_s
from aurora.store import READY, REJECTED, DrafterRefused, DrafterStore

INTERVAL_S = 5.0
POINTS = 720  # an hour of a server that is never idle
SWAPS = 200
STORE_S = 2.0  # between two looks at the stores
VERSIONS = 100  # of each store
DOMAINS = 12  # named in a point; the others are added up
OTHERS = "(others)"
GAUGES = (
    "aurora_trainer_alive",
    "aurora_training_share",
    "aurora_drift",
    "aurora_drafter_version",
    "aurora_draft_model_version",
    "aurora_step_time_error",
    "aurora_traces_waiting",
)
COUNTS = (
    "aurora_swaps_total",
    "aurora_swap_failures_total",
    "aurora_rollbacks_total",
    "aurora_traces_dropped_total",
    "aurora_requests_refused_total",
)
_ALARM = "aurora_alarm"
_MEANING = {
    NEVER_RIGHT: "the live drafter drafts, and is never right",
    OFF: "no neural draft was made for a long time, though requests came",
    UNSAVED: "the trainer's last work could not be written to disk",
}


class Point(msgspec.Struct, frozen=True):
    """What the engine did in a few seconds in which it was busy."""

    time_s: float  # wall clock, at its end
    speed_up: float | None  # estimated, against no speculation
    tokens_per_s: float | None  # of engine time
    acceptance_length: float | None
    emitted: int
    plain_s: float  # over `measured_s`: the speed-up
    measured_s: float
    draft_steps: int
    accepted: int
    domains: dict[str, list[int]]  # drafted, accepted
    sources: dict[str, int]  # tokens by who wrote them
    version: int


class Swap(msgspec.Struct, frozen=True):
    """Another drafter version began to draft."""

    time_s: float
    kind: str
    before: int
    after: int
    replica: str = ""


class Version(msgspec.Struct, frozen=True):
    """What a drafter store says of a version."""

    kind: str
    number: int
    published_s: float
    gated: float | None  # acceptance length that its gate measured
    rejected_s: float | None = None
    reason: str = ""


class Hour(msgspec.Struct, frozen=True):
    """What the page shows, of one server or, by a router, of all its replicas."""

    now_s: float
    points: list[Point]
    swaps: list[Swap]
    versions: list[Version]
    live: dict[str, int]  # by kind; of several replicas the newest
    state: dict[str, float | None]
    alarms: dict[str, str]  # kind -> what it means
    replica: str = ""  # of which one; "": a server without a router, or all replicas
    replicas: dict[str, dict[str, int] | None] = {}  # behind a router: what is live at each; None: it does not answer


class History:
    """What one server process did since it started, up to an hour of it."""

    def __init__(
        self,
        registry: CollectorRegistry,
        stores: Mapping[str, Path] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """stores: drafter stores by the kind of drafter; they need not exist. clock: seconds since the epoch."""
        self._registry = registry
        self._stores = dict(stores or {})
        self._clock = clock
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._swaps: deque[Swap] = deque(maxlen=SWAPS)
        self._versions: dict[tuple[str, int], Version] = {}
        self._looked_s = 0.0  # when the stores were
        self._live: dict[str, int] = {}
        self._pending: EngineReport | None = None  # None: before the first report, which tells of the calibration
        self._began_s = clock()

    def observe(self, report: EngineReport) -> None:
        """Count a report of the engine."""
        now_s = self._clock()
        self._see_live("eagle3", report.drafter_version, now_s)
        if self._pending is None:
            self._pending, self._began_s = EngineReport(), now_s
            return
        self._pending = merge(self._pending, report)
        if self._pending.steps and now_s - self._began_s >= INTERVAL_S:
            self._points.append(_point(self._pending, now_s))
        if now_s - self._began_s >= INTERVAL_S:
            self._pending, self._began_s = EngineReport(), now_s
            self._see_live("model", int(self._read().get(("aurora_draft_model_version", ""), 0)), now_s)

    def _see_live(self, kind: str, version: int, now_s: float) -> None:
        before = self._live.get(kind)
        if version and version != before:
            self._live[kind] = version
            self._swaps.append(Swap(now_s, kind, before or 0, version))

    async def look(self) -> None:
        """See what is new in the drafter stores, unless that was done a moment ago."""
        if self._clock() - self._looked_s < STORE_S:
            return
        self._looked_s = self._clock()
        found = await asyncio.to_thread(_versions, self._stores)
        self._versions |= {(version.kind, version.number): version for version in found}
        for kind in self._stores:
            for key in sorted(key for key in self._versions if key[0] == kind)[:-VERSIONS]:
                del self._versions[key]

    def since(self, time_s: float) -> Hour:
        """What the page shows; points only those after `time_s`."""
        read = self._read()
        return Hour(
            now_s=self._clock(),
            points=[point for point in self._points if point.time_s > time_s],
            swaps=list(self._swaps),
            versions=list(self._versions.values()),
            live=dict(self._live),
            state={name.removeprefix("aurora_"): read.get((name, "")) for name in (*GAUGES, *COUNTS)},
            alarms={kind: _MEANING[kind] for kind in (*KINDS, UNSAVED) if read.get((_ALARM, kind))},
        )

    def _read(self) -> dict[tuple[str, str], float]:
        """(metric, its kind or "") -> value now, of those that there are."""
        families = self._registry.restricted_registry([*GAUGES, *COUNTS, _ALARM]).collect()
        return {(s.name, s.labels.get("kind", "")): s.value for family in families for s in family.samples}


def _point(report: EngineReport, now_s: float) -> Point:
    return Point(
        time_s=now_s,
        speed_up=speed_up(report),
        tokens_per_s=tokens_per_s(report),
        acceptance_length=acceptance_length(report),
        emitted=report.emitted_tokens,
        plain_s=report.plain_s,
        measured_s=report.measured_s,
        draft_steps=sum(report.draft_steps.values()),
        accepted=sum(report.accepted_tokens.values()),
        domains=most_drafted(report.accepted_by_domain),
        sources=report.tokens_by_source,
        version=report.drafter_version,
    )


def most_drafted(domains: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The domains with the most drafts by name, and all others together."""
    ranked = sorted(domains.items(), key=lambda item: -item[1][0])
    named, rest = dict(ranked[:DOMAINS]), [counts for _, counts in ranked[DOMAINS:]]
    return named | ({OTHERS: [sum(counts) for counts in zip(*rest, strict=True)]} if rest else {})


def _versions(stores: Mapping[str, Path]) -> list[Version]:
    """The newest versions of each store that exists."""
    found = []
    for kind, root in stores.items():
        if root.is_dir():
            store = DrafterStore(root)
            found += [_version(store, kind, number) for number in store.versions()[-VERSIONS:]]
    return [version for version in found if version is not None]


def _version(store: DrafterStore, kind: str, number: int) -> Version | None:
    """None where it was removed meanwhile."""
    try:
        version = store.read(number)
        mark = version.path / REJECTED
        rejected = mark.is_file()
        return Version(
            kind=kind,
            number=number,
            published_s=(version.path / READY).stat().st_mtime,
            gated=version.metadata.get("acceptance_length"),
            rejected_s=mark.stat().st_mtime if rejected else None,
            reason=mark.read_text() if rejected else "",
        )
    except (OSError, DrafterRefused):
        return None
