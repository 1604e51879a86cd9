"""A Ray cluster whose nodes are machines of a `trial_network.Network`, and `aurora serve` on it.

The roles are those of the Kubernetes chart: the head has Ray's services and no actor, `router` has `aurora serve` and
the endpoint, two nodes serve, one trains. A node's `ray start` that ends is started again, as a service manager does.
"""

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from aurora.config import UserError
from aurora.scrape import parse_samples
from scripts.trial_network import Network
from tests.integration.process import ServedModel
from tests.waiting import wait_until

MACHINES = {
    "head": {},
    "router": {"head": 1},
    "serve-a": {"serve": 1},
    "serve-b": {"serve": 1},
    "train": {"train": 1},
}
REPLICAS = ("replica-000", "replica-001")
# Of the machines that serve; the others have none to themselves.
CORES_EACH = max(len(os.sched_getaffinity(0)) // len(REPLICAS), 1)
_RAY_PORT, _PORT = 6379, 8000
_PORTS = (  # each machine has its own; for ports that its agents choose a raylet waits 15 s and no longer
    "--metrics-export-port=8080",
    "--dashboard-agent-listen-port=52365",
    "--dashboard-agent-grpc-port=52366",
    "--runtime-env-agent-port=52367",
)
_STORE_BYTES = 100 << 20
_HANGS_S = 120.0
_PAUSE_S = 2.0
_LOOK_S = 0.5
_START_LIMIT_S = 300.0
look = partial(wait_until, every_s=_LOOK_S)  # at metrics of other machines, which each look costs something


class Node:
    """One machine's part of the cluster, kept running until it is lost."""

    def __init__(self, network: Network, name: str, command: list[str], environment: dict[str, str], own: Path) -> None:
        """own: its directory, with Ray's in it, and its log beside it."""
        self.name = name
        self._network = network
        self._command, self._environment, self._log = command, environment, own.with_suffix(".log")
        self._cluster = own / "ray" / "ray_current_cluster"
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._over = threading.Event()

    def begin(self) -> None:
        self._wanted.set()
        self._thread.start()

    def _keep(self) -> None:
        while not self._over.is_set():
            if not self._wanted.wait(_LOOK_S):
                continue
            with self._log.open("a") as log:
                running = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
            if self.name == "head":
                _goes_first(running.pid)
            self._end_if_it_hangs(running)
            running.wait()
            self._over.wait(_PAUSE_S)

    def _end_if_it_hangs(self, running: "subprocess.Popen[bytes]") -> None:
        """`ray start` waits for ever for a raylet that has ended."""
        before = self.begun
        try:
            look(lambda: running.poll() is not None or self.begun > before, _HANGS_S, "Ray starts")
        except TimeoutError:
            self._network.end(self.name)

    def await_again(self, limit_s: float) -> None:
        """Return when Ray has started here once more. Raises TimeoutError."""
        before = self.begun
        look(lambda: self.begun > before, limit_s, f"Ray has started again on {self.name}")

    @property
    def begun(self) -> int:
        """Times that Ray has started here."""
        return self._log.read_text(errors="replace").count("Ray runtime started") if self._log.exists() else 0

    def lose(self) -> None:
        """The machine is gone: its cable first, so that nobody hears the processes end."""
        self._wanted.clear()
        self._network.plug(self.name, False)
        self._network.end(self.name)
        self._cluster.unlink(missing_ok=True)  # Ray takes others' raylets, which this host lists, for its own head's

    def give_back(self) -> None:
        """The machine is switched on again."""
        self._network.plug(self.name, True)
        self._wanted.set()

    def close(self) -> None:
        self._over.set()
        self._wanted.set()
        self._network.end(self.name)


def _goes_first(session: int) -> None:
    """Where the kernel weighs sessions: engines take all cores, and a raylet waits 15 s for its agent, no longer."""
    with suppress(OSError):
        Path(f"/proc/{session}/autogroup").write_text("-15")


class RayNodes:
    """All of them. Use `running`."""

    def __init__(self, network: Network, directory: Path, *, durable: bool, hidden: Path | None) -> None:
        """durable: the head keeps what it knows on disk. hidden: a directory that the serving nodes do not see."""
        self.network = network
        self.directory = directory
        self._ray = directory / "ray"  # where every machine sees Ray's directory, each its own
        self.address = f"{network.address('head')}:{_RAY_PORT}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": "180",
            "RAY_DISABLE_IMPORT_WARNING": "1",
        }
        if durable:
            self.environment |= {
                "RAY_gcs_storage": "rocksdb",
                "RAY_gcs_storage_path": str(directory / "gcs"),
                "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # that nodes wait for a head; Ray's 60 are soon over
            }
        self.nodes = {name: self._node(name, hidden) for name in MACHINES}

    def _node(self, name: str, hidden: Path | None) -> Node:
        where = ["--head", f"--port={_RAY_PORT}", f"--temp-dir={self._ray}", "--include-dashboard=false"]
        mounts = self._own(name, {self._ray, *([hidden] if hidden is not None and name.startswith("serve") else [])})
        command = [
            *("ray", "start", "--block", "--disable-usage-stats", "--include-log-monitor=false"),
            f"--node-ip-address={self.network.address(name)}",
            f"--num-cpus={CORES_EACH if name.startswith('serve') else int(name == 'train')}",
            f"--resources={json.dumps(MACHINES[name])}",
            f"--object-store-memory={_STORE_BYTES}",
            *_PORTS,
            *(where if name == "head" else [f"--address={self.address}"]),
        ]
        command = self.network.inside(name, command, mounts)
        return Node(self.network, name, command, self.environment, self.directory / name)

    def _own(self, name: str, places: set[Path]) -> dict[Path, Path]:
        """Directories that this machine has for itself, by where it sees them."""
        own = {place: self.directory / name / place.name for place in places}
        for directory in (*own, *own.values()):
            directory.mkdir(parents=True, exist_ok=True)
        return own

    def inside(self, name: str, command: list[str]) -> list[str]:
        """The command as run on that machine, which sees its own files of Ray's."""
        return self.network.inside(name, command, self._own(name, {self._ray}))

    def begin(self) -> None:
        """Start one after the other: together they are too slow for Ray's own limits on a small machine."""
        for node in self.nodes.values():
            node.begin()
            self.await_node(node.name)

    def await_node(self, name: str) -> None:
        """Return when Ray has started there. Raises UserError when that takes too long."""
        try:
            look(lambda: self.nodes[name].begun > 0, _START_LIMIT_S, "Ray starts")
        except TimeoutError as error:
            log = self.directory / f"{name}.log"
            raise UserError(f"Ray did not start on {name} within {_START_LIMIT_S:g} s; see {log}") from error

    def said(self, pattern: str) -> Iterator[re.Match[str]]:
        """Whatever the actors logged that matches."""
        for file in sorted(self.directory.glob("*/ray/session_2*/logs/worker-*")):
            if file.suffix in (".err", ".out"):
                yield from re.finditer(pattern, file.read_text(errors="replace"))

    def close(self) -> None:
        for node in reversed(self.nodes.values()):
            node.close()


@contextmanager
def running(directory: Path, *, durable: bool = True, hidden: Path | None = None) -> Iterator[RayNodes]:
    """The nodes, until the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with Network(list(MACHINES)) as network:
        nodes = RayNodes(network, directory, durable=durable, hidden=hidden)
        try:
            nodes.begin()
            yield nodes
        finally:
            nodes.close()


class ClusterServer(ServedModel):
    """`aurora serve --replicas 2` on the router's machine."""

    def __init__(self, nodes: RayNodes, model: str, run_dir: Path, *flags: str) -> None:
        self._nodes = nodes
        where = (f"--address={nodes.address}", f"--host={nodes.network.address('router')}", f"--port={_PORT}")
        wait = ("--insecure", f"--set=cluster.wait_s={_START_LIMIT_S:g}", f"--replicas={len(REPLICAS)}")
        cores = f"--set=server.num_cpus={CORES_EACH}"
        with _environment(nodes.environment):
            super().__init__(model, run_dir, *where, *wait, cores, *flags)

    def command(self, arguments: list[str]) -> list[str]:
        return self._nodes.inside("router", arguments)

    def wait_all(self, limit_s: float = 2 * _START_LIMIT_S) -> None:
        """Return when both replicas answer."""
        self.wait_ready(limit_s)
        look(lambda: self.up() == set(REPLICAS), limit_s, "both replicas are up")

    def samples(self, name: str) -> dict[str, float]:
        """A metric by replica, summed over its other labels; nothing while the endpoint does not answer."""
        with suppress(OSError, ValueError):
            found: dict[str, float] = {}
            for labels, value in parse_samples(self.get("/metrics")).get(name, {}).items():
                replica = dict(labels).get("replica", "")
                found[replica] = found.get(replica, 0.0) + value
            return found
        return {}

    def up(self) -> set[str]:
        """Names of the replicas that answer."""
        return {name for name, up in self.samples("aurora_router_replica_up").items() if up}

    def versions(self) -> dict[str, int]:
        """The drafter version that is live, by replica."""
        return {name: int(number) for name, number in self.samples("aurora_drafter_version").items()}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
