"""What the server tells the trainer of itself: whether requests are open, and whether the traffic drifts.

Two plain values go to the Trainer actor whenever one changes, else every `_HEARTBEAT_S`, and its answer says how much
it computes. Nobody waits for that: a trainer that hears nothing keeps to its duty, one that does not answer counts as
idle.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aurora.alarms import UNSAVED
from aurora.drift import DriftDetector
from aurora.metrics import EngineReport
from serve.engine import RunningEngine
from serve.exporter import PrometheusExporter
from serve.feedback import Report, TrainerUnavailable

log = logging.getLogger(__name__)

_HEARTBEAT_S = 5.0
_ANSWER_TIMEOUT_S = 10.0

# (busy, drift) -> share of time computed, and why the disk did not take its last work; raises TrainerUnavailable
Hear = Callable[[bool, bool], Awaitable[tuple[float, str]]]


class LoadTeller:
    """Watches the engine's reports for drift and keeps the trainer informed."""

    def __init__(
        self,
        version: int,
        hear: Hear | None,
        exporter: PrometheusExporter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """version: of the live drafter. hear: the trainer's; None where there is none."""
        self._detector = DriftDetector(version)
        self._hear = hear
        self._exporter = exporter
        self._clock = clock
        self._told: tuple[bool, bool] | None = None
        self._told_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._training_share = 0.0
        self._unsaved = ""

    def observe(self, report: EngineReport) -> None:
        """Look for drift in a report."""
        before = self._detector.drifted
        self._detector.observe(report)
        drifted = self._detector.drifted
        self._exporter.set("aurora_drift", drifted)
        if drifted and not before:
            log.warning("drift: %s", self._detector)
        elif before and not drifted:
            log.info("drift is over: %s", self._detector)

    def tell(self, busy: bool) -> None:
        """Let the trainer know, if there is news; never blocks."""
        load, now_s = (busy, self._detector.drifted), self._clock()
        if self._hear is None or (load == self._told and now_s - self._told_s < _HEARTBEAT_S):
            return
        if self._task is None or self._task.done():
            self._told, self._told_s = load, now_s
            self._task = asyncio.create_task(self._send(self._hear(*load)))

    async def _send(self, answer: Awaitable[tuple[float, str]]) -> None:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                self._training_share, unsaved = await answer
            self._alarm(unsaved)
        except (TrainerUnavailable, TimeoutError) as error:
            self._training_share, self._told = 0.0, None  # whoever takes its place has heard nothing
            log.debug("the trainer does not hear (%s)", error or "timeout")
        self._exporter.set("aurora_training_share", self._training_share)

    def _alarm(self, unsaved: str) -> None:
        if unsaved and not self._unsaved:
            log.error("alarm %s: %s; see docs/reliability.md", UNSAVED, unsaved)
        elif self._unsaved and not unsaved:
            log.warning("alarm %s is over", UNSAVED)
        self._unsaved = unsaved
        self._exporter.set("aurora_alarm", int(bool(unsaved)), kind=UNSAVED)

    def completed(self, report_to: Report) -> Report:
        """A `report_to` that adds to the engine's counters what is known here."""

        def report(counters: dict[str, Any], time_s: float) -> None:
            own = {"drift": int(self._detector.drifted), "training_share": self._training_share}
            report_to(counters | own, time_s)

        return report


async def tell_forever(engine: RunningEngine, teller: LoadTeller, interval_s: float) -> None:
    """Look every `interval_s` whether requests are open."""
    while True:
        teller.tell(engine.client.output_processor.has_unfinished_requests())
        await asyncio.sleep(interval_s)
