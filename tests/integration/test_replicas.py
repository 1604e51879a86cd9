"""Two servers behind one endpoint: what goes to which, what a death costs, and who gets a new drafter first."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import Any

import httpx
import psutil
import pytest
import torch

from aurora.store import DrafterStore
from tests.faults.test_drafters import changed
from tests.integration.conftest import LEARNING
from tests.integration.process import START_LIMIT_S, ServedModel, random_prompts
from tests.waiting import wait_until

pytestmark = pytest.mark.engine

FLAGS = (
    *LEARNING,
    "--replicas=2",
    "--drafters=eagle3",
    "--fixed-k=2",
    "--set=cluster.canary_s=60",
)


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    server = ServedModel(tiny_model, tmp_path_factory.mktemp("fleet") / "run", *FLAGS)
    server.wait_ready(2 * START_LIMIT_S)
    wait_until(lambda: len(up(server)) == 2, 2 * START_LIMIT_S, "both replicas are up")
    yield server
    assert server.stop() == 0


def up(server: ServedModel) -> set[str]:
    """Names of the replicas that answer."""
    lines = [line for line in server.get("/metrics").splitlines() if line.startswith("aurora_router_replica_up")]
    return {line.split('"')[1] for line in lines if line.endswith(" 1.0")}


def versions(server: ServedModel) -> dict[str, int]:
    """The drafter version that is live, by replica."""
    lines = [line for line in server.get("/metrics").splitlines() if line.startswith("aurora_drafter_version{")]
    return {line.split('"')[1]: int(float(line.split()[-1])) for line in lines}


def answered_by(server: ServedModel, prompt: list[int]) -> str:
    body = {"model": server.model_name(), "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-aurora-replica"]


def processes(server: ServedModel, name: str) -> list[psutil.Process]:
    return [process for process in server.processes() if process.name().startswith(name[:15])]


def test_both_answer_and_say_the_same(fleet: ServedModel) -> None:
    prompts = random_prompts(8)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda prompt: answered_by(fleet, prompt), prompts)) == up(fleet)
    assert fleet.answers(prompts) == fleet.answers(prompts)


def test_the_page_shows_what_all_of_them_do_and_which_version_each_has(fleet: ServedModel) -> None:
    def seen(replica: str = "") -> dict[str, Any]:
        data: dict[str, Any] = json.loads(fleet.get(f"/aurora/data?replica={replica}"))
        return data

    names = up(fleet)
    wait_until(lambda: _traffic_until(fleet, bool(seen()["points"])), 120, "a span of ten seconds is over")
    data = seen()
    assert {name: live["eagle3"] for name, live in data["replicas"].items()}.keys() == names
    assert {swap["replica"] for swap in data["swaps"]} == names, "each began with a version"
    alone = {name: seen(name) for name in names}
    assert all(hour["replica"] == name for name, hour in alone.items())
    until_s = data["points"][-1]["time_s"]
    told = [point for hour in alone.values() for point in hour["points"] if point["time_s"] <= until_s]
    assert sum(point["emitted"] for point in data["points"]) == sum(point["emitted"] for point in told) > 0


def test_a_new_version_is_tried_by_one_and_then_reaches_both_and_a_worse_one_only_the_canary(
    fleet: ServedModel,
) -> None:
    store = DrafterStore(fleet.run_dir / "drafters")
    fleet.serve_until_version(2)
    wait_until(lambda: _traffic_until(fleet, min(versions(fleet).values()) >= 2), 120, "both have a newer version")
    trainer = processes(fleet, "ray::Trainer")[0]
    trainer.suspend()  # so that nothing newer hides what is published here
    try:
        good = store.latest()
        assert good is not None
        wait_until(lambda: _traffic_until(fleet, set(versions(fleet).values()) == {good}), 120, "both have caught up")
        worse = store.publish(changed(store.read(good).path, _scramble), {"parent": good}).number
        seen: dict[str, set[int]] = {name: set() for name in up(fleet)}

        def taken_back() -> bool:
            for name, version in versions(fleet).items():
                seen[name].add(version)
            return _traffic_until(fleet, store.latest() == good)

        wait_until(taken_back, 300, "the worse version is rejected")
        canary, *others = sorted(seen)
        assert not any(worse in seen[name] for name in others), "only the canary ever had it"
        wait_until(lambda: versions(fleet)[canary] == good, 60, "the canary is back, too")
    finally:
        trainer.resume()


def _traffic_until(server: ServedModel, done: bool) -> bool:
    """`done`, after a little traffic if it is not."""
    if not done:
        server.answers(random_prompts(4), tokens=24)
    return done


def _scramble(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"].copy_(weights["lm_head.weight"][torch.randperm(len(weights["lm_head.weight"]))])


def test_a_replica_that_dies_costs_only_what_it_had_begun_to_say(fleet: ServedModel) -> None:
    body = {"model": fleet.model_name(), "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    begun = Semaphore(0)

    def stream(seed: int) -> str:
        """How a stream ended."""
        with httpx.stream("POST", f"{fleet.url}/v1/completions", json=body | {"seed": seed}, timeout=300) as answer:
            assert answer.status_code == 200, answer.read()
            last = []
            for line in filter(None, answer.iter_lines()):
                last = [*last[-1:], line.removeprefix("data: ")]
                begun.release()
        assert last[-1] == "[DONE]"
        return "broken" if "error" in json.loads(last[-2]) else "whole"

    with ThreadPoolExecutor(24) as pool:
        streams = [pool.submit(stream, seed) for seed in range(24)]
        assert begun.acquire(timeout=120), "tokens come"
        processes(fleet, "ray::Server")[-1].kill()
        ends = [running.result() for running in streams]
    assert ends.count("whole") >= 8, "those of the other replica, and those that had not begun"
    assert set(ends) <= {"whole", "broken"}
    assert answered_by(fleet, random_prompts(1)[0]) in up(fleet)
    wait_until(lambda: len(up(fleet)) == 2, 2 * START_LIMIT_S, "it is back")


def test_the_router_comes_back_where_it_was(fleet: ServedModel) -> None:
    processes(fleet, "ray::Router")[0].kill()

    def answers() -> bool:
        try:
            return len(up(fleet)) == 2
        except OSError:
            return False

    wait_until(answers, 120, "the router is back and knows both")
    answered_by(fleet, random_prompts(1)[0])


def test_replicas_join_and_leave_while_it_runs(fleet: ServedModel) -> None:
    def scale(replicas: int) -> str:
        command = [sys.executable, "-m", "aurora.cli", "scale", str(replicas), "--run-dir", str(fleet.run_dir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "replica-000" in scale(1)
    wait_until(lambda: up(fleet) == {"replica-000"}, 120, "one has left")
    assert answered_by(fleet, random_prompts(1)[0]) == "replica-000"
    scale(2)
    wait_until(lambda: len(up(fleet)) == 2, 2 * START_LIMIT_S, "another one has joined")
