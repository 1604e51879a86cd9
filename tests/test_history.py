import asyncio
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from aurora.alarms import OFF
from aurora.metrics import EngineReport
from aurora.store import DrafterStore
from serve import history as module
from serve.exporter import PrometheusExporter
from serve.history import DOMAINS, INTERVAL_S, OTHERS, History

BUSY = EngineReport(
    steps=4,
    emitted_tokens=12,
    busy_s=2.0,
    measured_s=2.0,
    plain_s=3.0,
    draft_steps={1: 4},
    accepted_tokens={1: 8},
    accepted_by_domain={"sql": [10, 8]},
    tokens_by_source={"target": 4, "eagle3": 8},
    drafter_version=1,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _history(clock: Clock, **stores: Path) -> tuple[History, PrometheusExporter]:
    registry = CollectorRegistry()
    return History(registry, stores, clock), PrometheusExporter(registry)


def _pass(history: History, clock: Clock, report: EngineReport, seconds: float = INTERVAL_S) -> None:
    clock.now += seconds
    history.observe(report)


def test_points_are_what_happened_between_them(clock: Clock) -> None:
    history, _ = _history(clock)
    history.observe(EngineReport(steps=100, emitted_tokens=1000))  # of the calibration
    _pass(history, clock, BUSY, 1.0)
    assert history.since(0).points == []
    _pass(history, clock, BUSY)
    (point,) = history.since(0).points
    assert (point.emitted, point.speed_up, point.tokens_per_s, point.acceptance_length) == (24, 1.5, 6.0, 3.0)
    assert point.domains == {"sql": [20, 16]}
    assert point.sources == {"target": 8, "eagle3": 16}
    _pass(history, clock, EngineReport(drafter_version=1))
    assert len(history.since(0).points) == 1, "nothing is drawn of an idle time"
    _pass(history, clock, BUSY)
    assert [p.emitted for p in history.since(point.time_s).points] == [12], "only what is new"


def test_it_forgets_what_is_too_old(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    history, _ = _history(clock)
    for version in range(1, 1000):
        _pass(history, clock, EngineReport(steps=1, drafter_version=version))
    data = history.since(0)
    assert (len(data.points), len(data.swaps)) == (module.POINTS, module.SWAPS)


def test_domains_beyond_the_bound_are_added_up(clock: Clock) -> None:
    history, _ = _history(clock)
    domains = {f"d{i}": [100 - i, i] for i in range(DOMAINS + 3)}
    for _ in range(2):
        _pass(history, clock, EngineReport(steps=1, accepted_by_domain=domains))
    (point,) = history.since(0).points
    assert len(point.domains) == DOMAINS + 1
    drafted, accepted = zip(*list(domains.values())[DOMAINS:], strict=True)
    assert point.domains[OTHERS] == [sum(drafted), sum(accepted)]


def test_swaps_of_both_drafters_are_seen(clock: Clock) -> None:
    history, exporter = _history(clock)
    exporter.set("aurora_draft_model_version", 1)
    for version in (3, 3, 4, 3):
        _pass(history, clock, EngineReport(drafter_version=version))
    exporter.set("aurora_draft_model_version", 2)
    _pass(history, clock, EngineReport(drafter_version=3))
    swaps = [(s.kind, s.before, s.after) for s in history.since(0).swaps]
    assert swaps == [("eagle3", 0, 3), ("model", 0, 1), ("eagle3", 3, 4), ("eagle3", 4, 3), ("model", 1, 2)]
    assert history.since(0).live == {"eagle3": 3, "model": 2}


def test_versions_are_remembered_when_they_are_removed(clock: Clock, tmp_path: Path) -> None:
    store = DrafterStore(tmp_path / "drafters")
    history, _ = _history(clock, eagle3=store.root, model=tmp_path / "none")
    for length in (1.5, 1.75, None):
        metadata = {} if length is None else {"acceptance_length": length}
        store.publish(lambda folder: save_file({"w": torch.zeros(1)}, folder / "model.safetensors"), metadata)
    store.reject(2, "it drafts worse")
    asyncio.run(history.look())
    store.prune(1)
    asyncio.run(history.look())
    clock.now += 60
    asyncio.run(history.look())
    versions = history.since(0).versions
    assert [(v.number, v.gated, v.reason) for v in versions] == [
        (1, 1.5, ""),
        (2, 1.75, "it drafts worse"),
        (3, None, ""),
    ]
    assert [v.rejected_s is not None for v in versions] == [False, True, False]
    assert not (tmp_path / "none").exists(), "a store that is not there is not made"


def test_state_and_alarms_are_those_of_the_metrics(clock: Clock) -> None:
    history, exporter = _history(clock)
    assert history.since(0).alarms == {}
    exporter.set("aurora_alarm", 1, kind=OFF)
    exporter.set("aurora_training_share", 0.25)
    exporter.inc("aurora_rollbacks_total", {}, 2)
    data = history.since(0)
    assert list(data.alarms) == [OFF]
    assert (data.state["training_share"], data.state["rollbacks_total"]) == (0.25, 2)


def test_a_server_without_speculation_has_a_page_too(clock: Clock) -> None:
    data = History(CollectorRegistry(), {}, clock).since(0)
    assert data.points == data.swaps == data.versions == []
    assert data.state["trainer_alive"] is None
