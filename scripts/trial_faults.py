"""What is lost when a part of the cluster is: machines and cables, one after the other, under traffic."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aurora.store import DrafterStore
from scripts.trial_cluster import REPLICAS, ClusterServer, RayNodes, look
from tests.faults.traffic import Traffic, mixed

_SETTLE_S = 600.0
_BEFORE = 20  # answers before a fault, and after it is over
_LOOK_S = 0.25


@dataclass
class Trial:
    """A cluster with a server on it; `serve` is another one after the first has ended."""

    nodes: RayNodes
    server: ClusterServer
    serve: Callable[[], ClusterServer]

    @property
    def store(self) -> DrafterStore:
        return DrafterStore(self.server.run_dir / "drafters")

    def newest(self) -> int:
        return self.store.latest() or 0

    def learns_beyond(self, number: int) -> bool:
        """Whether both replicas draft with something newer."""
        versions = self.server.versions()
        return set(versions) == set(REPLICAS) and min(versions.values()) > number

    def all_up(self) -> bool:
        return self.server.up() == set(REPLICAS)


@dataclass(frozen=True)
class Fault:
    """What happens to the cluster, for how long, how it is mended, and when it counts as over."""

    name: str
    lasts_s: float
    strike: Callable[[Trial], None]
    mend: Callable[[Trial], None]
    over: Callable[[Trial, int], bool]  # the newest version when it was mended
    durable: bool = True  # whether the head keeps what it knows on disk


@dataclass(frozen=True)
class Suffered:
    """What one fault cost. Seconds of recovery count from when the machine or cable was back."""

    fault: str
    lasted_s: float
    requests: int
    failed: int
    silence_s: float  # longest time without an answer to anybody
    usual_silence_s: float  # the same before it
    recovered_s: float
    versions_lost: int
    traces_dropped: float
    outcomes: dict[str, int]


@dataclass
class Silence(Traffic):
    """Traffic that knows the longest time between two answers since it was last asked."""

    def __enter__(self) -> Self:
        self._seen, self._since_s, self._longest_s = 0, time.monotonic(), 0.0
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look_forever, daemon=True)
        self._looking.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._looking.join()
        super().__exit__(*error)

    def _look_forever(self) -> None:
        while not self._over.wait(_LOOK_S):
            now_s = time.monotonic()
            self._longest_s = max(self._longest_s, now_s - self._since_s)
            if self.outcomes[200] > self._seen:
                self._seen, self._since_s = self.outcomes[200], now_s

    def longest_s(self) -> float:
        """And begin anew."""
        longest, self._longest_s = self._longest_s, 0.0
        return longest

    def more_answers(self, count: int, limit_s: float) -> None:
        wanted = self.outcomes[200] + count
        look(lambda: self.outcomes[200] >= wanted, limit_s, f"{count} more answers")


def suffer(trial: Trial, fault: Fault) -> Suffered:
    """Let it happen under traffic, mend it, and wait until it is over; inf seconds of recovery when it never is."""
    look(trial.all_up, _SETTLE_S, "both replicas are up")
    dropped = _dropped(trial)
    versions = set(trial.store.versions())
    with Silence(trial.server.url, mixed(trial.server.model_name())) as traffic:
        traffic.more_answers(_BEFORE, _SETTLE_S)
        usual = traffic.longest_s()
        fault.strike(trial)
        time.sleep(fault.lasts_s)  # how long it lasts is what is tried, whatever happens meanwhile
        mended_s = time.monotonic()
        fault.mend(trial)
        before = trial.newest()
        try:
            look(lambda: fault.over(trial, before), _SETTLE_S, f"{fault.name} is over")
            recovered = time.monotonic() - mended_s
            traffic.more_answers(_BEFORE, _SETTLE_S)
        except TimeoutError:
            recovered = math.inf
    return Suffered(
        fault.name,
        fault.lasts_s,
        sum(traffic.outcomes.values()),
        traffic.failed,
        traffic.longest_s(),
        usual,
        recovered,
        len(versions - set(trial.store.versions())),
        max(_dropped(trial) - dropped, 0.0),
        {str(outcome): count for outcome, count in traffic.outcomes.items()},
    )


def _dropped(trial: Trial) -> float:
    return sum(trial.server.samples("aurora_traces_dropped_total").values())


def _lose(*names: str) -> Callable[[Trial], None]:
    def strike(trial: Trial) -> None:
        for name in names:
            trial.nodes.nodes[name].lose()

    return strike


def _give_back(*names: str) -> Callable[[Trial], None]:
    def mend(trial: Trial) -> None:
        for name in names:
            trial.nodes.nodes[name].give_back()

    return mend


def _pull(name: str, inserted: bool) -> Callable[[Trial], None]:
    return lambda trial: trial.nodes.network.plug(name, inserted)


def _part(apart: bool) -> Callable[[Trial], None]:
    return lambda trial: trial.nodes.network.part(("train", "serve-a", "serve-b"), apart)


def _serve_again(*lost: str) -> Callable[[Trial], None]:
    """The machines are back, and `aurora serve` is started again once it has ended."""

    def mend(trial: Trial) -> None:
        _give_back(*lost)(trial)
        code = trial.server.process.wait(_SETTLE_S)
        trial.server.log.rename(trial.server.log.with_name(f"serve-ended-{code}.log"))
        trial.server = trial.serve()

    return mend


def _head_back(trial: Trial) -> None:
    """And a process that dies afterwards is started anew, which takes a head that knows the actors."""
    head = trial.nodes.nodes["head"]
    head.give_back()
    head.await_again(_SETTLE_S)
    for process in trial.nodes.network.processes("train"):
        if process.name().startswith("ray::Trainer"):
            process.kill()


def _learns(trial: Trial, before: int) -> bool:
    alive = trial.server.samples("aurora_trainer_alive")
    return trial.learns_beyond(before) and all(alive.get(name) for name in REPLICAS)


def _up(trial: Trial, _before: int) -> bool:
    return trial.all_up()


def _up_and_learns(trial: Trial, before: int) -> bool:
    return trial.all_up() and _learns(trial, before)


FAULTS = (
    Fault("trainer and servers cut off from each other", 90, _part(True), _part(False), _learns),
    Fault("trainer's cable out, short", 8, _pull("train", False), _pull("train", True), _learns),
    Fault("trainer's machine lost", 45, _lose("train"), _give_back("train"), _learns),
    Fault("a serving machine's cable out, short", 8, _pull("serve-b", False), _pull("serve-b", True), _up),
    Fault("a serving machine lost", 60, _lose("serve-b"), _give_back("serve-b"), _up_and_learns),
    Fault("the first serving machine lost", 60, _lose("serve-a"), _give_back("serve-a"), _up_and_learns),
    Fault("head lost", 10, _lose("head"), _head_back, _up_and_learns),
    Fault("router's machine lost", 10, _lose("router"), _serve_again("router"), _up_and_learns),
    Fault("head lost with all it knew", 10, _lose("head"), _serve_again("head"), _up_and_learns, durable=False),
)


def chosen(names: Sequence[str]) -> list[Fault]:
    """Those whose names begin so; all without names."""
    return [fault for fault in FAULTS if not names or fault.name.startswith(tuple(names))]


@contextmanager
def _ended(trial: Trial) -> Iterator[None]:
    try:
        yield
    finally:
        trial.server.stop()


def suffer_all(
    nodes: RayNodes, model: Path, run_dir: Path, flags: Sequence[str], faults: Sequence[Fault]
) -> Iterator[Suffered]:
    """Each fault after the other on one deployment."""

    def serve() -> ClusterServer:
        server = ClusterServer(nodes, str(model), run_dir, *flags)
        server.wait_all()
        return server

    trial = Trial(nodes, serve(), serve)
    with _ended(trial):
        for fault in faults:
            yield suffer(trial, fault)
