"""The custom resources that a cluster file gives its nodes: a Server takes 1 of "serve", a Trainer 1 of "train".

`ray up` returns when the head runs; the other nodes join minutes later. Whoever asks what the cluster has before that
would place the actors anywhere.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from aurora.config import UserError

log = logging.getLogger(__name__)

_PAUSE_S = 2.0


def await_roles(
    roles: Sequence[str],
    resources: Callable[[], Mapping[str, float]],
    limit_s: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Return once `resources()`, what the cluster has in all, holds every role; at once if `limit_s` is 0.

    Raises UserError when that takes longer.
    """
    end_s = clock() + limit_s
    said: list[str] = []
    while limit_s and (missing := [role for role in roles if resources().get(role, 0) < 1]):
        if clock() >= end_s:
            raise UserError(
                f"no node with the resource {' or '.join(missing)} joined within {limit_s:g} s (cluster.wait_s); "
                "`ray status` on the head says what became of them"
            )
        if missing != said:
            log.warning("waiting for a node with the resource %s", ", ".join(missing))
            said = missing
        pause(_PAUSE_S)
