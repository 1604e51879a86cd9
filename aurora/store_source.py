"""The actor that hands out the trainer's drafters to servers on nodes that do not share its file system.

It lives on the trainer's node, apart from the trainer: what was published can be had while the trainer is dead. It
holds nothing but the two directories' names, so it restarts as it was.
"""

import asyncio
from typing import Any

from aurora.config import AuroraConfig
from aurora.store import DrafterStore
from aurora.store_offers import LocalSource

_LITTLE = 0.001  # of a machine's own resource, of which it has 1


class StoreSource:
    """The actor's class. kind: `eagle3` or `model`. See `aurora.store_offers.Source` for the methods."""

    def __init__(self, config: AuroraConfig) -> None:
        self._sources = {
            "eagle3": LocalSource(DrafterStore(config.store_dir)),
            "model": LocalSource(DrafterStore(config.draft_model_dir)),
        }

    async def offers(self, kind: str) -> bytes:
        return await asyncio.to_thread(self._sources[kind].offers)

    async def chunk(self, kind: str, digest: str, offset: int, length: int) -> bytes:
        return await asyncio.to_thread(self._sources[kind].chunk, digest, offset, length)

    async def reject(self, kind: str, number: int, digests: dict[str, str], reason: str) -> None:
        await asyncio.to_thread(self._sources[kind].reject, number, digests, reason)


def learning_place(role: str) -> dict[str, float]:
    """Resources that tie actors to one machine for good: one of those with this role, a free one if there is one, else
    this process's.

    A machine's drafters and checkpoints are on its own disk, so what needs them must not wander off to another. Ray
    gives a node that comes back another id, but its address is the machine's.
    """
    import ray

    free = ray._private.state.available_resources_per_node()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get(role)]
    nodes.sort(key=lambda n: (free.get(n["NodeID"], {}).get(role, 0) < 1, n["NodeID"]))
    address = nodes[0]["NodeManagerAddress"] if nodes else ray.util.get_node_ip_address()
    return {f"node:{address}": _LITTLE}


def make_store_source(config: AuroraConfig, name: str, place: dict[str, float]) -> Any:
    """Create the actor where `place` is; Ray restarts it without limit, and ends it when nobody holds what this
    returns."""
    import ray

    actor = ray.remote(StoreSource).options(name=name, num_cpus=0, resources=place, max_restarts=-1, max_concurrency=16)
    return actor.remote(config)
