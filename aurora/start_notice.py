"""Says now and then that a start goes on, so that nobody takes it for one that hangs."""

import time
from collections.abc import Callable

_EVERY_S = 30.0


class StartNotice:
    """Counts from its creation; `look` says something when the next half minute is over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._next_s = _EVERY_S

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began_s

    @property
    def rest_s(self) -> float:
        """Time until there is something to say."""
        return max(self._next_s - self.elapsed_s, 0.0)

    def look(self) -> None:
        """Call it as often as convenient while nothing serves yet."""
        if self.rest_s > 0:
            return
        print(f"aurora: still starting after {self.elapsed_s:.0f} s", flush=True)
        self._next_s = self.elapsed_s + _EVERY_S
