"""Logged traces: whole files, in order, bounded, for their owner only."""

import json
from pathlib import Path

import pytest

from aurora.config import UserError
from aurora.trace_log import TraceLog, is_log, log_files, logged_model


def contents(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in log_files(directory)]


def test_payloads_come_back_in_order_and_only_their_owner_can_read_them(tmp_path: Path) -> None:
    log = TraceLog(tmp_path / "new" / "log", 1000, "m")
    for payload in (b"one", b"two", b"three"):
        log.write(payload)
    assert contents(log.directory) == [b"one", b"two", b"three"]
    assert {oct(p.stat().st_mode & 0o777) for p in log.directory.iterdir()} == {"0o600"}
    assert oct(log.directory.stat().st_mode & 0o777) == "0o700"
    assert is_log(log.directory)
    assert logged_model(log.directory) == "m"
    assert not is_log(tmp_path)


def test_the_oldest_leave_beyond_the_bound_and_the_newest_always_stays(tmp_path: Path) -> None:
    log = TraceLog(tmp_path, 10, "m")
    for i in range(8):
        log.write(bytes([i]) * 4)
        assert log.nbytes == sum(map(len, contents(tmp_path))) <= 10
    assert contents(tmp_path) == [bytes([6]) * 4, bytes([7]) * 4]
    log.write(b"x" * 50)
    assert contents(tmp_path) == [b"x" * 50]


def test_a_restarted_writer_goes_on_and_clears_what_was_not_finished(tmp_path: Path) -> None:
    first = TraceLog(tmp_path, 9, "m")
    first.write(b"aaa")
    first.write(b"bbb")
    (tmp_path / "traces-00000003.part").write_bytes(b"half")
    again = TraceLog(tmp_path, 9, "m")
    assert again.nbytes == 6
    again.write(b"ccc")
    again.write(b"ddd")
    assert contents(tmp_path) == [b"bbb", b"ccc", b"ddd"]
    assert not list(tmp_path.glob("*.part"))


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    TraceLog(tmp_path / "log", 9, "m")
    with pytest.raises(UserError, match="holds traces of m; give another directory"):
        TraceLog(tmp_path / "log", 9, "other")
    with pytest.raises(UserError, match="neither empty nor a log"):
        TraceLog(tmp_path, 9, "m")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="give a writable directory"):
        TraceLog(file, 9, "m")
    (tmp_path / "log" / "log.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"log\.json: damaged"):
        logged_model(tmp_path / "log")
