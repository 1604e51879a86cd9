"""What a mirror shows is the source's, byte for byte, whatever the way between them does."""

import asyncio
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aurora.store import READY, DrafterRefused, DrafterStore, DrafterVersion
from aurora.store_mirror import MirrorStep, StoreMirror, pause_s
from aurora.store_offers import LocalSource, Offer, OfferedFile, SourceUnreachable, check_offer, read_offers

CHUNK = 16


def files(weights: bytes, config: bytes = b"{}") -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(weights)
        (directory / "config.json").write_bytes(config)

    return write


def contents(version: DrafterVersion) -> dict[str, bytes]:
    return {name: (version.path / name).read_bytes() for name in version.digests}


class Wire:
    """The source's answers, on a way that may break after some bytes or change them."""

    def __init__(self, store: DrafterStore) -> None:
        self.source = LocalSource(store)
        self.room: int | None = None  # bytes until the way breaks; None: it does not
        self.spoil: Callable[[bytes], bytes] = lambda data: data
        self.sent = 0
        self.asked: list[str] = []

    async def offers(self) -> bytes:
        self._use(0)
        return self.source.offers()

    async def chunk(self, digest: str, offset: int, length: int) -> bytes:
        data = self.source.chunk(digest, offset, length)
        self._use(len(data))
        self.asked.append(digest)
        self.sent += len(data)
        return self.spoil(data)

    async def reject(self, number: int, digests: dict[str, str], reason: str) -> None:
        self._use(0)
        self.source.reject(number, digests, reason)

    def _use(self, size: int) -> None:
        if self.room is not None:
            self.room -= size
            if self.room <= 0:
                raise SourceUnreachable("the way is broken")


class Pair:
    """A store, a wire and a mirror."""

    def __init__(self, root: Path, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.there = DrafterStore(root / "there")
        self.here = DrafterStore(root / "here")
        self.wire = Wire(self.there)
        self.live: int | None = None
        self.restart()

    def restart(self) -> None:
        self.here = DrafterStore(self.here.root)
        self.mirror = StoreMirror(self.here, self.wire, live=lambda: self.live, chunk_bytes=CHUNK)

    def steps(self, count: int = 1) -> list[MirrorStep]:
        async def go() -> list[MirrorStep]:
            return [await self.mirror.step() for _ in range(count)]

        return self.runner.run(go())


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with asyncio.Runner() as runner:
        yield Pair(tmp_path, runner)


def test_a_version_comes_under_its_number_with_its_record(pair: Pair) -> None:
    for i in range(3):
        published = pair.there.publish(files(bytes([i]) * 100), {"parent": i, "gated_rates": [0.5]})
    (did,) = pair.steps()
    assert (did.fetched, did.bytes, did.problems, did.reachable) == (3, 102, [], True)
    assert pair.here.latest() == 3, "the newest first"
    assert contents(pair.here.verify(3)) == contents(published)
    assert pair.here.read(3).metadata == published.metadata
    pair.steps(3)
    assert pair.here.versions() == [2, 3], "and the one before it"
    assert not list(pair.here.root.glob(".p*"))


def test_a_file_that_is_here_is_not_fetched_again(pair: Pair) -> None:
    pair.there.publish(files(b"w" * 100, b'{"a": 1}'), {})
    pair.steps()
    pair.there.publish(files(b"v" * 100, b'{"a": 1}'), {})
    (did,) = pair.steps()
    assert (did.fetched, did.bytes) == (2, 100)
    pair.there.publish(files(b"w" * 100), {})
    (did,) = pair.steps()
    assert (did.fetched, did.bytes) == (3, 2)
    assert pair.here.verify(3).number == 3


def test_a_fetch_that_broke_goes_on_where_it_was(pair: Pair) -> None:
    pair.there.publish(files(b"w" * 400), {})
    pair.wire.room = 205
    (did,) = pair.steps()
    assert (did.reachable, did.fetched, did.problems) == (False, None, ["the way is broken"])
    assert pair.here.versions() == []
    pair.restart()  # the server, too
    pair.wire.room = None
    (did,) = pair.steps()
    assert did.fetched == 1
    assert pair.wire.sent == 402, "no byte twice"


def test_a_partial_file_that_is_damaged_is_fetched_anew(pair: Pair) -> None:
    pair.there.publish(files(b"w" * 400), {})
    pair.wire.room = 205
    pair.steps()
    (partial,) = (p for p in pair.here.root.glob(".partial-*") if p.stat().st_size > 2)
    partial.write_bytes(b"x" * 100)
    pair.wire.room = None
    first, *_, last = pair.steps(4)
    assert "SHA-256 of model.safetensors differs" in first.problems[0]
    assert last.fetched == 1
    assert contents(pair.here.verify(1))["model.safetensors"] == b"w" * 400


def test_a_partial_file_of_another_length_or_a_version_gone_is_dropped(pair: Pair) -> None:
    digest = pair.there.publish(files(b"w" * 20), {}).digests["model.safetensors"]
    (pair.here.root / f".partial-{digest}").write_bytes(b"x" * 21)
    (pair.here.root / f".partial-{'0' * 64}").write_bytes(b"x")
    assert pair.steps()[0].fetched == 1
    assert not list(pair.here.root.glob(".partial-*"))


def test_a_rejection_here_is_told_there_and_the_other_way_round(pair: Pair) -> None:
    for i in range(3):
        pair.there.publish(files(bytes([i])), {})
    pair.steps(3)
    pair.here.reject(3, "drafts worse")
    pair.steps(2)
    assert pair.there.rejection(3) == "drafts worse"
    assert pair.there.latest() == 2
    assert pair.here.versions() == [1, 2, 3], "with version 2 the newest, 1 is the one before it"
    pair.there.reject(2, "elsewhere, too")
    pair.steps()
    assert pair.here.rejection(2) == "elsewhere, too"
    assert pair.here.latest() == 1


def test_a_copy_that_was_damaged_here_is_mended_and_nobody_hears_of_it(pair: Pair) -> None:
    version = pair.there.publish(files(b"right"), {})
    pair.steps()
    (pair.here.root / "v000001" / "model.safetensors").unlink()
    pair.here.reject(1, "SHA-256 differs")
    pair.steps(2)
    assert pair.there.latest() == 1
    assert contents(pair.here.verify(1)) == contents(version)
    assert pair.here.latest() == 1


def test_what_the_source_pruned_goes_but_the_live_version(pair: Pair) -> None:
    for i in range(2):
        pair.there.publish(files(bytes([i])), {})
    pair.steps(3)
    pair.live = 1
    for i in range(2, 6):
        pair.there.publish(files(bytes([i])), {})
    pair.there.prune(2)
    pair.steps(3)
    assert pair.here.versions() == [1, 5, 6]
    pair.live = 6
    pair.steps()
    assert pair.here.versions() == [5, 6]


def test_another_runs_versions_leave_even_while_the_newest_drafts(pair: Pair) -> None:
    for i in range(9):
        pair.here.publish(files(b"old" + bytes([i])), {})
    pair.live = 9
    pair.there.publish(files(b"new"), {})
    pair.steps()
    assert pair.here.versions() == [1, 9]
    assert contents(pair.here.verify(1))["model.safetensors"] == b"new"
    pair.steps()
    assert pair.here.latest() == 1, "the swap goes there"
    pair.live = 1
    pair.steps()
    assert pair.here.versions() == [1]
    assert pair.there.latest() == 1


def test_a_source_without_versions_takes_nothing_away(pair: Pair) -> None:
    pair.here.publish(files(b"what there is"), {})
    assert pair.steps()[0] == MirrorStep(seconds=pytest.approx(0, abs=60))
    assert pair.here.versions() == [1]


def test_a_source_that_is_damaged_is_asked_less_and_less_often(pair: Pair) -> None:
    pair.there.publish(files(b"good" * 10), {})
    version = pair.there.publish(files(b"bad" * 10), {})
    (version.path / "model.safetensors").write_bytes(b"xxx" * 10)
    done = pair.steps(40)
    assert pair.here.versions() == [1], "the older one is had meanwhile"
    assert [bool(did.problems) for did in done].count(True) == 5  # 2, 4, 8, 16 steps between
    pair.there.remove(2)
    assert pair.there.publish(files(b"good again"), {}).number == 2
    assert pair.steps()[0].fetched == 2, "another version under the number does not wait"


@pytest.mark.parametrize(
    "spoil", [lambda d: d + b"+", lambda d: b"", lambda d: bytes(len(d))], ids=["more", "none", "0"]
)
def test_answers_that_are_not_the_files_are_never_shown(pair: Pair, spoil: Callable[[bytes], bytes]) -> None:
    pair.there.publish(files(b"w" * 40), {})
    pair.wire.spoil = spoil
    assert pair.steps()[0].problems
    assert pair.here.versions() == []
    pair.wire.spoil = lambda data: data
    pair.steps(3)
    assert pair.here.verify(1)


@pytest.mark.parametrize(
    "name", ["../v000001/READY.json", "/etc/x.json", "a/b.json", ".hidden.json", "model.bin", "x.json\n", "é.json", ""]
)
def test_only_plain_names_of_drafter_files_are_taken(pair: Pair, name: str) -> None:
    offer = Offer(1, {name: OfferedFile("0" * 64, 1)}, {})
    with pytest.raises(DrafterRefused, match="no name of a drafter's file"):
        check_offer(offer)
    good = pair.there.publish(files(b"w"), {})

    async def offers() -> bytes:
        return msgspec.msgpack.encode([msgspec.structs.replace(offer, number=7), *_decode(pair.wire.source.offers())])

    pair.wire.offers = offers
    (did,) = pair.steps()
    assert "version 7" in did.problems[0]
    assert did.fetched == good.number, "the others come nevertheless"


def _decode(payload: bytes) -> list[Offer]:
    return list(read_offers(payload).values())


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("file", [OfferedFile("../x", 1), OfferedFile("0" * 64, -1), OfferedFile("A" * 64, 1)])
def test_numbers_digests_and_sizes_are_checked(number: int, file: OfferedFile) -> None:
    with pytest.raises(DrafterRefused, match="count from 1"):
        check_offer(Offer(number, {}, {}))
    with pytest.raises(DrafterRefused, match="no SHA-256 or no size"):
        check_offer(Offer(1, {"a.json": file}, {}))


_JSON = st.recursive(st.integers(-9, 9) | st.text(max_size=9), lambda x: st.lists(x) | st.dictionaries(st.text(), x))


@settings(max_examples=60)
@given(st.binary(max_size=60) | _JSON.map(msgspec.msgpack.encode))
def test_a_list_that_is_none_is_refused_or_empty(payload: bytes) -> None:
    with suppress(DrafterRefused):
        assert read_offers(payload) == {}


@settings(max_examples=20)
@given(_JSON | st.fixed_dictionaries({"digests": st.dictionaries(st.text(), _JSON), "metadata": st.just({})}))
@example({"digests": {"\x00": "0" * 64}, "metadata": {}})
@example({"digests": {"\ud800": "0" * 64}, "metadata": {}})
@example({"digests": {}, "metadata": {"why": "\ud800"}})
@example({"digests": {}, "metadata": {"n": 1 << 70}})
def test_a_damaged_record_hides_no_other_version(record: object) -> None:
    with tempfile.TemporaryDirectory() as root, asyncio.Runner() as runner:
        pair = Pair(Path(root), runner)
        (pair.there.publish(files(b"v"), {}).path / READY).write_text(json.dumps(record))
        pair.there.publish(files(b"w"), {})
        (did,) = pair.steps()
        assert (did.fetched, did.problems, pair.here.versions()) == (2, [], [2])


def test_the_source_follows_no_link_and_knows_only_digests(pair: Pair, tmp_path: Path) -> None:
    version = pair.there.publish(files(b"w" * 40), {})
    pair.wire.source.offers()
    digest = version.digests["model.safetensors"]
    assert pair.wire.source.chunk(digest, 10, 5) == b"w" * 5
    assert pair.wire.source.chunk(digest, -1, -1) == b""
    assert pair.wire.source.chunk("0" * 64, 0, 5) == b""
    file = version.path / "model.safetensors"
    file.unlink()
    (tmp_path / "secret").write_bytes(b"secret")
    file.symlink_to(tmp_path / "secret")
    assert pair.wire.source.chunk(digest, 0, 5) == b""


def test_a_rejection_of_other_files_under_the_number_is_not_meant(pair: Pair) -> None:
    version = pair.there.publish(files(b"w"), {})
    pair.wire.source.reject(1, {**version.digests, "config.json": "0" * 64}, "worse")
    pair.wire.source.reject(9, version.digests, "worse")
    assert pair.there.rejection(1) is None


def test_a_version_that_does_not_fit_on_the_disk_is_not_begun(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.there.publish(files(b"w" * 100), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 50}))
    assert "has room for 50" in pair.steps()[0].problems[0]
    assert pair.wire.sent == 2  # config.json


async def test_a_bound_of_the_bandwidth_makes_chunks_small_and_waits(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.there.publish(files(b"w" * 400), {})
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    mirror = StoreMirror(pair.here, pair.wire, bytes_per_s=40)
    assert (await mirror.step()).fetched == 1
    assert len(waits) == 41, "a quarter of a second's bytes each"
    assert waits[-1] > 5, "the clock stood still: they were waited for"


@given(st.integers(0, 1 << 40), st.floats(0, 1e6), st.none() | st.floats(1, 1e12))
def test_after_the_pause_the_bound_holds(fetched: int, elapsed_s: float, bytes_per_s: float | None) -> None:
    pause = pause_s(fetched, elapsed_s, bytes_per_s)
    assert pause >= 0
    if bytes_per_s is None:
        assert pause == 0
    else:
        assert fetched <= bytes_per_s * (elapsed_s + pause) * (1 + 1e-9)


class Mirroring(RuleBasedStateMachine):
    """A trainer that publishes, prunes and starts anew, a way that breaks and lies, and a server that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.pair = Pair(self.root, self.runner)
        self.published: dict[int, list[dict[str, bytes]]] = {}
        self.count = 0

    def teardown(self) -> None:
        try:
            self.converge()
        finally:
            self.runner.close()
            shutil.rmtree(self.root)

    def converge(self) -> None:
        """Once breaks end the mirror has what there is to draft with."""
        self.pair.wire.room, self.pair.wire.spoil = None, lambda data: data
        self.pair.mirror._waits.clear()
        live = self.pair.live
        if (
            live in self.pair.there.versions()
            and self.pair.here.read(live).digests != self.pair.there.read(live).digests
        ):
            self.publish(1, same_config=True)  # a new run has the live one's number: the version after that is awaited
        for _ in range(6):
            self.pair.steps()
            self.swap()
        latest = self.pair.there.latest()
        if latest is not None:
            assert self.pair.here.latest() == latest == self.pair.live
            assert contents(self.pair.here.verify(latest)) == contents(self.pair.there.verify(latest))
        for number in self.pair.here.versions() if self.pair.there.versions() else []:
            if number == self.pair.live:
                continue
            assert (self.pair.here.rejection(number) is None) == (self.pair.there.rejection(number) is None)
            assert contents(self.pair.here.verify(number)) == contents(self.pair.there.verify(number))

    @rule(size=st.integers(0, 5 * CHUNK), same_config=st.booleans())
    def publish(self, size: int, same_config: bool) -> None:
        self.count += 1
        weights = hashlib.shake_128(str(self.count).encode()).digest(size)
        version = self.pair.there.publish(files(weights, b"{}" if same_config else str(self.count).encode()), {})
        self.published.setdefault(version.number, []).append(contents(version))

    @precondition(lambda self: len(self.pair.there.versions()) > 1)
    @rule(data=st.data(), here=st.booleans())
    def reject(self, data: st.DataObject, here: bool) -> None:
        store = self.pair.here if here else self.pair.there
        if store.versions():
            store.reject(data.draw(st.sampled_from(store.versions())), "worse")

    @rule(keep=st.integers(1, 3))
    def prune(self, keep: int) -> None:
        self.pair.there.prune(keep)

    @rule()
    def start_anew(self) -> None:
        """Another run: numbers begin at 1 again."""
        for number in self.pair.there.versions():
            self.pair.there.remove(number)
        self.publish(self.count % 40, same_config=True)
        self.publish(self.count % 30, same_config=False)

    @rule(room=st.integers(0, 6 * CHUNK), steps=st.integers(1, 3))
    def break_off(self, room: int, steps: int) -> None:
        self.pair.wire.room = room
        self.pair.steps(steps)
        self.pair.wire.room = None

    @rule(how=st.sampled_from(["cut", "flip", "more", "none"]), steps=st.integers(1, 3))
    def spoil(self, how: str, steps: int) -> None:
        change: dict[str, Any] = {
            "cut": lambda data: data[: max(1, len(data) // 2)],
            "flip": lambda data: bytes([data[0] ^ 1]) + data[1:] if data else data,
            "more": lambda data: data + b"\0",
            "none": lambda data: b"",
        }
        self.pair.wire.spoil = change[how]
        self.pair.steps(steps)
        self.pair.wire.spoil = lambda data: data

    @rule(steps=st.integers(1, 3))
    def follow(self, steps: int) -> None:
        self.pair.steps(steps)

    @rule()
    def swap(self) -> None:
        self.pair.live = self.pair.here.latest() or self.pair.live

    @rule()
    def restart(self) -> None:
        self.pair.restart()
        self.pair.live = None

    @rule()
    def damage_here(self) -> None:
        for partial in self.pair.here.root.glob(".partial-*"):
            partial.write_bytes(b"damaged"[: partial.stat().st_size])

    @invariant()
    def what_is_shown_was_published(self) -> None:
        for number in self.pair.here.versions():
            assert contents(self.pair.here.verify(number)) in self.published[number]

    @invariant()
    def the_live_version_stays(self) -> None:
        assert self.pair.live is None or self.pair.live in self.pair.here.versions()


TestMirroring = Mirroring.TestCase
TestMirroring.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
