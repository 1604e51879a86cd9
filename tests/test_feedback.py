import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from aurora.config import AuroraConfig
from aurora.guard import VersionGuard
from aurora.metrics import EngineReport
from aurora.store import DrafterStore
from aurora.trace_log import TraceLog, log_files
from serve.exporter import PrometheusExporter
from serve.feedback import SwapFailed, TraceForwarder, TrainerUnavailable, collect_forever, swap, swap_forever


class Engine:
    """Plays vLLM's client: answers `collective_rpc` from a table and notes the calls."""

    def __init__(self, **answers: Callable[..., Any]) -> None:
        self.calls: list[str] = []
        self.errored = False
        self.answers: dict[str, Callable[..., Any]] = {
            "aurora_checksums": lambda: ("target", "drafter"),
            "aurora_stage": lambda number: None,
            "aurora_staged": lambda: True,
            "aurora_commit": lambda: 0.01,
            **answers,
        }
        self.drafter = SimpleNamespace(number=1)

    @property
    def client(self) -> "Engine":
        return self

    async def collective_rpc(self, name: str, args: tuple = ()) -> list[Any]:
        self.calls.append(name)
        return [self.answers[name](*args)]


def fails(message: str) -> Callable[..., Any]:
    def answer(*_: Any) -> Any:
        raise Exception(message)

    return answer


@pytest.fixture
def exporter() -> PrometheusExporter:
    return PrometheusExporter(CollectorRegistry())


def count(exporter: PrometheusExporter, name: str) -> float:
    return sum(s.value for m in exporter._counters[name].collect() for s in m.samples if s.name == name)


def save(directory: Path) -> None:
    save_file({"w": torch.zeros(1)}, directory / "model.safetensors")


async def until(happened: Callable[[], bool]) -> None:
    for _ in range(5000):
        if happened():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


async def test_a_swap_takes_the_targets_checksum_before_and_after() -> None:
    engine = Engine()
    assert await swap(engine, 2) == 0.01
    assert engine.calls == ["aurora_checksums", "aurora_stage", "aurora_staged", "aurora_commit", "aurora_checksums"]


async def test_the_draft_model_is_swapped_by_the_same_steps(tmp_path: Path, exporter: PrometheusExporter) -> None:
    store, asked = DrafterStore(tmp_path), list[tuple[object, ...]]()
    for _ in range(2):
        store.publish(save, {})
    engine = Engine(
        aurora_stage=lambda *args: asked.append(args),
        aurora_staged=lambda *args: bool(asked.append(args)) or True,
        aurora_commit=lambda *args: asked.append(args) or 0.01,
    )
    guard = VersionGuard(1, sign=-1)
    task = asyncio.create_task(swap_forever(engine, store, exporter, guard, poll_s=0.001, kind="model"))
    await until(lambda: guard.live == 2)
    task.cancel()
    assert asked == [(2, "model"), ("model",), ("model",)]
    (live,) = [s.value for m in exporter._gauges["aurora_draft_model_version"].collect() for s in m.samples]
    assert live == 2


@pytest.mark.parametrize("step", ["aurora_stage", "aurora_staged", "aurora_commit"])
async def test_a_refused_version_is_no_reason_to_stop(step: str) -> None:
    with pytest.raises(SwapFailed, match="NaN"):
        await swap(Engine(**{step: fails("model.safetensors holds NaN")}), 2)


async def test_a_target_that_changed_ends_the_server() -> None:
    checksums = iter([("a", ""), ("b", "")])
    with pytest.raises(RuntimeError, match="changed the target: checksum a became b"):
        await swap(Engine(aurora_checksums=lambda: next(checksums)), 2)


async def test_a_dead_engine_is_not_mistaken_for_a_bad_version() -> None:
    engine = Engine(aurora_commit=fails("engine died"))
    engine.errored = True
    with pytest.raises(Exception, match="engine died") as raised:
        await swap(engine, 2)
    assert not isinstance(raised.value, SwapFailed)


async def test_a_refused_version_is_counted_and_the_next_one_tried(
    tmp_path: Path, exporter: PrometheusExporter
) -> None:
    store, staged = DrafterStore(tmp_path), []

    def stage(number: int) -> None:
        staged.append(number)
        if number == 2:
            raise Exception("refused")

    for _ in range(2):
        store.publish(save, {})
    task = asyncio.create_task(swap_forever(Engine(aurora_stage=stage), store, exporter, VersionGuard(1), poll_s=0.001))
    await until(lambda: count(exporter, "aurora_swap_failures_total") == 1)
    store.publish(save, {})
    await until(lambda: 3 in staged)
    await asyncio.sleep(0.02)
    task.cancel()
    assert staged == [2, 3], "each is tried once"
    assert store.latest() == 3


async def test_a_version_that_drafts_worse_is_rolled_back(tmp_path: Path, exporter: PrometheusExporter) -> None:
    store, guard, staged = DrafterStore(tmp_path), VersionGuard(1), list[int]()
    store.publish(save, {})
    guard.observe(EngineReport(first_drafts={1: [400, 240]}))
    store.publish(save, {})
    task = asyncio.create_task(swap_forever(Engine(aurora_stage=staged.append), store, exporter, guard, poll_s=0.001))
    await until(lambda: guard.live == 2)
    guard.observe(EngineReport(first_drafts={2: [100, 0]}))
    await until(lambda: guard.live == 1)
    await asyncio.sleep(0.02)
    task.cancel()
    assert staged == [2, 1]
    assert store.latest() == 1
    assert count(exporter, "aurora_rollbacks_total") == 1


def value(exporter: PrometheusExporter, name: str) -> float:
    (sample,) = [s.value for m in exporter._gauges[name].collect() for s in m.samples]
    return sample


async def test_traces_wait_for_a_busy_trainer_and_the_oldest_beyond_the_bound_are_lost(
    exporter: PrometheusExporter,
) -> None:
    gate, taken = asyncio.Event(), []

    async def ingest(payload: bytes) -> None:
        taken.append(payload)
        await gate.wait()

    forwarder = TraceForwarder(ingest, exporter, bound=5)
    forwarder.send(b"a", 3)
    await asyncio.sleep(0)
    for payload in (b"bb", b"cc", b"dd"):
        forwarder.send(payload, 4)
    assert count(exporter, "aurora_traces_dropped_total") == 4, "the two bytes that waited longest"
    assert value(exporter, "aurora_trace_bytes_waiting") == 4
    gate.set()
    await forwarder.settled()
    assert taken == [b"a", b"cc", b"dd"]
    assert value(exporter, "aurora_trace_bytes_waiting") == 0


async def test_a_dead_trainer_is_shown_and_gets_what_waited_when_it_is_back(
    exporter: PrometheusExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.feedback._TRAINER_PAUSE_S", 0.001)
    dead, taken = True, []

    async def ingest(payload: bytes) -> None:
        if dead:
            raise TrainerUnavailable("ActorDiedError")
        taken.append(payload)

    forwarder = TraceForwarder(ingest, exporter)
    forwarder.send(b"a", 3)
    forwarder.send(b"b", 3)
    await asyncio.sleep(0.02)
    assert value(exporter, "aurora_trainer_alive") == 0
    dead = False
    await forwarder.settled()
    assert taken == [b"a", b"b"]
    assert value(exporter, "aurora_trainer_alive") == 1
    assert count(exporter, "aurora_traces_dropped_total") == 0


async def test_a_trainer_that_cannot_be_reached_is_sent_nothing_twice(
    exporter: PrometheusExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.feedback._INGEST_TIMEOUT_S", 0.001)
    gate, taken = asyncio.Event(), []

    async def ingest(payload: bytes) -> None:
        taken.append(payload)
        await gate.wait()

    forwarder = TraceForwarder(ingest, exporter)
    forwarder.send(b"a", 3)
    await asyncio.sleep(0.02)
    assert value(exporter, "aurora_trainer_alive") == 0
    gate.set()
    await forwarder.settled()
    assert taken == [b"a"]
    assert value(exporter, "aurora_trainer_alive") == 1


async def test_traces_are_logged_whether_or_not_a_trainer_takes_them(
    exporter: PrometheusExporter, tmp_path: Path
) -> None:
    async def ingest(_: bytes) -> None:
        raise TrainerUnavailable("ActorDiedError")

    for name, taker in (("alone", None), ("beside", ingest)):
        log = TraceLog(tmp_path / name, 1000, "m")
        forwarder = TraceForwarder(taker, exporter, log)
        for payload in (b"a", b"", b"b"):
            forwarder.send(payload, 1)
            await forwarder._writing
        assert [path.read_bytes() for path in log_files(tmp_path / name)] == [b"a", b"b"]


async def test_a_disk_that_is_slow_or_full_costs_logged_traces_only(
    exporter: PrometheusExporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, gate = TraceLog(tmp_path / "log", 1000, "m"), threading.Event()
    write = log.write

    def wait_and_write(payload: bytes) -> None:
        assert gate.wait(20)
        write(payload)

    monkeypatch.setattr(log, "write", wait_and_write)
    forwarder = TraceForwarder(None, exporter, log)
    forwarder.send(b"a", 3)
    forwarder.send(b"b", 4)
    assert count(exporter, "aurora_traces_unlogged_total") == 4
    gate.set()
    await forwarder._writing
    shutil.rmtree(tmp_path / "log")
    forwarder.send(b"c", 5)
    await forwarder._writing
    assert count(exporter, "aurora_traces_unlogged_total") == 9


async def test_what_was_captured_last_is_handed_on_before_a_stop(exporter: PrometheusExporter, tmp_path: Path) -> None:
    payloads, taken, told, seen = [b"a", b"b", b"c", b"d"], [], [], []

    def drain() -> tuple[bytes, bytes]:
        payload = payloads.pop(0) if payloads else b""
        return payload, msgspec.msgpack.encode(EngineReport(traces=len(payload), steps=1))

    async def ingest(payload: bytes) -> None:
        await asyncio.sleep(0.01)  # slower than they are collected
        taken.append(payload)

    engine, ended = Engine(aurora_drain=drain), asyncio.Event()
    engine.output_processor = SimpleNamespace(has_unfinished_requests=lambda: True)
    config = AuroraConfig(capture={"interval_s": 0.001}, reporter={"interval_s": 100})
    log = TraceLog(tmp_path / "log", 1000, "m")
    forwarder = TraceForwarder(ingest, exporter, log)
    collecting = collect_forever(
        engine, config, forwarder, [seen.append], lambda row, _: told.append(row["steps"]), ended=ended
    )
    task = asyncio.create_task(collecting)
    await until(lambda: len(payloads) < 4)
    ended.set()
    async with asyncio.timeout(20):
        await task
    lost = count(exporter, "aurora_traces_dropped_total")
    assert len(taken) + lost == 4
    assert taken[-1] == b"d"
    assert told == [len(seen)], "the last report, too"
    logged = [path.read_bytes() for path in log_files(tmp_path / "log")]
    assert len(logged) + count(exporter, "aurora_traces_unlogged_total") == 4
    assert logged[-1] == b"d"
