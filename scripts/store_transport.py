"""What it takes to bring a drafter to another node: through Ray's object store, and as a plain copy of the file.

Starts two Ray nodes on this machine, which talk over loopback. The actor that hands out drafters runs on one, the
mirror of a server on the other; weights are random. Prints bytes and seconds of whole fetches, of copies, and of a
fetch that broke half way and went on.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import save_file

from aurora.config import AuroraConfig
from aurora.store import DrafterStore, sha256_file
from aurora.store_mirror import MirrorStep, StoreMirror
from aurora.store_offers import SourceUnreachable
from aurora.store_source import make_store_source
from serve.mirror import RemoteSource

_STARTS = 4
_HEAD = {"num_cpus": 1, "resources": {"source": 1}, "include_dashboard": False}


class Client:
    """The mirror of a server, on a node of its own."""

    def __init__(self, root: str, source: str, chunk_mib: int) -> None:
        self._root = Path(root)
        self._find = lambda: ray.get_actor(source)
        self._chunk = chunk_mib << 20

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def fetch(self, name: str, break_after: int | None = None) -> MirrorStep:
        """One step of a mirror; it breaks off after so many bytes."""
        source = RemoteSource(self._find, "eagle3", (ray.exceptions.RayError, ValueError))
        if break_after is not None:
            _break(source, break_after)
        mirror = StoreMirror(DrafterStore(self._root / name), source, chunk_bytes=self._chunk)
        return asyncio.run(mirror.step())

    def shown(self, name: str) -> dict[int, dict[str, str]]:
        """Digests of the versions that the mirror shows, computed anew."""
        store = DrafterStore(self._root / name)
        return {n: {f: sha256_file(store.verify(n).path / f) for f in store.read(n).digests} for n in store.versions()}


def _break(source: RemoteSource, after: int) -> None:
    whole, sent = source.chunk, 0

    async def chunk(digest: str, offset: int, length: int) -> bytes:
        nonlocal sent
        if sent + length > after:
            raise SourceUnreachable(f"broken after {sent} bytes")
        sent += length
        return await whole(digest, offset, length)

    source.chunk = chunk  # type: ignore[method-assign]


def _drafter(parameters: int) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        save_file({"weights": torch.randn(parameters)}, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")

    return write


def _measure(options: argparse.Namespace, root: Path, cluster: Cluster) -> None:
    there = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    config = AuroraConfig(run_dir=root / "trainer")
    store = DrafterStore(config.store_dir)
    here = ray.get_runtime_context().get_node_id()
    source = make_store_source(config, "source", {"source": 1})
    away = NodeAffinitySchedulingStrategy(there.node_id, soft=False)
    client: Any = (
        ray.remote(Client).options(scheduling_strategy=away).remote(str(root / "server"), "source", options.chunk)
    )
    print(
        f"source on node {here[:8]}, mirror on node {ray.get(client.node.remote())[:8]}, chunks of {options.chunk} MiB"
    )
    version = store.publish(_drafter(options.parameters), {})
    file = version.path / "model.safetensors"
    size = file.stat().st_size
    print(f"{options.parameters} parameters, {size} bytes of weights")
    ray.get(client.fetch.remote("warm-up"))
    ways: dict[str, list[float]] = {"fetch": [], "copy": [], "copy and fsync": [], "SHA-256": []}
    for i in range(options.repeats):  # in turns: the machine's pace changes
        did = ray.get(client.fetch.remote(f"whole-{i}"))
        assert did.fetched == 1, did.problems
        assert did.bytes == size + 2, "each byte once"
        ways["fetch"].append(did.seconds)
        ways["copy"].append(_timed(lambda: shutil.copyfile(file, root / "copy")))
        ways["copy and fsync"].append(_timed(lambda: _synced_copy(file, root / "copy")))
        ways["SHA-256"].append(_timed(lambda: sha256_file(file)))
    for way, seconds in ways.items():
        print(
            f"{way:<16}{statistics.median(seconds):8.3f} s median of {len(seconds)} "
            f"({min(seconds):.3f} to {max(seconds):.3f}), {size / statistics.median(seconds) / (1 << 20):8.1f} MiB/s"
        )
    broken = ray.get(client.fetch.remote("broken", size // 2))
    rest = ray.get(client.fetch.remote("broken"))
    assert broken.fetched is None
    assert rest.fetched == 1, rest.problems
    print(
        f"broken at half: {broken.bytes} bytes before ({'; '.join(broken.problems)}), {rest.bytes} after in "
        f"{rest.seconds:.3f} s: {broken.bytes + rest.bytes - size - 2} bytes sent again"
    )
    for name in ("whole-0", "broken"):
        assert ray.get(client.shown.remote(name)) == {1: version.digests}, name
    print("both are byte for byte what was published")
    ray.kill(source)


def _timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def _synced_copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def _start() -> Cluster:
    """A cluster of one node. On a busy machine Ray's processes may be later than it waits for them."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    for left in reversed(range(_STARTS)):
        try:
            return Cluster(initialize_head=True, head_node_args=_HEAD)
        except Exception as error:
            if type(error) is not Exception or not left:  # it raises the bare class, and only that, for late processes
                raise
            print(f"Ray did not start ({error}), once more", flush=True)
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=14_600_000, help="fp32 numbers of the drafter")
    parser.add_argument("--chunk", type=int, default=4, help="MiB a request")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    cluster = _start()
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        with tempfile.TemporaryDirectory() as root:
            _measure(options, Path(root), cluster)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
