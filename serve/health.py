"""Whether the engine is alive: one that is busy answers between two steps, one that hangs does not."""

import asyncio
import logging
import os

from serve.engine import RunningEngine

log = logging.getLogger(__name__)

_CHECK_S = 1.0
_ASK_S = 10.0  # the engine rests between two steps only if it is seldom asked


async def end_with_engine(engine: RunningEngine, hang_s: float) -> None:
    """End the process once its engine has died or hangs, so that Ray restarts both."""
    log.error("%s; the server restarts", await _failure(engine, hang_s))
    os._exit(1)


async def _failure(engine: RunningEngine, hang_s: float) -> str:
    """Returns what is wrong with the engine as soon as something is."""
    while True:
        answer = asyncio.ensure_future(engine.client.collective_rpc("check_health"))
        waited = 0.0
        while not answer.done() and waited < hang_s and not engine.client.errored:
            await asyncio.wait([answer], timeout=_CHECK_S)
            waited += _CHECK_S
        if engine.client.errored or (answer.done() and answer.exception() is not None):
            return "the engine died"
        if not answer.done():
            return f"the engine has not answered for {hang_s:g} s (server.hang_s)"
        for _ in range(int(_ASK_S / _CHECK_S)):
            await asyncio.sleep(_CHECK_S)
            if engine.client.errored:
                return "the engine died"
