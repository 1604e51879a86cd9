"""How trainers stay out of the server's way."""

import os

_LOWEST_PRIORITY = 19


def yield_to_others(nice: int) -> None:
    """Lower the priority of this thread and those it starts; at nice 19 they run only on idle cores (Linux)."""
    os.nice(nice)
    if nice == _LOWEST_PRIORITY and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
