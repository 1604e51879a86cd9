"""Processes killed under traffic: what users see, what comes back and with what."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil
import pytest

from aurora.store import DrafterStore
from tests.faults.traffic import CUT_OFF, NOBODY, Traffic, mixed
from tests.integration.conftest import LEARNING
from tests.integration.process import START_LIMIT_S, ServedModel, random_prompts
from tests.waiting import wait_until

pytestmark = pytest.mark.engine

FLAGS = (*LEARNING, "--set=trainer.checkpoint_interval_s=5")
BESIDE = {"trainer": "ray::Trainer", "reporter": "ray::Reporter", "wandb": "wandb-core"}
SERVING = {"server": "ray::Server", "engine": "VLLM::EngineCore"}


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    server = ServedModel(tiny_model, tmp_path_factory.mktemp("survival") / "run", *FLAGS)
    server.wait_ready(START_LIMIT_S)
    server.serve_until_version(2)
    yield server
    assert server.stop() == 0


def named(server: ServedModel, name: str) -> psutil.Process | None:
    return next((p for p in server.processes() if p.name().startswith(name[:15]) or _title(p).startswith(name)), None)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(server: ServedModel, name: str) -> int:
    """SIGKILL a process of the server's, of which there is one or will be soon; its id."""
    wait_until(lambda: named(server, name) is not None, 120, f"there is a {name}")
    process = named(server, name)
    assert process is not None
    process.kill()
    return process.pid


def healthy(server: ServedModel) -> bool:
    try:
        server.get("/health")
    except OSError:
        return False
    return True


@pytest.mark.timeout(2400)
def test_processes_killed_at_random_cost_what_was_in_them_and_nothing_else(
    served: ServedModel, record_property: Callable[[str, object], None]
) -> None:
    prompts = random_prompts(8)
    expected = served.answers(prompts)
    store, rng = DrafterStore(served.run_dir / "drafters"), Random(5)
    faults = [*BESIDE, *SERVING, *rng.choices([*BESIDE, *SERVING], k=4)]
    rng.shuffle(faults)
    told = []
    for fault in faults:
        published = store.latest()
        with Traffic(served.url, mixed(served.model_name())) as traffic:
            wait_until(lambda seen=traffic.outcomes: seen[200] > 3, 60, "traffic runs")
            began = time.monotonic()
            gone = kill(served, (BESIDE | SERVING)[fault])
            if fault in SERVING:
                wait_until(lambda: not healthy(served), 60, "the server is gone")
                wait_until(lambda: healthy(served), START_LIMIT_S, "the server is back")
                before = traffic.outcomes[200]
                wait_until(lambda seen=traffic.outcomes, n=before: seen[200] > n + 3, 60, "and answers")
            else:
                wait_until(lambda pid=gone: not psutil.pid_exists(pid), 60, "it is gone")
                before = traffic.outcomes[200]
                wait_until(lambda seen=traffic.outcomes, n=before: seen[200] > n + 20, 60, "serving goes on")
            told.append((fault, round(time.monotonic() - began, 1), dict(traffic.outcomes)))
        if fault in BESIDE:
            assert traffic.failed == 0, told[-1]
        else:
            assert set(traffic.outcomes) <= {200, 503, NOBODY, *CUT_OFF}, told[-1]
            assert sum(traffic.outcomes[how] for how in CUT_OFF) <= 2 * traffic.clients, "those under way"
        assert store.latest() >= published, "no version was lost"
        assert served.answers(prompts) == expected, "the target's text, whatever drafts"
    record_property("faults", json.dumps(told))
    version = int(served.metric("aurora_drafter_version"))
    served.serve_until_version(version + 1)
    wait_until(lambda: named(served, BESIDE["reporter"]) is not None, 60, "the reporter is back")


@pytest.mark.timeout(1200)
def test_a_driver_that_is_killed_leaves_nothing_running_and_all_it_learned(tiny_model: Path, tmp_path: Path) -> None:
    prompts, run_dir = random_prompts(8), tmp_path / "run"
    first = ServedModel(tiny_model, run_dir, *FLAGS)
    try:
        first.wait_ready(START_LIMIT_S)
        first.serve_until_version(2)
        expected = first.answers(prompts)
        below = first.processes()
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait(20)
        psutil.wait_procs(below, timeout=90)
        assert [p.name() for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        first.stop()
    published = DrafterStore(run_dir / "drafters").latest()
    second = ServedModel(tiny_model, run_dir, *FLAGS)
    try:
        second.wait_ready(START_LIMIT_S)
        assert second.answers(prompts) == expected
        wait_until(lambda: second.metric("aurora_drafter_version") >= published, 60, "the newest version drafts")
        second.serve_until_version(published + 1)
    finally:
        second.stop()
    parent = json.loads((run_dir / "drafters" / f"v{published + 1:06d}" / "READY").read_text())["metadata"]
    steps = json.loads((run_dir / "drafters" / f"v{published:06d}" / "READY").read_text())["metadata"]["trainer_step"]
    assert parent["trainer_step"] > steps, "training went on from its checkpoint"


class SmallDisk(ServedModel):
    """A server whose run directory is a disk of its own, of 96 MiB."""

    def command(self, arguments: list[str]) -> list[str]:
        mount = 'mount -t tmpfs -o size=96m none "$0" && exec "$@"'
        return ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(self.run_dir), *arguments]

    @property
    def disk(self) -> Path:
        """The run directory as the server sees it."""
        return Path(f"/proc/{self.process.pid}/root") / str(self.run_dir).lstrip("/")


def may_mount() -> bool:
    trial = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="this machine lets no user mount a disk in a namespace of their own")
@pytest.mark.timeout(1200)
def test_a_full_disk_costs_what_cannot_be_written_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / "traces"
    server = SmallDisk(tiny_model, tmp_path / "run", *FLAGS, f"--set=capture.log_dir={log}", "--set=capture.log_mib=8")
    try:
        server.wait_ready(START_LIMIT_S)
        server.serve_until_version(2)
        filler = server.disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        with Traffic(server.url, mixed(server.model_name())) as traffic:
            wait_until(
                lambda: 'aurora_alarm{kind="training_unsaved"} 1.0' in server.get("/metrics"),
                120,
                "the alarm is raised",
            )
            wait_until(
                lambda: server.metric("aurora_traces_unlogged_total") > 0, 60, "traces are not logged, and counted"
            )
            assert server.metric("aurora_trainer_alive") == 1
            assert server.metric("aurora_training_share") > 0
            version = server.metric("aurora_drafter_version")
            filler.unlink()
            wait_until(
                lambda: 'aurora_alarm{kind="training_unsaved"} 0.0' in server.get("/metrics"), 120, "the alarm is over"
            )
            wait_until(lambda: server.metric("aurora_drafter_version") > version, 180, "what is learned is published")
        assert traffic.failed == 0
        assert traffic.outcomes[200] > 3
        store = DrafterStore(server.disk / "drafters")
        for number in store.versions():
            store.verify(number)
    finally:
        server.stop()
