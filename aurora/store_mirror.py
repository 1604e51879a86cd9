"""Keeps a drafter store on this machine in step with one elsewhere, without a file system that both see.

A version is shown under the number that it has at the source, whole and byte for byte the same, or not at all. Files
are told by their SHA-256: what is here already is linked, the rest is fetched in chunks into `.partial-SHA256` beside
the versions, where a fetch that broke goes on. Rejections travel both ways. What the source no longer has goes here,
too, but for the version that drafts.
"""

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from aurora.store import DrafterRefused, DrafterStore, sha256_file
from aurora.store_offers import Offer, OfferedFile, Source, SourceUnreachable, check_offer, read_offers

log = logging.getLogger(__name__)

_PARTIAL = ".partial-"
_DEPTH = 2  # newest versions that are fetched: the one to draft with, and the one before it in case it is worse
_LONGEST_WAIT = 64  # steps until a version that was refused is asked for again
_GONE = "the source no longer has it"


@dataclass
class MirrorStep:
    """What one step did."""

    reachable: bool = True
    fetched: int | None = None  # number of the version that came
    bytes: int = 0  # that came over the wire
    seconds: float = 0.0  # that it took
    problems: list[str] = field(default_factory=list)


class StoreMirror:
    """One store's mirror. `store` has no other writer.

    live: number of the version that drafts, or None; it is never removed, so that another version that a source begun
    anew has under its number waits until there is a third to draft with. bytes_per_s: bound of what is fetched.
    """

    def __init__(
        self,
        store: DrafterStore,
        source: Source,
        *,
        live: Callable[[], int | None] = lambda: None,
        chunk_bytes: int = 4 << 20,
        bytes_per_s: float | None = None,
    ) -> None:
        self.store = store
        self.live = live
        self._source = source
        self._bytes_per_s = bytes_per_s
        self._chunk_bytes = chunk_bytes if bytes_per_s is None else max(1, min(chunk_bytes, int(bytes_per_s / 4)))
        self._waits: dict[int, tuple[dict[str, str], int, int]] = {}  # refused: digests, times, steps left to wait
        store.clear_abandoned()

    async def step(self) -> MirrorStep:
        """Carry marks over, take away what is gone and fetch at most one version, the newest that is missing.

        What goes wrong is in the result; the next step tries again.
        """
        did = MirrorStep()
        began = time.monotonic()
        try:
            offers = await self._offers(did)
            for number, reason in await asyncio.to_thread(self._follow, offers):
                await self._source.reject(number, offers[number].digests, reason)
            await self._fetch_one(offers, did)
        except SourceUnreachable as error:
            did.reachable = False
            did.problems.append(str(error))
        except (DrafterRefused, OSError) as error:
            did.problems.append(str(error))
        did.seconds = time.monotonic() - began
        return did

    async def _offers(self, did: MirrorStep) -> dict[int, Offer]:
        """What the source has, without what no source may offer."""
        sound: dict[int, Offer] = {}
        for number, offer in read_offers(await self._source.offers()).items():
            try:
                check_offer(offer)
                sound[number] = offer
            except DrafterRefused as error:
                did.problems.append(str(error))
        return sound

    def _follow(self, offers: dict[int, Offer]) -> list[tuple[int, str]]:
        """Rejections and removals; returns the rejections that the source has not heard of.

        A source without versions has not begun yet, and says nothing of those here.
        """
        if not offers:
            return []
        tell: list[tuple[int, str]] = []
        live, shared = self.live(), []
        for number in self.store.versions():
            mark = self.store.rejection(number)
            if not self._same(number, offers):
                self._remove(number)
            elif offers[number].rejected is not None:
                if mark is None:
                    self.store.reject(number, str(offers[number].rejected))
            elif mark is None:
                shared.append(number)
            elif self._sound(number):
                tell.append((number, mark))
            else:  # it was damaged here: the source's is as good as ever
                self._remove(number)
        if live is not None and shared and live == self.store.latest() and not self._same(live, offers):
            self.store.reject(live, _GONE)
        self._forget_partials(offers)
        return tell

    def _same(self, number: int, offers: dict[int, Offer]) -> bool:
        """Whether the version here is what the source offers under this number."""
        try:
            return number in offers and self.store.read(number).digests == offers[number].digests
        except DrafterRefused:
            return False

    def _sound(self, number: int) -> bool:
        try:
            self.store.verify(number)
        except (DrafterRefused, OSError):
            return False
        return True

    def _remove(self, number: int) -> None:
        if number != self.live():
            self.store.remove(number)

    def _forget_partials(self, offers: dict[int, Offer]) -> None:
        needed = {_PARTIAL + file.digest for n in _wanted(offers) for file in offers[n].files.values()}
        for partial in self.store.root.glob(f"{_PARTIAL}*"):
            if partial.name not in needed:
                partial.unlink()

    async def _fetch_one(self, offers: dict[int, Offer], did: MirrorStep) -> None:
        here = set(self.store.versions())
        for number in _wanted(offers):
            if number in here or self._waiting(offers[number]):
                continue
            try:
                await self._fetch(offers[number], did)
            except DrafterRefused as error:
                self._wait(offers[number])
                did.problems.append(str(error))
            else:
                did.fetched = number
                return

    def _waiting(self, offer: Offer) -> bool:
        """Whether this very version was refused of late; counts a step down."""
        digests, times, left = self._waits.get(offer.number, ({}, 0, 0))
        if digests != offer.digests or left <= 0:
            return False
        self._waits[offer.number] = digests, times, left - 1
        return True

    def _wait(self, offer: Offer) -> None:
        digests, times, _ = self._waits.get(offer.number, ({}, 0, 0))
        times = times + 1 if digests == offer.digests else 1
        self._waits[offer.number] = offer.digests, times, min(2**times, _LONGEST_WAIT)

    async def _fetch(self, offer: Offer, did: MirrorStep) -> None:
        """Raises DrafterRefused when what came is not what was offered; then it is asked for anew next time."""
        files: dict[str, Path] = {}
        for name, file in sorted(offer.files.items()):
            known = await asyncio.to_thread(self._find, file.digest)
            files[name] = known or await self._download(file, f"version {offer.number}: {name}", did)
        partials = {path for path in files.values() if path.name.startswith(_PARTIAL)}
        try:
            await asyncio.to_thread(self._adopt, offer, files)
        except DrafterRefused:
            _unlink(partials)
            raise
        _unlink(partials)
        self._waits.pop(offer.number, None)

    def _adopt(self, offer: Offer, files: dict[str, Path]) -> None:
        def write(directory: Path) -> None:
            for name, file in files.items():
                _link_or_copy(file, directory / name)

        self.store.adopt(offer.number, write, offer.digests, offer.metadata)

    def _find(self, digest: str) -> Path | None:
        """A file of a version here that has this content."""
        for number in reversed(self.store.versions()):
            with suppress(DrafterRefused, OSError):  # the live version's files may be damaged
                version = self.store.read(number)
                for name in (name for name, known in version.digests.items() if known == digest):
                    path = version.path / name
                    if not path.is_symlink() and sha256_file(path) == digest:
                        return path
        return None

    async def _download(self, file: OfferedFile, what: str, did: MirrorStep) -> Path:
        """The file, whole as far as its length tells, after what an earlier try left of it."""
        partial = self.store.root / f"{_PARTIAL}{file.digest}"
        at = partial.stat().st_size if partial.is_file() else 0
        if at > file.size:
            partial.unlink()
            at = 0
        free = shutil.disk_usage(self.store.root).free
        if file.size - at > free:
            raise DrafterRefused(f"{what}: {file.size - at} bytes are missing, {self.store.root} has room for {free}")
        began, came = time.monotonic(), 0
        await asyncio.to_thread(_append, partial, b"")
        while at < file.size:
            length = min(self._chunk_bytes, file.size - at)
            data = await self._source.chunk(file.digest, at, length)
            if not data or len(data) > length:
                raise DrafterRefused(f"{what}: the source gave {len(data)} bytes for {length} at {at} of {file.size}")
            await asyncio.to_thread(_append, partial, data)
            at, came, did.bytes = at + len(data), came + len(data), did.bytes + len(data)
            await asyncio.sleep(pause_s(came, time.monotonic() - began, self._bytes_per_s))
        return partial


def pause_s(fetched: int, elapsed_s: float, bytes_per_s: float | None) -> float:
    """How long to wait after `fetched` bytes in `elapsed_s`, so that the bound holds; None: there is none."""
    return 0.0 if bytes_per_s is None else max(0.0, fetched / bytes_per_s - elapsed_s)


def _wanted(offers: dict[int, Offer]) -> list[int]:
    """The versions to have, newest first."""
    return sorted((n for n, offer in offers.items() if offer.rejected is None), reverse=True)[:_DEPTH]


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "ab") as file:
        file.write(data)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # not every file system has links
        shutil.copyfile(source, target)


def _unlink(paths: set[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
