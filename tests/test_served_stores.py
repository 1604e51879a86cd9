"""A server's stores where the trainer's are elsewhere, and the actor's class that hands those out."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from aurora.config import AuroraConfig, ConfigError, UserError, load_config
from aurora.store import DrafterStore
from aurora.store_mirror import StoreMirror
from aurora.store_offers import SourceUnreachable
from aurora.store_source import StoreSource
from serve import mirror as module
from serve.exporter import PrometheusExporter
from serve.mirror import RemoteSource, ServedStores, mirror_forever
from tests.test_store_mirror import Pair, contents, files


class NoAnswer(Exception):
    """The actor is dead."""


class Handle:
    """Plays the handle of a `StoreSource` actor that runs in this process."""

    def __init__(self, actor: StoreSource) -> None:
        self.actor = actor
        self.dead = False

    def __getattr__(self, method: str) -> Any:
        async def remote(*args: Any) -> Any:
            if self.dead:
                raise NoAnswer(f"{method}: actor died")
            return await getattr(self.actor, method)(*args)

        return type("Method", (), {"remote": staticmethod(remote)})


@pytest.fixture
def config(tmp_path: Path) -> AuroraConfig:
    cluster = {"transport": "ray", "local_dir": tmp_path / "node"}
    return AuroraConfig.model_validate(
        {"run_dir": tmp_path / "run", "cluster": cluster, "speculation": {"drafters": ("eagle3", "model")}}
    )


@pytest.fixture
def trainer(config: AuroraConfig) -> DrafterStore:
    return DrafterStore(config.store_dir)


def remote(handle: Handle) -> Callable[[str], RemoteSource]:
    return lambda kind: RemoteSource(lambda: handle, kind, (NoAnswer,))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.001)


@pytest.fixture
def exporter() -> PrometheusExporter:
    return PrometheusExporter(CollectorRegistry())


def value(exporter: PrometheusExporter, name: str, kind: str = "eagle3") -> float:
    collector = exporter._gauges.get(name) or exporter._counters[name]
    return sum(s.value for m in collector.collect() for s in m.samples if s.name == name and s.labels["kind"] == kind)


async def test_a_server_begins_with_the_trainers_newest_of_both_kinds(
    config: AuroraConfig, trainer: DrafterStore
) -> None:
    stores = ServedStores(config, remote(Handle(StoreSource(config))), replica="1")
    assert stores.config.store_dir == config.cluster.local_dir / "1" / "drafters"
    beginning = asyncio.create_task(stores.begin(60))
    await asyncio.sleep(0.02)
    trainer.publish(files(b"a"), {})
    newest = trainer.publish(files(b"b"), {"gated_rates": [0.5]})
    assert not beginning.done(), "there is no draft model yet"
    DrafterStore(config.draft_model_dir).publish(files(b"m"), {})
    await beginning
    assert stores.store().latest() == 2
    assert contents(stores.store().verify(2)) == contents(newest)
    assert DrafterStore(stores.config.draft_model_dir).latest() == 1


async def test_without_a_source_the_stores_are_the_trainers_own(config: AuroraConfig, trainer: DrafterStore) -> None:
    stores = ServedStores(config, None)
    await stores.begin(0.01)
    assert stores.config == config
    assert stores.store().root == trainer.root
    assert stores.store("model").root == config.draft_model_dir
    assert stores.loops(PrometheusExporter(CollectorRegistry()), {}) == []


async def test_a_server_restarts_without_a_source_on_what_it_has(
    config: AuroraConfig, trainer: DrafterStore, caplog: pytest.LogCaptureFixture
) -> None:
    handle = Handle(StoreSource(config))
    trainer.publish(files(b"a"), {})
    DrafterStore(config.draft_model_dir).publish(files(b"m"), {})
    await ServedStores(config, remote(handle)).begin(60)
    handle.dead = True
    again = ServedStores(config, remote(handle))
    await again.begin(60)
    assert again.store().latest() == 1
    assert "does not answer: offers: actor died; serving goes on with the versions in" in caplog.text


async def test_a_server_that_gets_no_drafter_says_so(config: AuroraConfig) -> None:
    with pytest.raises(UserError, match="no drafter came from the trainer's node within 0 s"):
        await ServedStores(config, remote(Handle(StoreSource(config)))).begin(0.05)


async def test_a_directory_that_cannot_be_used_is_named(config: AuroraConfig) -> None:
    config.cluster.local_dir.write_text("a file")
    with pytest.raises(UserError, match=r"cluster\.local_dir .*node/0: Not a directory; give a directory"):
        await ServedStores(config, remote(Handle(StoreSource(config)))).begin(60)


async def test_a_source_that_is_gone_is_counted_and_logged_once(
    tmp_path: Path, exporter: PrometheusExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pair = Pair(tmp_path, asyncio.Runner())  # steps in this test's own loop
    pair.there.publish(files(b"w" * 100), {})
    looping = asyncio.create_task(mirror_forever(pair.mirror, exporter, "eagle3", poll_s=0.001))

    async def until(happened: Callable[[], bool]) -> None:
        for _ in range(20_000):
            if happened():
                return
            await asyncio.sleep(0.001)
        raise AssertionError("it did not happen")

    await until(lambda: value(exporter, "aurora_store_mirror_bytes_total") == 102)
    await until(lambda: value(exporter, "aurora_store_mirror_seconds") > 0)
    pair.wire.room = 0
    await until(lambda: value(exporter, "aurora_store_mirror_failures_total") > 3)
    assert value(exporter, "aurora_store_mirror_source_alive") == 0
    pair.wire.room = None
    pair.there.publish(files(b"v" * 100), {})
    await until(lambda: pair.here.latest() == 2)
    await until(lambda: value(exporter, "aurora_store_mirror_source_alive") == 1)
    await until(lambda: "follows its source again" in caplog.text)
    looping.cancel()
    assert caplog.text.count("the way is broken; serving goes on") == 1
    assert caplog.text.count("drafter version 2 came to") == 1


async def test_an_actor_that_does_not_answer_in_time_is_looked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_S", 0.01)
    found: list[str] = []

    class Silent:
        def __getattr__(self, method: str) -> Any:
            return type("Method", (), {"remote": staticmethod(lambda *_: asyncio.sleep(60))})

    def find() -> Silent:
        found.append("looked")
        return Silent()

    source = RemoteSource(find, "eagle3", (NoAnswer,))
    for _ in range(2):
        with pytest.raises(SourceUnreachable, match="TimeoutError"):
            await source.chunk("0" * 64, 0, 1)
    assert len(found) == 2

    def nobody() -> Any:
        raise ValueError("no actor of this name")

    with pytest.raises(SourceUnreachable, match="no actor of this name"):
        await RemoteSource(nobody, "model", (ValueError,)).reject(1, {}, "worse")


async def test_a_cancellation_that_meets_the_answer_is_not_lost() -> None:
    answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    handle = SimpleNamespace(offers=SimpleNamespace(remote=lambda *_: answer))
    asking = asyncio.create_task(RemoteSource(lambda: handle, "eagle3", (NoAnswer,)).offers())
    await asyncio.sleep(0)
    answer.set_result(b"")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_what_a_server_rejects_the_trainer_does_not_go_on_from(
    config: AuroraConfig, trainer: DrafterStore, exporter: PrometheusExporter
) -> None:
    for content in (b"a", b"b"):
        trainer.publish(files(content), {})
    mirror = StoreMirror(DrafterStore(config.mirrored("0").store_dir), remote(Handle(StoreSource(config)))("eagle3"))
    await mirror.step()
    await mirror.step()
    mirror.store.reject(2, "drafts worse")
    await mirror.step()
    assert (trainer.latest(), trainer.rejection(2)) == (1, "drafts worse")


@pytest.mark.parametrize(
    ("set_to", "message"),
    [
        ({"cluster.local_dir": "here"}, "cluster.local_dir.*must be an absolute path"),
        ({"cluster.fetch_mib_s": 0}, "cluster.fetch_mib_s"),
        ({"cluster.transport": "pigeon"}, "cluster.transport.*'pigeon'"),
    ],
)
def test_a_transport_that_cannot_be_is_refused(set_to: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, set_to)


def test_drafters_are_shipped_where_there_is_a_trainer_and_no_shared_directory() -> None:
    assert not load_config(None, {}).ships_drafters
    assert load_config(None, {"cluster.transport": "ray"}).ships_drafters
    assert not load_config(None, {"cluster.transport": "ray", "trainer.enabled": False}).ships_drafters
    assert load_config(None, {"run_dir": "/r"}).mirrored("3").draft_model_dir == Path("/r/mirror/3/draft_models")
