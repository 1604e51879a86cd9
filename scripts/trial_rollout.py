"""How a drafter reaches the replicas: a worse one stops at the canary, and what a swap moves over the network."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from aurora.scrape import parse_samples
from aurora.store import DrafterStore
from scripts.trial_cluster import REPLICAS, ClusterServer, RayNodes, look
from tests.faults.test_drafters import changed
from tests.faults.traffic import Traffic, mixed
from tests.integration.process import random_prompts

_LIMIT_S = 600.0
_MEASURE_S = 5.0
_OFTEN = 0.3  # of the first tokens
_VERSIONS = 200  # without learning that much
_CAME = r"drafter version (\d+) came to (\S+): (\d+) bytes, ([\d.]+) s"
_LIVE = r"eagle3 version (\d+) is live after a stall of ([\d.]+) s"


@dataclass(frozen=True)
class CanaryRun:
    """Which versions each replica was seen with while a worse one was tried."""

    worse: int
    rejected_after_s: float
    seen: dict[str, set[int]]  # by replica
    requests: int
    failed: int
    reason: str

    @property
    def others_saw_it(self) -> int:
        return sum(self.worse in versions for name, versions in self.seen.items() if name != REPLICAS[0])


def try_worse(nodes: RayNodes, server: ClusterServer) -> CanaryRun:
    """Publish a drafter with its head's rows in disorder while the trainer stands still.

    Before that it learns a few prompts until its first tokens are often right: of one that is hardly ever right nothing
    is clearly worse.
    """
    store = DrafterStore(server.run_dir / "drafters")
    trainers = [p for p in nodes.network.processes("train") if p.name().startswith("ray::Trainer")]
    with Traffic(server.url, _familiar(server.model_name())) as traffic:
        while _right(server) < _OFTEN:
            assert _common(server) < _VERSIONS, "the drafter does not learn"
        for trainer in trainers:
            trainer.suspend()  # nothing newer hides what is published here
        try:
            good = store.latest()
            assert good is not None
            look(lambda: set(server.versions().values()) == {good}, _LIMIT_S, "both have the newest version")
            before = sum(traffic.outcomes.values()), traffic.failed
            worse = store.publish(changed(store.read(good).path, _scramble), {"parent": good}).number
            seen, took = _watch(server, lambda: store.rejection(worse) is not None)
            later, _ = _watch(server, lambda: server.versions().get(REPLICAS[0]) == good)
        finally:
            for trainer in trainers:
                trainer.resume()
        requests, failed = sum(traffic.outcomes.values()) - before[0], traffic.failed - before[1]
    found = {name: seen[name] | later[name] for name in REPLICAS}
    return CanaryRun(worse, took, found, requests, failed, store.rejection(worse) or "")


def _familiar(model: str) -> Callable[[Random], dict[str, Any]]:
    """Greedy requests with one of a few prompts."""
    prompts = random_prompts(8)
    return lambda rng: {
        "model": model,
        "prompt": rng.choice(prompts),
        "max_tokens": 48,
        "temperature": 0,
        "ignore_eos": True,
    }


def _right(server: ClusterServer) -> float:
    """Share of drafts whose first token was right, in the next seconds."""
    before = _first_drafts(server)
    time.sleep(_MEASURE_S)  # the span that is measured
    (right, of), (right_before, of_before) = _first_drafts(server), before
    return (right - right_before) / (of - of_before) if of > of_before else 0.0


def _first_drafts(server: ClusterServer) -> tuple[float, float]:
    page = parse_samples(server.get("/metrics"))
    right, of = (
        sum(value for labels, value in page.get(name, {}).items() if dict(labels)["position"] == "0")
        for name in ("aurora_accepted_at_total", "aurora_verified_at_total")
    )
    return right, of


def _common(server: ClusterServer) -> int:
    """The newest version that every replica has reached."""
    versions = server.versions()
    return min(versions.values()) if set(versions) == set(REPLICAS) else 0


def _watch(server: ClusterServer, happened: Callable[[], bool]) -> tuple[dict[str, set[int]], float]:
    """Versions seen at each replica until then, and the seconds that it took."""
    seen: dict[str, set[int]] = {name: set() for name in REPLICAS}

    def over() -> bool:
        for name, version in server.versions().items():
            seen[name].add(version)
        return happened()

    began = time.monotonic()
    look(over, _LIMIT_S, "the worse version is gone")
    return seen, time.monotonic() - began


def _scramble(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"].copy_(weights["lm_head.weight"][torch.randperm(len(weights["lm_head.weight"]))])


@dataclass(frozen=True)
class Moved:
    """What reached one replica over the network."""

    replica: str
    versions: int  # fetched
    swaps: int  # of which became live
    bytes_median: float
    seconds_median: float
    seconds_most: float


def move_versions(nodes: RayNodes, server: ClusterServer, versions: int) -> tuple[list[Moved], list[float]]:
    """Send traffic until both replicas have swapped to so many versions; what came, and the stalls of the swaps."""
    with Traffic(server.url, mixed(server.model_name())):
        look(lambda: min(_swaps(server).values(), default=0) >= versions, 2 * _LIMIT_S, f"{versions} swaps")
    swaps = _swaps(server)
    came: dict[str, list[tuple[int, float]]] = {name: [] for name in REPLICAS}
    for match in nodes.said(_CAME):
        replica = next(name for name in REPLICAS if name in match[2])
        came[replica].append((int(match[3]), float(match[4])))
    moved = [_moved(name, came[name], swaps[name]) for name in REPLICAS]
    return moved, [float(match[2]) for match in nodes.said(_LIVE)]


def _moved(replica: str, came: list[tuple[int, float]], swaps: int) -> Moved:
    sizes, seconds = zip(*came, strict=True)
    return Moved(replica, len(came), swaps, statistics.median(sizes), statistics.median(seconds), max(seconds))


def _swaps(server: ClusterServer) -> dict[str, int]:
    found = server.samples("aurora_swaps_total")
    return {name: int(found.get(name, 0)) for name in REPLICAS}


def sees(nodes: RayNodes, machine: str, directory: Path) -> bool:
    """Whether there is a drafter in the directory as a process of Ray's sees it on that machine."""
    for process in nodes.network.processes(machine):
        if re.search("raylet", process.name()):
            return any(Path(f"/proc/{process.pid}/root{directory}").glob("*"))
    raise AssertionError(f"no raylet on {machine}")
