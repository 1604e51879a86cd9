"""The run directory: made where it is missing, and in the hands of one `aurora serve` at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aurora.config import UserError

LOGS = "logs"  # link to where the processes of its newest server write
_LOCK = ".serving"  # holds the process id of who has it


def link_logs(run_dir: Path, logs: Path) -> None:
    """Have RUN_DIR/logs point there. Where it cannot, nothing is lost but the short way to them."""
    staging = run_dir / f".{LOGS}"
    with suppress(OSError):
        staging.unlink(missing_ok=True)
        staging.symlink_to(logs)
        staging.replace(run_dir / LOGS)


@contextmanager
def only_server_of(directory: Path) -> Iterator[None]:
    """Have the directory for this process alone. Raises UserError where it takes nothing or another server has it.

    Two trainers would publish into one store, under each other's parents. The lock goes with the process, however that
    ends; on a file system without locks nobody is held back.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--run-dir {directory}: {error.strerror}; give a directory that can be written") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 20).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"--run-dir {directory}: another `aurora serve` (process {owner}) has it; stop that one, or give each "
                "server a directory of its own"
            ) from None
        except OSError:
            pass
        with suppress(OSError):  # a full disk; who has it is only said
            os.truncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)
