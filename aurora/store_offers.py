"""What a drafter store tells stores elsewhere, and the side of it that answers.

A source lists its versions (`offers`) and hands out bytes of their files by SHA-256 (`chunk`); it takes no path from
anyone. `aurora.store_mirror` is the side that asks.
"""

import os
import re
from pathlib import Path
from typing import Any, Protocol

import msgspec

from aurora.store import ALLOWED_SUFFIXES, DrafterRefused, DrafterStore

MAX_CHUNK = 32 << 20  # bytes of an answer
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class SourceUnreachable(ConnectionError):
    """The source does not answer; the message says why."""


class OfferedFile(msgspec.Struct, frozen=True):
    """One file of a version."""

    digest: str  # SHA-256, hex
    size: int  # bytes


class Offer(msgspec.Struct, frozen=True):
    """One version that a source has."""

    number: int
    files: dict[str, OfferedFile]  # by name
    metadata: dict[str, Any]
    rejected: str | None = None  # why, if it was

    @property
    def digests(self) -> dict[str, str]:
        return {name: file.digest for name, file in self.files.items()}


class Source(Protocol):
    """A store elsewhere. Every method raises SourceUnreachable."""

    async def offers(self) -> bytes:
        """What `read_offers` reads."""

    async def chunk(self, digest: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset` of the file with this SHA-256; b"" for one that is no longer there."""

    async def reject(self, number: int, digests: dict[str, str], reason: str) -> None:
        """A version with these files drafts badly."""


def read_offers(payload: bytes) -> dict[int, Offer]:
    """The offers by version number, ascending. Raises DrafterRefused for what `LocalSource.offers` never makes."""
    try:
        offers = msgspec.msgpack.decode(payload, type=list[Offer])
    except msgspec.DecodeError as error:  # ValidationError is one
        raise DrafterRefused(f"the source's list of versions is not readable: {error}") from error
    return {offer.number: offer for offer in sorted(offers, key=lambda o: o.number)}


def check_offer(offer: Offer) -> None:
    """Raises DrafterRefused for an offer of anything but files of a drafter, by their plain names."""
    where = f"version {offer.number} of the source"
    if offer.number < 1:
        raise DrafterRefused(f"{where}: versions count from 1")
    for name, file in offer.files.items():
        if not _NAME.fullmatch(name) or not name.endswith(ALLOWED_SUFFIXES):
            raise DrafterRefused(f"{where}: {name!r} is no name of a drafter's file")
        if not _DIGEST.fullmatch(file.digest) or file.size < 0:
            raise DrafterRefused(f"{where}: {name} has no SHA-256 or no size")


class LocalSource:
    """Answers for a store on this machine's disk, which another process writes."""

    def __init__(self, store: DrafterStore) -> None:
        self._store = store
        self._paths: dict[str, Path] = {}  # by SHA-256

    def offers(self) -> bytes:
        """The versions that are READY now."""
        found: list[msgspec.Raw] = []
        paths: dict[str, Path] = {}
        for number in self._store.versions():
            try:
                version = self._store.read(number)
                files = {name: _offered(version.path / name, digest) for name, digest in version.digests.items()}
                offer = Offer(number, files, version.metadata, self._store.rejection(number))
                check_offer(offer)
                encoded = msgspec.Raw(msgspec.msgpack.encode(offer))
            except (OSError, TypeError, ValueError, OverflowError):  # being pruned, or damaged
                continue
            paths |= {digest: version.path / name for name, digest in version.digests.items()}
            found.append(encoded)
        self._paths = paths
        return msgspec.msgpack.encode(found)

    def chunk(self, digest: str, offset: int, length: int) -> bytes:
        """As `Source.chunk`; knows the files of the last `offers`."""
        path = self._paths.get(digest)
        if path is None:
            return b""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return b""
        try:
            return os.pread(descriptor, min(max(length, 0), MAX_CHUNK), max(offset, 0))
        finally:
            os.close(descriptor)

    def reject(self, number: int, digests: dict[str, str], reason: str) -> None:
        """Mark the version, if it is the one that is meant and still here."""
        if number in self._store.versions() and self._store.read(number).digests == digests:
            self._store.reject(number, reason)


def _offered(path: Path, digest: str) -> OfferedFile:
    return OfferedFile(digest, path.lstat().st_size)
