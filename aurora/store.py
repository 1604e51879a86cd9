"""The drafter store: immutable, checksummed versions of a drafter in one directory tree.

Layout: `ROOT/v000007/{config.json, model.safetensors, READY}`. A version is written into a temporary directory beside
it, flushed, renamed into place, and only then marked with `READY`, which holds the SHA-256 of every other file. A
reader therefore sees a version whole or not at all, whatever the writer died of. A version that turned out bad is
marked `REJECTED` and is never the latest again.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

READY = "READY"
REJECTED = "REJECTED"
_STAGING = ".publish-"
_HELD = ".held-"  # and the number of a version that somebody reads
_HELD_S = 3600.0  # longest time that this counts: whoever died reading leaves its file
_VERSION_DIR = re.compile(r"v(\d{6,})")
ALLOWED_SUFFIXES = (".json", ".safetensors")


class DrafterRefused(ValueError):
    """A drafter directory that must not be loaded; the message names the file and the reason."""


@dataclass(frozen=True)
class DrafterVersion:
    """One published drafter."""

    number: int
    path: Path
    digests: dict[str, str]  # file name -> SHA-256, hex
    metadata: dict[str, Any]  # what the publisher said of it: parent version, gate results, tokens trained


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(directory: Path) -> None:
    for file in _plain_files(directory):
        _fsync(file)
    _fsync(directory)


def _record(digests: dict[str, str], metadata: dict[str, Any]) -> str:
    return json.dumps({"digests": digests, "metadata": metadata}, indent=1)


class DrafterStore:
    """Versions of one drafter. One writer at a time; any number of readers in any process."""

    def __init__(self, root: Path, at_most: int | None = None) -> None:
        """at_most: for this reader nothing newer is the latest; None: anything may be."""
        self.root = root
        self._at_most = at_most
        self._rejected: set[int] = set()  # by this process, whatever the disk took of it
        root.mkdir(parents=True, exist_ok=True)

    def publish(self, write: Callable[[Path], None], metadata: dict[str, Any]) -> DrafterVersion:
        """Let `write(directory)` fill a new version and make it visible.

        `metadata` must be JSON. Raises DrafterRefused if the files written are not plain JSON and safetensors; then, as
        on any other exception (a full disk's OSError), nothing becomes visible.
        """
        with self._staged(write) as (staging, digests):
            ready = _record(digests, metadata)
            _flush(staging)
            number = self._claim(staging)
        return self._mark_ready(number, ready)

    def adopt(
        self, number: int, write: Callable[[Path], None], digests: dict[str, str], metadata: dict[str, Any]
    ) -> DrafterVersion:
        """Let `write(directory)` fill what another store calls version `number` and make it visible under that number.

        Raises DrafterRefused unless the files written are those of `digests` (name to SHA-256, hex), and for a number
        that is taken; then nothing becomes visible. Call from the one writer only.
        """
        target = self._path(number)
        if (target / READY).exists():
            raise DrafterRefused(f"{target} is there already; remove it first")
        with self._staged(write) as (staging, found):
            odd = sorted({name for name, _ in found.items() ^ digests.items()})
            if odd:
                raise DrafterRefused(f"{target}: SHA-256 of {', '.join(odd)} differs from the published one")
            ready = _record(digests, metadata)
            _flush(staging)
            if target.exists():  # of a writer that died before READY: nobody reads it
                shutil.rmtree(target)
            staging.rename(target)
        self._rejected.discard(number)
        return self._mark_ready(number, ready)

    @contextmanager
    def _staged(self, write: Callable[[Path], None]) -> Iterator[tuple[Path, dict[str, str]]]:
        """A temporary directory that `write` filled and its files' digests; it goes if the body fails."""
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.root))
        staging.chmod(0o755)  # mkdtemp's 0700 would keep a server of another user out
        try:
            write(staging)
            yield staging, {f.name: sha256_file(f) for f in _plain_files(staging)}
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def _mark_ready(self, number: int, ready: str) -> DrafterVersion:
        target = self._path(number)
        marker = target / f".{READY}"
        marker.write_text(ready)
        _fsync(marker)
        marker.rename(target / READY)
        _fsync(target)
        _fsync(self.root)
        return self.read(number)

    def _claim(self, staging: Path) -> int:
        """Rename `staging` to the next free version number and return it."""
        number = 1 + max((int(m[1]) for m in map(_VERSION_DIR.fullmatch, os.listdir(self.root)) if m), default=0)
        while True:
            try:
                staging.rename(self._path(number))
                return number
            except OSError:
                if not self._path(number).exists():
                    raise
                number += 1

    def _path(self, number: int) -> Path:
        return self.root / f"v{number:06d}"

    def reject(self, number: int, reason: str) -> None:
        """Take a version out of use for good. Any process may say so; a full disk keeps the mark, if not the reason.

        One that takes no mark at all is logged as an error: other processes do not learn of it.
        """
        self._rejected.add(number)
        mark = self._path(number) / REJECTED
        try:
            mark.touch()
            mark.write_text(reason)
        except OSError as error:
            log.error("%s: not marked (%s); remove the version's directory", mark, error.strerror)

    def rejection(self, number: int) -> str | None:
        """Why a version was rejected ("" where the reason is not known), or None."""
        try:
            return (self._path(number) / REJECTED).read_text(errors="replace")
        except OSError:
            return "" if self._is_rejected(number) else None

    def versions(self) -> list[int]:
        """Numbers of the READY versions, rejected ones included, ascending."""
        found = (_VERSION_DIR.fullmatch(p.name) for p in self.root.iterdir())
        return sorted(int(m[1]) for m in found if m and (self.root / m[0] / READY).is_file())

    def latest(self, at_most: int | None = None) -> int | None:
        """Number of the newest READY version that was not rejected, or None. at_most: of those up to this number."""
        bounds = [bound for bound in (at_most, self._at_most) if bound is not None]
        numbers = (n for n in self.versions() if all(n <= bound for bound in bounds))
        return max((n for n in numbers if not self._is_rejected(n)), default=None)

    def _is_rejected(self, number: int) -> bool:
        return number in self._rejected or (self._path(number) / REJECTED).exists()

    def read(self, number: int) -> DrafterVersion:
        """The record of a READY version; files are not read (see `verify`). Raises DrafterRefused."""
        path = self._path(number)
        try:
            record = json.loads((path / READY).read_text())
            return DrafterVersion(number, path, dict(record["digests"]), dict(record["metadata"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DrafterRefused(f"drafter version {number} in {self.root} is not readable: {error}") from error

    def verify(self, number: int) -> DrafterVersion:
        """Re-hash every file of a version against its READY record. Raises DrafterRefused naming the file."""
        version = self.read(number)
        present = {f.name for f in _plain_files(version.path)}
        if present != set(version.digests):
            odd = sorted(present ^ set(version.digests))
            raise DrafterRefused(f"{version.path}: files {odd} are missing or were added after publication")
        for name, digest in version.digests.items():
            if sha256_file(version.path / name) != digest:
                raise DrafterRefused(f"{version.path / name}: SHA-256 differs from the published one; publish it again")
        return version

    def prune(self, keep: int) -> list[int]:
        """Remove all but the latest, the newest `keep` and those that are held; returns the numbers removed.

        Call from the writer only. What a writer that died left behind goes, too.
        """
        self.clear_abandoned()
        kept = {self.latest(), *self._held()}
        removed = [number for number in self.versions()[: -keep or None] if number not in kept]
        for number in removed:
            self.remove(number)
        return removed

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Inside, `prune` leaves a version alone, in whatever process. Raises DrafterRefused if it is gone already."""
        with ExitStack() as stack:
            with suppress(OSError):  # a full disk is no reason not to read
                stack.enter_context(tempfile.NamedTemporaryFile(prefix=f"{_HELD}{number}-", dir=self.root))
            self.read(number)
            yield

    def _held(self) -> set[int]:
        """Versions that somebody reads; marks that are too old are removed."""
        found = set()
        for mark in self.root.glob(f"{_HELD}*"):
            with suppress(OSError, ValueError):
                if time.time() - mark.stat().st_mtime > _HELD_S:
                    mark.unlink()
                else:
                    found.add(int(mark.name.removeprefix(_HELD).split("-")[0]))
        return found

    def remove(self, number: int) -> None:
        """Take a version away, and what was said of it. Call from the writer only."""
        (self._path(number) / READY).unlink()
        shutil.rmtree(self._path(number))
        self._rejected.discard(number)

    def clear_abandoned(self) -> None:
        """Remove what a writer that died left behind. Call from the writer only."""
        for abandoned in self.root.glob(f"{_STAGING}*"):
            shutil.rmtree(abandoned)


def _plain_files(directory: Path) -> list[Path]:
    """The drafter's files, sorted; refuses links, folders and any format that could hold code."""
    files = sorted(p for p in directory.iterdir() if p.name not in (READY, f".{READY}", REJECTED))
    for path in files:
        if path.is_symlink() or not path.is_file():
            raise DrafterRefused(f"{path}: only plain files belong in a drafter directory")
        if path.suffix not in ALLOWED_SUFFIXES:
            allowed = " and ".join(ALLOWED_SUFFIXES)
            raise DrafterRefused(f"{path}: only {allowed} files are loaded, never pickle or code")
    if not any(p.suffix == ".safetensors" for p in files):
        raise DrafterRefused(f"{directory}: no .safetensors file")
    return files
