import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora import store as module
from aurora.store import READY, DrafterRefused, DrafterStore, sha256_file


class Died(BaseException):
    """The writer's process ends here."""


def writer(content: bytes = b"weights", name: str = "model.safetensors") -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / name).write_bytes(content)
        (directory / "config.json").write_text("{}")

    return write


@pytest.fixture
def store(tmp_path: Path) -> DrafterStore:
    return DrafterStore(tmp_path / "drafters")


@pytest.fixture
def fresh_store() -> Iterator[Callable[[], DrafterStore]]:
    roots: list[str] = []

    def make() -> DrafterStore:
        roots.append(tempfile.mkdtemp())
        return DrafterStore(Path(roots[-1]))

    yield make
    for root in roots:
        shutil.rmtree(root)


def test_versions_count_up_and_carry_their_record(store: DrafterStore) -> None:
    assert store.latest() is None
    first = store.publish(writer(), {"parent": None})
    second = store.publish(writer(b"other"), {"parent": 1})
    assert (first.number, second.number, store.versions(), store.latest()) == (1, 2, [1, 2], 2)
    assert store.verify(2) == second
    assert second.metadata == {"parent": 1}
    assert second.digests["model.safetensors"] == sha256_file(second.path / "model.safetensors")


def die_at(monkeypatch: pytest.MonkeyPatch, countdown: int) -> list[str]:
    """Make the `countdown`-th file operation of `publish` end the process before it is done; returns those begun."""
    begun: list[str] = []

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            if len(begun) == countdown:
                raise Died(name)
            return real(*args, **kwargs)

        return step

    monkeypatch.setattr(module.os, "fsync", dying("fsync", os.fsync))
    monkeypatch.setattr(Path, "rename", dying("rename", Path.rename))
    monkeypatch.setattr(module, "sha256_file", dying("sha256_file", sha256_file))
    monkeypatch.setattr(module.tempfile, "mkdtemp", dying("mkdtemp", tempfile.mkdtemp))
    monkeypatch.setattr(Path, "write_text", dying("write_text", Path.write_text))
    # A process that dies cleans nothing up.
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_args, **_kwargs: None)
    return begun


def test_a_writer_that_dies_at_any_step_shows_no_half_version(fresh_store: Callable[[], DrafterStore]) -> None:
    countdown, died = 0, True
    while died:
        countdown += 1
        store = fresh_store()
        store.publish(writer(b"old"), {})
        with pytest.MonkeyPatch.context() as patch:
            begun = die_at(patch, countdown)
            try:
                store.publish(writer(b"new"), {})
                died = False
            except Died:
                died = True
        for number in store.versions():
            store.verify(number)
        assert store.versions() in ([1], [1, 2])
        if begun[-1] != "fsync":  # before the last flush the version may or may not be visible, whole in both cases
            assert died is False or store.versions() == [1]
        following = store.publish(writer(b"next"), {})
        assert store.verify(following.number).number == store.latest()
    assert countdown > 8


def test_an_exception_in_the_writer_leaves_nothing(store: DrafterStore) -> None:
    def fail(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.publish(fail, {})
    with pytest.raises(TypeError):
        store.publish(writer(), {"not": object()})
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("name", ["model.bin", "weights.pt", "code.py", "noext"])
def test_only_json_and_safetensors_are_published(store: DrafterStore, name: str) -> None:
    with pytest.raises(DrafterRefused, match=name):
        store.publish(writer(name=name), {})
    assert list(store.root.iterdir()) == []


def test_links_folders_and_missing_weights_are_refused(store: DrafterStore, tmp_path: Path) -> None:
    with pytest.raises(DrafterRefused, match="only plain files"):
        store.publish(lambda d: (d / "model.safetensors").symlink_to(tmp_path), {})
    with pytest.raises(DrafterRefused, match="only plain files"):
        store.publish(lambda d: (d / "sub").mkdir(), {})
    with pytest.raises(DrafterRefused, match=r"no \.safetensors"):
        store.publish(lambda d: None, {})
    assert store.versions() == []


@settings(max_examples=40)
@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        store = DrafterStore(Path(root))
        version = store.publish(writer(data.draw(st.binary(min_size=1, max_size=64))), {})
        file = version.path / data.draw(st.sampled_from(sorted(version.digests)))
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
        with pytest.raises(DrafterRefused, match=f"{file.name}: SHA-256 differs"):
            store.verify(1)


@settings(max_examples=40)
@given(st.binary(max_size=80) | st.text().map(str.encode) | st.sampled_from([b"[]", b"{}", b"null", b'{"digests": 1}']))
def test_a_damaged_record_is_refused(record: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        store = DrafterStore(Path(root))
        store.publish(writer(), {})
        (Path(root) / "v000001" / READY).write_bytes(record)
        with pytest.raises(DrafterRefused):
            store.verify(1)


def test_added_and_removed_files_are_found(store: DrafterStore) -> None:
    version = store.publish(writer(), {})
    (version.path / "extra.json").write_text("{}")
    with pytest.raises(DrafterRefused, match=r"extra\.json"):
        store.verify(1)
    (version.path / "extra.json").unlink()
    (version.path / "config.json").unlink()
    with pytest.raises(DrafterRefused, match=r"config\.json"):
        store.verify(1)


def test_a_version_that_is_not_ready_is_not_seen(store: DrafterStore) -> None:
    (store.root / "v000007").mkdir()
    (store.root / "notes").mkdir()
    assert store.versions() == []
    with pytest.raises(DrafterRefused, match="version 7"):
        store.read(7)
    assert store.publish(writer(), {}).number == 8


def test_writers_that_race_get_different_numbers(store: DrafterStore) -> None:
    threads = [threading.Thread(target=store.publish, args=(writer(), {})) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.versions() == [1, 2, 3, 4]


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4]), (0, [4])])
def test_pruning_keeps_the_newest(store: DrafterStore, keep: int, left: list[int]) -> None:
    for _ in range(4):
        store.publish(writer(), {})
    removed = store.prune(keep)
    assert store.versions() == left
    assert sorted(removed + left) == [1, 2, 3, 4]


def test_the_record_is_json_that_stock_tools_read(store: DrafterStore) -> None:
    version = store.publish(writer(), {"gate": 2.5})
    assert json.loads((version.path / READY).read_text())["metadata"] == {"gate": 2.5}


def test_what_a_dead_writer_left_is_pruned_and_versions_are_readable_by_others(tmp_path: Path) -> None:
    store = DrafterStore(tmp_path)
    abandoned = tmp_path / ".publish-dead"
    abandoned.mkdir()
    (abandoned / "model.safetensors").write_bytes(b"half")
    version = store.publish(lambda d: (d / "model.safetensors").write_bytes(b"whole"), {})
    assert store.prune(2) == []
    assert not abandoned.exists()
    assert version.path.stat().st_mode & 0o755 == 0o755


def test_a_rejected_version_is_never_the_latest_again(store: DrafterStore) -> None:
    for _ in range(3):
        store.publish(writer(), {})
    store.reject(3, "drafts nothing")
    assert store.latest() == 2
    assert store.versions() == [1, 2, 3]
    store.verify(3)
    assert DrafterStore(store.root).latest() == 2
    assert store.publish(writer(), {}).number == 4
    assert store.latest() == 4


def test_pruning_never_takes_the_latest(store: DrafterStore) -> None:
    for _ in range(4):
        store.publish(writer(), {})
    for number in (3, 4):
        store.reject(number, "bad")
    store.prune(1)
    assert store.versions() == [2, 4]
    assert store.latest() == 2


def test_a_version_is_rejected_though_the_disk_is_full(
    store: DrafterStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for _ in range(3):
        store.publish(writer(), {})
    monkeypatch.setattr(Path, "write_text", full)
    store.reject(3, "drafts nothing")
    assert DrafterStore(store.root).latest() == 2, "the mark without its reason"
    monkeypatch.setattr(Path, "touch", full)
    store.reject(2, "drafts nothing")
    assert store.latest() == 1
    assert "v000002/REJECTED: not marked (No space left on device)" in caplog.text


def test_a_version_that_somebody_reads_is_not_pruned(store: DrafterStore) -> None:
    for _ in range(5):
        store.publish(writer(), {})
    with DrafterStore(store.root).held(1):
        assert store.prune(keep=2) == [2, 3]
        assert store.versions() == [1, 4, 5]
    mark = store.root / ".held-4-somebody"
    mark.touch()
    os.utime(mark, (0, 0))
    assert store.prune(keep=1) == [1, 4], "what a reader that died has left does not count for ever"
    with pytest.raises(DrafterRefused), store.held(1):
        pass
