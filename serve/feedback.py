"""The loops that run beside the HTTP server: engine to trainer, engine to metrics, store to engine."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from aurora.config import AuroraConfig
from aurora.guard import VersionGuard
from aurora.metrics import EngineReport, merge
from aurora.store import DrafterRefused, DrafterStore
from aurora.trace_log import TraceLog
from serve.engine import RunningEngine
from serve.exporter import PrometheusExporter

log = logging.getLogger(__name__)

_STAGE_POLL_S = 0.05
_IDLE_INTERVAL_S = 10.0
_INGEST_TIMEOUT_S = 30.0
_TRAINER_PAUSE_S = 5.0


class TrainerUnavailable(RuntimeError):
    """The trainer is dead or restarting."""


Ingest = Callable[[bytes], Awaitable[None]]  # hands one payload to the trainer; raises TrainerUnavailable
Observer = Callable[[EngineReport], None]
# (kind, live version, newest version) -> the newest one that may draft, and why the live one has to go ("": it has not)
Permit = Callable[[str, int, int], Awaitable[tuple[int, str]]]
Report = Callable[[dict[str, Any], float], None]  # hands counters and a wall-clock time to the reporter; never raises


class TraceForwarder:
    """Sends encoded traces to the trainer and to a log on disk, to each one payload at a time and in order.

    A trainer or disk that is dead or slow costs traces, which are counted, never serving. Those for the trainer wait
    for it, `bound` bytes of them; beyond that the oldest are lost.
    """

    def __init__(
        self,
        ingest: Ingest | None,
        exporter: PrometheusExporter,
        log: TraceLog | None = None,
        bound: int = 256 << 20,
    ) -> None:
        self._ingest = ingest
        self._exporter = exporter
        self._log = log
        self._bound = bound
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None

    def send(self, payload: bytes, traces: int) -> None:
        """Forward one payload of `traces`; never blocks."""
        if not payload:
            return
        if self._log is not None:
            self._keep(self._log, payload, traces)
        if self._ingest is None:
            return
        self._waiting.append((payload, traces))
        self._drop_oldest()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._forward(self._ingest))

    def _drop_oldest(self) -> None:
        size = sum(len(payload) for payload, _ in self._waiting)
        while size > self._bound and len(self._waiting) > 1:
            payload, traces = self._waiting.popleft()
            size -= len(payload)
            self._exporter.inc("aurora_traces_dropped_total", {}, traces)
        self._exporter.set("aurora_trace_bytes_waiting", size)

    def _keep(self, trace_log: TraceLog, payload: bytes, traces: int) -> None:
        if self._writing is not None and not self._writing.done():
            self._exporter.inc("aurora_traces_unlogged_total", {}, traces)
            return
        self._writing = asyncio.create_task(self._write(trace_log, payload, traces))

    async def _write(self, trace_log: TraceLog, payload: bytes, traces: int) -> None:
        try:
            await asyncio.to_thread(trace_log.write, payload)
        except OSError as error:
            self._exporter.inc("aurora_traces_unlogged_total", {}, traces)
            log.warning("%s does not take traces (%s); serving goes on", trace_log.directory, error.strerror)

    async def _forward(self, ingest: Ingest) -> None:
        """Hand on what waits until nothing does."""
        while self._waiting:
            payload, traces = self._waiting.popleft()
            try:
                await self._taken(asyncio.ensure_future(ingest(payload)))
            except TrainerUnavailable as error:
                self._waiting.appendleft((payload, traces))
                self._not_taken(str(error))
                await asyncio.sleep(_TRAINER_PAUSE_S)
            else:
                self._exporter.set("aurora_trainer_alive", 1)
            self._drop_oldest()

    async def _taken(self, answer: "asyncio.Future[None]") -> None:
        """Wait for an answer for as long as Ray does: a payload that was sent twice would be learned from twice."""
        done, _ = await asyncio.wait([answer], timeout=_INGEST_TIMEOUT_S)
        if not done:
            self._not_taken("timeout")
        await answer

    def _not_taken(self, why: str) -> None:
        self._exporter.set("aurora_trainer_alive", 0)
        log.warning("trainer does not take traces (%s); serving goes on, up to %d bytes wait for it", why, self._bound)

    async def logged(self) -> None:
        """Return when nothing is on its way to the disk any more."""
        if self._writing is not None:
            await self._writing

    async def settled(self) -> None:
        """Return when nothing is on its way any more."""
        await self.logged()
        if self._task is not None:
            await self._task


async def collect_forever(
    engine: RunningEngine,
    config: AuroraConfig,
    forwarder: TraceForwarder,
    observers: Sequence[Observer],
    report_to: Report | None,
    *,
    ended: asyncio.Event,
) -> None:
    """Every `capture.interval_s` take traces and counters from the engine and pass both on; seldom when it is idle.

    vLLM's worker keeps a core busy for a second after each call: one that is called all the time never rests. When
    `ended` is set all that was captured is handed on, and waited for, before this returns.
    """
    pending = EngineReport()
    reported = collected = time.monotonic()
    busy = True
    while not await _happened(ended, config.capture.interval_s):
        was_busy, busy = busy, engine.client.output_processor.has_unfinished_requests()
        if not (busy or was_busy or time.monotonic() - collected >= _IDLE_INTERVAL_S):
            continue
        collected = time.monotonic()
        pending = merge(pending, await _collect(engine, forwarder, observers))
        if report_to is not None and time.monotonic() - reported >= config.reporter.interval_s:
            report_to(msgspec.to_builtins(pending), time.time())
            pending, reported = EngineReport(), time.monotonic()
    report = EngineReport(traces=1)
    while report.traces:  # one call gives what fits into a payload
        await forwarder.logged()
        report = await _collect(engine, forwarder, observers)
        pending = merge(pending, report)
    if report_to is not None:
        report_to(msgspec.to_builtins(pending), time.time())
    await forwarder.settled()


async def _collect(engine: RunningEngine, forwarder: TraceForwarder, observers: Sequence[Observer]) -> EngineReport:
    """Take what the engine has and pass it on."""
    ((payload, encoded),) = await engine.client.collective_rpc("aurora_drain")
    report = msgspec.msgpack.decode(encoded, type=EngineReport)
    forwarder.send(payload, report.traces)
    for observe in observers:
        observe(report)
    return report


async def _happened(event: asyncio.Event, limit_s: float) -> bool:
    """Whether it was set, at the latest after `limit_s`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await event.wait()
    return event.is_set()


async def expire_forever(trace_log: TraceLog, interval_s: float = 60.0) -> None:
    """Remove logged traces that are too old, also while none come."""
    while True:
        try:
            await asyncio.to_thread(trace_log.expire)
        except OSError as error:
            log.warning("%s: old traces stay (%s)", trace_log.directory, error.strerror)
        await asyncio.sleep(interval_s)


async def swap_forever(
    engine: RunningEngine,
    store: DrafterStore,
    exporter: PrometheusExporter,
    guard: VersionGuard,
    *,
    poll_s: float = 1.0,
    kind: str = "eagle3",
    permit: Permit | None = None,
) -> None:
    """Keep the store's latest version in the engine; one that cannot be swapped in or turns out worse is rejected.

    Rejecting a live version makes an older one the latest, which is the rollback. kind: `eagle3` or `model`. permit:
    who says how new it may be; None: nobody.
    """
    while True:
        await asyncio.sleep(poll_s)
        newest = store.latest()
        at_most, refused = newest, ""
        if permit is not None and newest is not None:
            at_most, refused = await permit(kind, guard.live, newest)
        worse = guard.worse or refused
        if worse:
            exporter.inc("aurora_rollbacks_total", {}, 1)
            log.error("drafter version %d is rolled back: %s", guard.live, worse)
            store.reject(guard.live, worse)
        latest = store.latest(at_most)
        if latest is None or latest == guard.live:
            continue
        try:
            await swap(engine, latest, kind)
        except SwapFailed as error:
            exporter.inc("aurora_swap_failures_total", {}, 1)
            log.error("drafter version %d is not used: %s", latest, error)
            store.reject(latest, str(error))
        else:
            guard.swapped(latest)
            if kind == "model":
                exporter.set("aurora_draft_model_version", latest)


class SwapFailed(RuntimeError):
    """The version was not brought in; the drafter before it still drafts."""


async def swap(engine: RunningEngine, number: int, kind: str = "eagle3") -> float:
    """Stage a version beside serving, then exchange it between two steps; returns the stall in seconds.

    The target's checksum is taken before and after. Raises SwapFailed when the version was refused or rolled back, and
    RuntimeError when the target changed: then the engine must not go on.
    """
    rpc = engine.client.collective_rpc
    which = () if kind == "eagle3" else (kind,)
    try:
        ((before, _),) = await rpc("aurora_checksums")
        await rpc("aurora_stage", args=(number, *which))
        await _until_staged(engine, which)
        stalls: list[float] = await rpc("aurora_commit", args=which)
        ((after, _),) = await rpc("aurora_checksums")
    except DrafterRefused as error:
        raise SwapFailed(str(error)) from error
    except Exception as error:  # vLLM re-raises a worker's exception as a bare Exception that carries its text
        if engine.client.errored:
            raise
        raise SwapFailed(str(error)) from error
    if before != after:
        raise RuntimeError(f"swap to drafter version {number} changed the target: checksum {before} became {after}")
    log.info("%s version %d is live after a stall of %.4f s", kind, number, max(stalls))
    return max(stalls)


async def _until_staged(engine: RunningEngine, which: tuple[str, ...]) -> None:
    done = False
    while not done:
        await asyncio.sleep(_STAGE_POLL_S)
        done = all(await engine.client.collective_rpc("aurora_staged", args=which))
