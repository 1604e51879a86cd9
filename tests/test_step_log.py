"""The log of steps holds what was written, and says where it holds something else."""

from pathlib import Path

import pytest

from aurora.config import ConfigError, load_config
from aurora.step_time import StepWork
from serve.step_log import LoggedStep, StepLog, read_steps


def test_steps_are_read_as_they_were_written_also_after_a_restart(tmp_path: Path):
    file = tmp_path / "steps.jsonl"
    work = StepWork(3, 5, 20, 400, 1, 2, 1, 7, 0)
    StepLog(file).write(work, (0.5, 4.25, 0.625), 6)
    StepLog(file).write(work, (0.0, 0.0, 0.5), 3)
    first = LoggedStep(3, 5, 20, 400, 3, 1, 0.5, 0.625, 4.25, 6)
    assert read_steps(file)[0] == first
    assert [step.emitted_tokens for step in read_steps(file)] == [6, 3]


def test_a_broken_line_is_named(tmp_path: Path):
    file = tmp_path / "steps.jsonl"
    StepLog(file).write(StepWork(1, 0, 0, 9, 0, 0), (0.1, 1.0, 0.1), 1)
    file.write_bytes(file.read_bytes() + b'{"requests": 1}\n')
    with pytest.raises(ValueError, match=r"steps\.jsonl:2: .*give a file that `speculation\.step_log` named"):
        read_steps(file)


def test_where_no_file_can_be_the_configuration_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"step_log .*nowhere/steps: no such directory; make .*nowhere"):
        load_config(None, {"speculation.step_log": tmp_path / "nowhere" / "steps"})
    config = load_config(None, {"speculation.step_log": "steps.jsonl"})
    assert config.speculation.step_log == Path.cwd() / "steps.jsonl", "the engine runs elsewhere"


def test_a_log_that_cannot_be_written_ends_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    work = StepWork(1, 0, 0, 9, 0, 0)
    StepLog(tmp_path).write(work, (0.1, 1.0, 0.1), 1)
    assert f"step_log {tmp_path}: Is a directory; steps are no longer logged" in caplog.text
    caplog.clear()
    full = StepLog(Path("/dev/full"))
    full.write(work, (0.1, 1.0, 0.1), 1)
    full.write(work, (0.1, 1.0, 0.1), 1)
    assert caplog.text.count("No space left on device; steps are no longer logged") == 1
