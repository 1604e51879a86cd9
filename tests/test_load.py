"""What the trainer is told of the server, and that nobody waits for it."""

import asyncio
import logging
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from aurora.metrics import EngineReport
from serve.exporter import PrometheusExporter
from serve.feedback import TrainerUnavailable
from serve.load import LoadTeller


class Trainer:
    """Notes what it hears and answers when it may."""

    def __init__(self) -> None:
        self.heard: list[tuple[bool, bool]] = []
        self.answering = asyncio.Event()
        self.answering.set()
        self.alive = True
        self.unsaved = ""

    async def hear(self, busy: bool, drift: bool) -> tuple[float, str]:
        if not self.alive:
            raise TrainerUnavailable("ActorDiedError")
        self.heard.append((busy, drift))
        await self.answering.wait()
        return 0.25, self.unsaved


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


async def settled(teller: LoadTeller) -> None:
    if teller._task is not None:
        await teller._task


def drafted(teller: LoadTeller, right: int, reports: int = 40) -> None:
    for _ in range(reports):
        teller.observe(EngineReport(drafter_version=1, first_drafts={1: [50, right]}))


async def test_news_is_told_at_once_and_old_news_seldom(registry: CollectorRegistry) -> None:
    trainer, clock = Trainer(), Clock()
    teller = LoadTeller(1, trainer.hear, PrometheusExporter(registry), clock)
    for now, busy in ((0, True), (1, True), (2, False), (3, False), (6, False), (7.5, False), (8, True)):
        clock.now = now
        teller.tell(busy)
        await settled(teller)
    assert trainer.heard == [(True, False), (False, False), (False, False), (True, False)]
    assert registry.get_sample_value("aurora_training_share") == 0.25


async def test_a_slow_trainer_gets_the_newest_news_later_and_nobody_waits(registry: CollectorRegistry) -> None:
    trainer = Trainer()
    teller = LoadTeller(1, trainer.hear, PrometheusExporter(registry))
    trainer.answering.clear()
    teller.tell(busy=True)
    await asyncio.sleep(0)
    teller.tell(busy=False)
    trainer.answering.set()
    await settled(teller)
    teller.tell(busy=False)
    await settled(teller)
    assert trainer.heard == [(True, False), (False, False)]


async def test_a_trainer_that_comes_back_is_told_anew(registry: CollectorRegistry) -> None:
    trainer = Trainer()
    teller = LoadTeller(1, trainer.hear, PrometheusExporter(registry), Clock())
    teller.tell(busy=True)
    await settled(teller)
    trainer.alive = False
    teller.tell(busy=False)
    await settled(teller)
    assert registry.get_sample_value("aurora_training_share") == 0
    trainer.alive = True
    teller.tell(busy=False)
    await settled(teller)
    assert trainer.heard == [(True, False), (False, False)]


async def test_drift_is_told_logged_and_shown(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    trainer, rows = Trainer(), []
    teller = LoadTeller(1, trainer.hear, PrometheusExporter(registry))
    report: Callable[[dict, float], None] = teller.completed(lambda counters, time_s: rows.append((counters, time_s)))
    with caplog.at_level(logging.INFO):
        drafted(teller, right=30)
        assert registry.get_sample_value("aurora_drift") == 0
        drafted(teller, right=5, reports=10)
        assert registry.get_sample_value("aurora_drift") == 1
        teller.tell(busy=True)
        await settled(teller)
        report({"steps": 3}, 7.0)
        teller.observe(EngineReport(drafter_version=2))
    assert trainer.heard == [(True, True)]
    assert rows == [({"steps": 3, "drift": 1, "training_share": 0.25}, 7.0)]
    assert [r.message.split(":")[0] for r in caplog.records] == ["drift", "drift is over"]
    assert "0.35 of the last 400 were right, 0.60 before" in caplog.records[0].message
    assert caplog.records[1].message == "drift is over: little is known of version 2's drafts yet"
    assert registry.get_sample_value("aurora_drift") == 0


async def test_without_a_trainer_drift_is_shown_all_the_same(registry: CollectorRegistry) -> None:
    teller = LoadTeller(1, None, PrometheusExporter(registry))
    drafted(teller, right=30)
    drafted(teller, right=5, reports=10)
    teller.tell(busy=True)
    assert registry.get_sample_value("aurora_drift") == 1


async def test_work_that_the_disk_does_not_take_is_an_alarm(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, shown = Trainer(), []
    teller = LoadTeller(1, trainer.hear, PrometheusExporter(registry), Clock())
    with caplog.at_level(logging.WARNING):
        for busy, trainer.unsaved in ((True, ""), (False, "No space left"), (True, "No space left"), (False, "")):
            teller.tell(busy)
            await settled(teller)
            shown.append(registry.get_sample_value("aurora_alarm", {"kind": "training_unsaved"}))
    assert shown == [0, 1, 1, 0]
    assert [r.message.split(";")[0] for r in caplog.records] == [
        "alarm training_unsaved: No space left",
        "alarm training_unsaved is over",
    ]
