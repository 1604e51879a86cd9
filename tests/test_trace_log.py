"""Logged traces: whole files, in order, bounded, for their owner only."""

import json
import os
import time
from pathlib import Path

import pytest

from aurora.cli import main
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


def _written_ago(directory: Path, ages_s: list[float]) -> None:
    """Make the files of a log that old, the oldest first."""
    for path, age in zip(log_files(directory), ages_s, strict=True):
        os.utime(path, (time.time() - age,) * 2)


def test_traces_leave_at_their_age(tmp_path: Path) -> None:
    log = TraceLog(tmp_path, 100, "m", limit_s=3600)
    for payload in (b"a", b"bb", b"ccc"):
        log.write(payload)
    log.expire()
    assert log.nbytes == 6
    _written_ago(tmp_path, [7200, 3700, 3500])
    log.expire()
    assert contents(tmp_path) == [b"ccc"]
    assert log.nbytes == 3
    log_files(tmp_path)[0].unlink()
    log.expire()
    assert log.nbytes == 0, "one that somebody else removed"
    log.write(b"d")
    assert contents(tmp_path) == [b"d"]


def test_purge_removes_all_or_the_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = TraceLog(tmp_path / "log", 100, "m")
    for payload in (b"a", b"b", b"c"):
        log.write(payload)
    (log.directory / "traces-00000004.part").write_bytes(b"half")
    _written_ago(log.directory, [9e5, 8e5, 10])
    assert main(["traces", "purge", str(log.directory), "--older-than-days", "9"]) == 0
    assert contents(log.directory) == [b"c"]
    assert "2 files, 0.0 MiB removed" in capsys.readouterr().out
    assert main(["traces", "purge", str(log.directory)]) == 0
    assert [p.name for p in log.directory.iterdir()] == ["log.json"]
    assert main(["traces", "purge", str(tmp_path)]) == 2
    assert "no log of traces (`capture.log_dir`); give one" in capsys.readouterr().err
    assert main(["traces", "purge", str(log.directory), "--older-than-days", "-1"]) == 2


def test_a_clock_that_jumps_back_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TraceLog(tmp_path, 100, "m", limit_s=3600)
    log.write(b"a")
    now_s = time.time()
    monkeypatch.setattr("aurora.trace_log.time.time", lambda: now_s - 1e8)
    log.expire()
    log.write(b"b")
    assert contents(tmp_path) == [b"a", b"b"]
    monkeypatch.setattr("aurora.trace_log.time.time", lambda: now_s + 3700)
    log.expire()
    assert contents(tmp_path) == []
