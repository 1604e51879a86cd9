"""A replica's side of `aurora.rollout`: it asks the Router which versions it may use, and says how good its drafts are.

Without an answer it keeps what it has: going back to an older version is always allowed.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from aurora.metrics import EngineReport
from aurora.store import DrafterStore

log = logging.getLogger(__name__)

_ANSWER_S = 5.0


class RouterGone(RuntimeError):
    """The Router does not answer."""


class Router(Protocol):
    """What is asked of it. Both raise RouterGone."""

    async def allowed(self, kind: str, replica: str, live: int, latest: int) -> tuple[int, str]: ...

    async def observe(self, kind: str, live: int, first_drafts: Mapping[int, tuple[int, int]]) -> None: ...


class Canary:
    """Speaks for one replica."""

    def __init__(self, router: Router, replica: str) -> None:
        self._router = router
        self._replica = replica
        self._telling: set[asyncio.Task[None]] = set()

    async def permit(self, kind: str, live: int, newest: int) -> tuple[int, str]:
        """How new a version may be, and why the live one has to go ("": it has not); `serve.feedback.Permit`."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._router.allowed(kind, self._replica, live, newest)
        except (RouterGone, TimeoutError):
            return live, ""

    async def newest(self, stores: Mapping[str, DrafterStore]) -> dict[str, int]:
        """By kind, the newest version to start with; nothing where the store has none that is old enough."""
        found = {}
        for kind, store in stores.items():
            latest = store.latest()
            if latest is None:
                continue
            allowed = (await self.permit(kind, 0, latest))[0] or latest
            if store.latest(allowed) is not None:
                found[kind] = allowed
        return found

    def observer(self, kind: str, live: Callable[[], int], sign: int) -> Callable[[EngineReport], None]:
        """Tells the Router of first drafts by version; in reports they bear the sign of their kind (`aurora.trace`)."""

        def observe(report: EngineReport) -> None:
            mine = {sign * v: (n, right) for v, (n, right) in report.first_drafts.items() if sign * v > 0}
            if mine:
                task = asyncio.create_task(_passing_over(self._router.observe(kind, live(), mine)))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)

        return observe


async def _passing_over(telling: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(_ANSWER_S):
            await telling
    except (RouterGone, TimeoutError):
        log.debug("the router did not hear of drafts")
