"""The actor that hands out the trainer's drafters to servers on nodes that do not share its file system.

It lives on the trainer's node, apart from the trainer: what was published can be had while the trainer is dead. It
holds nothing but the two directories' names, so it restarts as it was.
"""

import asyncio
from typing import Any

from aurora.config import AuroraConfig
from aurora.store import DrafterStore
from aurora.store_offers import LocalSource


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


def learning_placement(role: str) -> Any:
    """Ties actors to one node for good: one of those with this role, a free one if there is one, else this process's.

    A node's drafters and checkpoints are on its own disk, so what needs them must not wander off to another.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    free = ray._private.state.available_resources_per_node()
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get(role)]
    nodes.sort(key=lambda n: (free.get(n, {}).get(role, 0) < 1, n))
    return NodeAffinitySchedulingStrategy(nodes[0] if nodes else ray.get_runtime_context().get_node_id(), soft=False)


def make_store_source(config: AuroraConfig, name: str, placement: Any) -> Any:
    """Create the actor; Ray restarts it without limit, and ends it when nobody holds what this returns."""
    import ray

    actor = ray.remote(StoreSource).options(
        name=name, num_cpus=0, scheduling_strategy=placement, max_restarts=-1, max_concurrency=16
    )
    return actor.remote(config)
