"""Traces on disk, for `aurora train`: each payload that the engine gave is one file.

A directory holds `log.json` (whose traces they are) and `traces-N.msgpack` (`aurora.trace.encode_traces`) in the order
of N. A file appears whole or not at all. The traces hold users' text, so only their owner may read them, and they are
not kept for long: beyond a size and an age the oldest files are removed.
"""

import json
import os
import re
import time
from collections import deque
from pathlib import Path
from threading import Lock

from aurora.config import UserError

MANIFEST = "log.json"
_TRACES = re.compile(r"traces-(\d+)\.msgpack")
_STAGING = ".part"  # of what was not written to its end


class TraceLog:
    """Writes one directory, from any thread. One writer at a time; a restarted one goes on where the last one ended."""

    def __init__(self, directory: Path, limit_bytes: int, model: str, limit_s: float | None = None) -> None:
        """limit_s: age at which files leave; None: any. Raises UserError when `directory` cannot be written or holds
        something else.
        """
        self.directory = directory
        self.limit_bytes = limit_bytes
        self.limit_s = limit_s
        self._lock = Lock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._claim(model)
            for abandoned in directory.glob(f"*{_STAGING}"):
                abandoned.unlink()
            self._files = deque((path, path.stat().st_size) for path in log_files(directory))
        except OSError as error:
            raise UserError(f"capture.log_dir {directory}: {error.strerror}; give a writable directory") from error
        self.nbytes = sum(size for _, size in self._files)
        self._next = 1 + (_number(self._files[-1][0]) if self._files else 0)

    def _claim(self, model: str) -> None:
        if (self.directory / MANIFEST).exists():
            logged = logged_model(self.directory)
            if logged != model:
                raise UserError(f"capture.log_dir {self.directory}: holds traces of {logged}; give another directory")
        elif any(self.directory.iterdir()):
            raise UserError(f"capture.log_dir {self.directory}: is neither empty nor a log of traces; give another one")
        else:
            self._write(self.directory / MANIFEST, json.dumps({"model": model}).encode())

    def write(self, payload: bytes) -> None:
        """Add one payload; the oldest leave for it. Raises OSError when the disk does not take it."""
        with self._lock:
            path = self.directory / f"traces-{self._next:08d}.msgpack"
            self._next += 1
            self._write(path, payload)
            self._files.append((path, len(payload)))
            self.nbytes += len(payload)
            while self.nbytes > self.limit_bytes and len(self._files) > 1:
                self._drop_oldest()

    def expire(self) -> None:
        """Remove what is too old. Raises OSError when the disk does not do it."""
        with self._lock:
            while self.limit_s is not None and self._files and _age_s(self._files[0][0]) > self.limit_s:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        oldest, size = self._files[0]
        oldest.unlink(missing_ok=True)
        self._files.popleft()
        self.nbytes -= size

    def _write(self, path: Path, content: bytes) -> None:
        staging = path.with_suffix(_STAGING)
        with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
        staging.replace(path)


def purge(directory: Path, older_than_s: float = 0.0) -> tuple[int, int]:
    """Remove a log's traces, all or those of that age; returns files and bytes. A server may be writing there.

    Raises UserError when `directory` is no log of traces or does not let them go.
    """
    if older_than_s < 0:
        raise UserError(f"--older-than-days {older_than_s / 86400:g}: must be 0 or more")
    if not is_log(directory):
        raise UserError(f"{directory}: no log of traces (`capture.log_dir`); give one")
    files = [path for path in (*log_files(directory), *directory.glob(f"*{_STAGING}")) if _age_s(path) >= older_than_s]
    try:
        sizes = [path.stat().st_size for path in files]
        for path in files:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; run it as the owner of the log") from error
    return len(files), sum(sizes)


def _age_s(path: Path) -> float:
    """Seconds since a file was written; infinite for one that is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def is_log(directory: Path) -> bool:
    """Whether `directory` is a log of traces."""
    return (directory / MANIFEST).is_file()


def log_files(directory: Path) -> list[Path]:
    """The files of a log, oldest first."""
    return sorted((p for p in directory.iterdir() if _TRACES.fullmatch(p.name)), key=_number)


def logged_model(directory: Path) -> str:
    """The model whose traces they are. Raises UserError when `log.json` is damaged."""
    path = directory / MANIFEST
    try:
        return str(json.loads(path.read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: damaged ({error!r}); write {{"model": MODEL}} into it, or give another log'
        ) from error


def _number(path: Path) -> int:
    found = _TRACES.fullmatch(path.name)
    assert found is not None, "a file of a log"
    return int(found[1])
