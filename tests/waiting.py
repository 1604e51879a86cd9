"""Waiting for something that another process or thread does."""

import time
from collections.abc import Callable

_LOOK_S = 0.05


def wait_until(happened: Callable[[], bool], limit_s: float, what: str) -> None:
    """Return as soon as `happened()`. Raises AssertionError naming `what` when it has not after `limit_s`."""
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end, f"after {limit_s:g} s: {what}"
        time.sleep(_LOOK_S)  # what other processes do is no event here: it can only be looked at again
