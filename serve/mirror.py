"""The drafter stores of a server that does not share the trainer's file system: mirrors of the trainer's.

Ray is not imported here: what calls an actor is told which exceptions mean that it did not answer.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from aurora.config import AuroraConfig, UserError
from aurora.store import DrafterStore
from aurora.store_mirror import MirrorStep, StoreMirror
from aurora.store_offers import Source, SourceUnreachable
from serve.exporter import PrometheusExporter

log = logging.getLogger(__name__)

_ANSWER_S = 30.0  # longest time of an answer
_POLL_S = 1.0


class RemoteSource:
    """A `Source` behind an actor with `offers`, `chunk` and `reject`, whose first argument is the kind of drafter.

    find: gives the actor's handle; asked again after a failure, since another may have taken its place. errors: what
    `find` and calls raise when there is no answer.
    """

    def __init__(self, find: Callable[[], Any], kind: str, errors: tuple[type[Exception], ...]) -> None:
        self._find = find
        self._kind = kind
        self._errors: tuple[type[Exception], ...] = (TimeoutError, *errors)
        self._handle: Any = None

    async def offers(self) -> bytes:
        payload: bytes = await self._ask("offers")
        return payload

    async def chunk(self, digest: str, offset: int, length: int) -> bytes:
        data: bytes = await self._ask("chunk", digest, offset, length)
        return data

    async def reject(self, number: int, digests: dict[str, str], reason: str) -> None:
        await self._ask("reject", number, digests, reason)

    async def _ask(self, method: str, *args: Any) -> Any:
        try:
            self._handle = self._handle or self._find()
            async with asyncio.timeout(_ANSWER_S):
                return await getattr(self._handle, method).remote(self._kind, *args)
        except self._errors as error:
            self._handle = None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise SourceUnreachable(f"the trainer's drafter store does not answer: {reason}") from error


class ServedStores:
    """The stores that a server reads: the trainer's own, or mirrors of them in a directory of this node.

    config: the server's own, with its stores where they are read. source: makes the source of a kind of drafter
    (`eagle3`, `model`); None: the trainer's stores are on a file system that both see.
    """

    def __init__(self, config: AuroraConfig, source: Callable[[str], Source] | None, replica: str = "0") -> None:
        self.config = config if source is None else config.mirrored(replica)
        self._source = source
        self._mirrors: dict[str, StoreMirror] = {}

    def _mirror(self, kind: str, source: Source) -> StoreMirror:
        limit = self.config.cluster.fetch_mib_s
        return StoreMirror(self._plain(kind), source, bytes_per_s=None if limit is None else limit * (1 << 20))

    def _plain(self, kind: str) -> DrafterStore:
        return DrafterStore(self.config.draft_model_dir if kind == "model" else self.config.store_dir)

    def store(self, kind: str = "eagle3") -> DrafterStore:
        """The store to read this kind of drafter from, once `begin` is over."""
        return self._mirrors[kind].store if kind in self._mirrors else self._plain(kind)

    def all(self) -> dict[str, DrafterStore]:
        """By kind, each store that this server reads."""
        return {kind: self.store(kind) for kind in self._kinds}

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("eagle3", "model") if "model" in self.config.speculation.drafters else ("eagle3",)

    async def begin(self, limit_s: float) -> None:
        """Return when each mirror has a version to begin with: the source's newest, or what there is without one.

        Raises UserError when the trainer has published none after `limit_s`, and for a directory that cannot be used.
        """
        if self._source is None:
            return
        try:
            self._mirrors = {kind: self._mirror(kind, self._source(kind)) for kind in self._kinds}
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*map(_begin, self._mirrors.values()))
        except TimeoutError:
            raise UserError(
                f"no drafter came from the trainer's node within {limit_s:.0f} s (cluster.transport ray); see "
                "Ray's logs of the trainer, or raise server.start_timeout_s"
            ) from None
        except OSError as error:
            raise UserError(
                f"cluster.local_dir {self.config.run_dir}: {error.strerror}; give a directory that can be written"
            ) from error

    def loops(
        self, exporter: PrometheusExporter, live: dict[str, Callable[[], int]]
    ) -> list[Coroutine[Any, Any, None]]:
        """What keeps the mirrors in step for ever. live: by kind, tells the version that drafts."""
        for kind, mirror in self._mirrors.items():
            mirror.live = live[kind]
        return [mirror_forever(mirror, exporter, kind) for kind, mirror in self._mirrors.items()]


async def _begin(mirror: StoreMirror) -> None:
    said: list[str] = []
    while True:
        did = await mirror.step()
        _log_news(did, said, mirror)
        said = did.problems
        if mirror.store.latest() is not None and did.fetched is None:
            return
        if did.fetched is None:
            await asyncio.sleep(_POLL_S)


async def mirror_forever(
    mirror: StoreMirror, exporter: PrometheusExporter, kind: str, *, poll_s: float = _POLL_S
) -> None:
    """Keep a mirror in step; `swap_forever` finds in it what came. A source that is gone costs news, never serving."""
    said: list[str] = []
    while True:
        did = await mirror.step()
        exporter.inc("aurora_store_mirror_bytes_total", {"kind": kind}, did.bytes)
        exporter.inc("aurora_store_mirror_failures_total", {"kind": kind}, len(did.problems))
        exporter.set("aurora_store_mirror_source_alive", int(did.reachable), kind=kind)
        if did.fetched is not None:
            exporter.set("aurora_store_mirror_seconds", did.seconds, kind=kind)
        _log_news(did, said, mirror)
        said = did.problems
        if did.fetched is None:
            await asyncio.sleep(poll_s)


def _log_news(did: MirrorStep, said: list[str], mirror: StoreMirror) -> None:
    """Log what came, and a problem when it begins and when it ends, not at every look."""
    if did.fetched is not None:
        log.info(
            "drafter version %d came to %s: %d bytes, %.2f s", did.fetched, mirror.store.root, did.bytes, did.seconds
        )
    for problem in did.problems:
        if problem not in said:
            log.warning("%s; serving goes on with the versions in %s", problem, mirror.store.root)
    if said and not did.problems:
        log.info("%s follows its source again", mirror.store.root)
