import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aurora.config import AuroraConfig, UserError
from aurora.store import DrafterStore
from aurora.store_mirror import StoreMirror
from aurora.store_source import learning_place, make_store_source
from aurora.trace import DraftTrace, encode_traces
from serve.mirror import RemoteSource
from tests.test_store_mirror import contents, files
from tests.tiny import TinyServer, half_right, prompts, tiny_config
from tests.waiting import wait_until

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def traffic(directory: Path) -> list[DraftTrace]:
    server = TinyServer(directory)
    return [t for i, p in enumerate(prompts(12)) for t in server.traces(f"r{i}", p, 10, half_right)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    root = str(Path(__file__).resolve().parent.parent)
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield
    ray.shutdown()


def wait_for(actor: Any, condition: Any, limit_s: float = 240) -> dict[str, Any]:
    """The first status that fulfils `condition`; an actor that restarts meanwhile is asked again."""
    seen: list[dict[str, Any]] = []

    def fulfilled() -> bool:
        try:
            seen.append(ray.get(actor.status.remote(), timeout=limit_s))
        except ray.exceptions.RayActorError:
            return False
        return bool(condition(seen[-1]))

    wait_until(fulfilled, limit_s, "the trainer is not where it should be")
    return seen[-1]


def test_it_learns_publishes_and_survives_its_own_death(
    cluster: None, directory: Path, traffic: list[DraftTrace], tmp_path: Path
) -> None:
    from trainer.actor import make_trainer_actor

    config = tiny_config(tmp_path, publish_interval_s=0.2, checkpoint_interval_s=0.2, gate_margin=-1.0)
    actor = make_trainer_actor(config, directory)
    assert ray.get(actor.ingest.remote(encode_traces(traffic))) == len(traffic)
    share, unsaved = ray.get(actor.hear.remote(True, False))
    assert 0 <= share <= 1
    assert unsaved == ""
    before = wait_for(actor, lambda s: s["version"] >= 2 and s["step"] >= 10)
    assert before["allowed_share"] == config.trainer.duty
    assert before["computed_loaded_s"] <= before["loaded_s"]
    os.kill(before["pid"], signal.SIGKILL)
    after = wait_for(actor, lambda s: s["pid"] != before["pid"])
    assert after["step"] > 0, "resumed from its checkpoint"
    assert after["version"] >= before["version"]
    ray.get(actor.ingest.remote(encode_traces(traffic)))
    wait_for(actor, lambda s: s["step"] > after["step"])
    store = DrafterStore(config.store_dir)
    store.verify(store.versions()[-1])
    with pytest.raises(ValueError, match="not a trace payload"):
        ray.get(actor.ingest.remote(b"\xc1"))
    ray.get(actor.stop.remote())
    ray.kill(actor)


def test_training_that_fails_ends_the_process_and_a_dead_reporter_does_not(
    cluster: None, directory: Path, traffic: list[DraftTrace], tmp_path: Path
) -> None:
    from trainer.actor import Trainer

    class Breakable(Trainer):
        def break_it(self) -> None:
            self._loop._learner.optimizer = None

    @ray.remote(num_cpus=0)
    class Reporter:
        def learning(self, metrics: dict[str, Any], step: int) -> None: ...

        def version(self, metadata: dict[str, Any], number: int) -> None: ...

    reporter = Reporter.options(name="reporter").remote()
    config = tiny_config(tmp_path, checkpoint_interval_s=0.1, publish_interval_s=1000.0)
    actor = ray.remote(Breakable).options(max_restarts=-1, max_concurrency=8).remote(config, str(directory), "reporter")
    ray.get(actor.ingest.remote(encode_traces(traffic)))
    wait_for(actor, lambda s: s["step"] >= 3)
    ray.kill(reporter)
    before = wait_for(actor, lambda s: s["step"] >= 3)
    later = wait_for(actor, lambda s: s["step"] > before["step"] + 3)
    assert later["pid"] == before["pid"], "the reporter's death is nothing to the trainer"
    blocked = tmp_path / "trainer" / ".checkpoint.safetensors"
    blocked.unlink(missing_ok=True)
    blocked.mkdir()  # no checkpoint can be written
    unsaved = wait_for(actor, lambda s: s["unsaved"])
    later = wait_for(actor, lambda s: s["step"] > unsaved["step"] + 3)
    assert later["pid"] == before["pid"], "nor is the disk"
    blocked.rmdir()
    wait_for(actor, lambda s: not s["unsaved"])
    actor.break_it.remote()
    wait_for(actor, lambda s: s["pid"] != before["pid"])
    ray.kill(actor)


def test_published_drafters_can_be_had_whoever_dies(cluster: None, tmp_path: Path) -> None:
    config = AuroraConfig(run_dir=tmp_path / "trainer")
    published = DrafterStore(config.store_dir).publish(files(b"weights" * (1 << 20)), {"parent": None})
    source = make_store_source(config, "drafters", learning_place("train"))
    calls = RemoteSource(partial(ray.get_actor, "drafters"), "eagle3", (ray.exceptions.RayError, ValueError))
    mirror = StoreMirror(DrafterStore(tmp_path / "server"), calls)
    assert asyncio.run(mirror.step()).fetched == 1
    assert contents(mirror.store.verify(1)) == contents(published)
    ray.kill(source, no_restart=False)
    DrafterStore(config.store_dir).publish(files(b"others" * (1 << 20)), {"parent": 1})
    mirror.store.reject(1, "drafts worse")
    wait_until(lambda: asyncio.run(mirror.step()).fetched == 2, 60, "version 2 did not come from the restarted actor")
    assert DrafterStore(config.store_dir).rejection(1) == "drafts worse"
    ray.kill(source)


def test_two_workers_train_and_the_death_of_one_stops_nothing(
    cluster: None, directory: Path, traffic: list[DraftTrace], tmp_path: Path
) -> None:
    from trainer.actor import make_trainer_actor

    config = tiny_config(tmp_path, workers=2, nice=0, publish_interval_s=1000.0, checkpoint_interval_s=1000.0)
    crowd = config.model_copy(update={"trainer": config.trainer.model_copy(update={"workers": 9})})
    with pytest.raises(UserError, match=r"trainer.workers 9: each takes 1 CPU .* give at most 2"):
        make_trainer_actor(crowd, directory)
    actor, visits = make_trainer_actor(config, directory), count()

    def after(status: dict[str, Any], workers: int, steps: int) -> dict[str, Any]:
        """A later status with so many workers and steps more; fresh traffic comes meanwhile."""

        def there(now: dict[str, Any]) -> bool:
            visit = next(visits)
            fresh = [msgspec.structs.replace(t, request_id=f"{visit} {t.request_id}") for t in traffic]
            ray.get(actor.ingest.remote(encode_traces(fresh)))
            return now["step"] >= status["step"] + steps and len(now["worker_pids"]) == workers

        return wait_for(actor, there)

    both = after({"step": 0}, workers=2, steps=5)
    leader, helper = both["worker_pids"]
    assert leader == both["pid"] != helper
    os.kill(helper, signal.SIGKILL)
    again = after(wait_for(actor, lambda s: helper not in s["worker_pids"]), workers=2, steps=5)
    assert again["pid"] == leader
    assert again["worker_pids"][1] != helper
    ray.get(actor.stop.remote())
    ray.kill(actor)
