"""Cores for an engine without a GPU where several servers may share a machine: each computes on its own."""

import fcntl
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from aurora.environment import engine_environment, has_gpu

log = logging.getLogger(__name__)

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


class CoreClaim:
    """`count` of these cores that no other claim has, until `release` or the end of the process.

    Where too few are free, `cores` are all of them: better shared than none. directory: of the locks, the same for all
    who may meet.
    """

    def __init__(self, count: int, among: Sequence[int], directory: Path) -> None:
        self._locks = ExitStack()
        with suppress(OSError):  # then no lock is to be had there
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.cores: list[int] = []
        for core in among:
            if len(self.cores) < count and self._has(directory / str(core)):
                self.cores.append(core)
        if len(self.cores) < count:
            log.warning(
                "%d of the %d cores that server.num_cpus wants are to be had in %s: all share",
                len(self.cores),
                count,
                directory,
            )
            self.release()
            self.cores = list(among)

    def _has(self, file: Path) -> bool:
        """Whether the lock is ours now."""
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another has it, or the file system knows no locks
            os.close(lock)
            return False
        self._locks.callback(os.close, lock)
        return True

    def release(self) -> None:
        """Let others have them."""
        self._locks.close()


def claim_cores(num_cpus: float | None) -> CoreClaim | None:
    """Bind this process's engine to as many cores; keep what is returned while it runs.

    None, and nothing is bound, where vLLM knows better: with a GPU, where a user has bound it, or where no number says
    that others compute here, too.
    """
    cores = sorted(os.sched_getaffinity(0))
    if num_cpus is None or num_cpus >= len(cores) or os.environ.get(_BIND) or has_gpu():
        return None
    claim = CoreClaim(max(int(num_cpus), 1), cores, Path(tempfile.gettempdir()) / f"aurora-cores-{os.getuid()}")
    os.environ.update(engine_environment(claim.cores))
    return claim
