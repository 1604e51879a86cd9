import json

import msgspec
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aurora.config import AuroraConfig, UserError
from aurora.dashboard import Reporter
from aurora.metrics import EngineReport

REPORT = msgspec.to_builtins(
    EngineReport(steps=5, emitted_tokens=20, busy_s=2.0, k_histogram=[5, 0, 4], drafter_version=3, rollbacks=1)
)
DRAFT = [3, "sql", 2, "SELECT", " FROM", "|"]


def reported(tmp_path, sink):
    """The run directory of a reporter that was told of a little of everything."""
    config = AuroraConfig.model_validate({"run_dir": tmp_path / "run", "reporter": {"sink": sink}})
    reporter = Reporter(config)
    reporter.serving(REPORT, 1000.5)
    reporter.learning({"loss": 1.5, "replay_rows": {"sql": 7}}, 7)
    reporter.drafts([DRAFT], 8)
    reporter.version({"parent": 1, "acceptance_length": 2.5}, 2)
    reporter.finish()
    assert reporter.dropped == 0
    return config.run_dir


def test_lines_of_json_hold_what_was_reported(tmp_path):
    (file,) = (reported(tmp_path, "jsonl") / "report").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["config"]["reporter"]["sink"] == "jsonl"
    assert {line["group"]: line["axis"] for line in lines if "group" in line}["learning"] == "trainer_step"
    serving, alert, learning, drafts, version, published = lines[6:]
    assert (serving["time_s"], serving["serving/goodput"], serving["serving/k"]) == (1000.5, 10.0, [5, 0, 4])
    assert alert["alert"]["kind"] == "rollback"
    assert learning == {"trainer_step": 7, "learning/loss": 1.5, "learning/replay_rows/sql": 7.0}
    assert drafts["learning/drafts"]["rows"] == [DRAFT]
    assert version["versions/acceptance_length"] == 2.5
    assert published["published"] == {
        "kind": "drafter", "number": 2, "parent": 1, "acceptance_length": 2.5, "directory": ""
    }  # fmt: skip


def test_tensorboard_holds_what_was_reported(tmp_path):
    (directory,) = (reported(tmp_path, "tensorboard") / "tensorboard").iterdir()
    events = EventAccumulator(str(directory)).Reload()
    (goodput,) = events.Scalars("serving/goodput")
    assert (goodput.value, goodput.step, goodput.wall_time) == (10.0, 1000, 1000.5)
    (loss,) = events.Scalars("learning/loss")
    assert (loss.value, loss.step) == (1.5, 7)
    (histogram,) = events.Histograms("serving/k")
    assert histogram.histogram_value.bucket == [5, 0, 4]
    assert np.allclose(histogram.histogram_value.bucket_limit, [0.5, 1.5, 2.5])
    texts = set(events.Tags()["tensors"])
    assert {
        "config/text_summary",
        "learning/drafts/text_summary",
        "published/drafter/text_summary",
        "alerts/rollback/text_summary",
    } == texts
    (table,) = events.Tensors("learning/drafts/text_summary")
    assert b"| 3 | sql | 2 | SELECT |  FROM | \\| |" in table.tensor_proto.string_val[0]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "run").write_text("in the way")
    config = AuroraConfig.model_validate({"run_dir": tmp_path / "run", "reporter": {"sink": "jsonl"}})
    with pytest.raises(UserError, match="--run-dir"):
        Reporter(config)


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("aurora.sinks.find_spec", lambda _name: None)
    config = AuroraConfig.model_validate({"run_dir": tmp_path / "run", "reporter": {"sink": "tensorboard"}})
    with pytest.raises(UserError, match=r"aurora-specdec\[dashboard\]"):
        Reporter(config)
