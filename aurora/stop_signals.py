"""SIGINT and SIGTERM for whoever keeps a deployment running."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType

_DRAINS = b"aurora: stops once the open requests have ended; a second signal does not wait for them\n"
_ENDS = b"aurora: stops; nothing is being served\n"


class StopSignals:
    """Calls `drain`, or `kill` while nothing is served, at the first SIGINT or SIGTERM; the second ends this process.

    A server that is starting is too busy to listen, and has nothing to drain.
    """

    def __init__(self, drain: Callable[[], object], kill: Callable[[], object]) -> None:
        self.received = False
        self.serving = False
        self._drain, self._kill = drain, kill
        self._queue: SimpleQueue[int] = SimpleQueue()  # unlike an Event it may be filled from a signal handler
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def wait(self, limit_s: float) -> bool:
        """Whether a signal came, at the latest after `limit_s`."""
        with suppress(Empty):
            self._queue.get(timeout=limit_s)
        return self.received

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            sys.exit(128 + number)
        self.received = True
        with suppress(OSError):  # not print: what it writes to may be in the middle of a line of this very thread
            os.write(sys.stderr.fileno(), _DRAINS if self.serving else _ENDS)
        self._queue.put(number)
        (self._drain if self.serving else self._kill)()
