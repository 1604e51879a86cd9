import json
import logging
import subprocess
import sys

import msgspec
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from aurora.config import AuroraConfig, UserError
from aurora.dashboard import AXES, Reporter, check, public_config, serving_row
from aurora.metrics import EngineReport

REPORT = EngineReport(
    steps=5,
    emitted_tokens=20,
    busy_s=2.0,
    draft_steps={3: 4},
    drafted_tokens={3: 8},
    accepted_tokens={3: 6},
    accepted_at={3: [4, 2]},
    verified_at={3: [4, 4]},
    k_histogram=[5, 0, 4],
    step_error=0.125,
    predicted_goodput=12.0,
    traces_dropped=7,
    drafter_version=3,
    swaps=1,
    swap_s=0.25,
)
BUILTINS = msgspec.to_builtins(REPORT)


class FakeRun:
    """Keeps rows, or fails."""

    def __init__(self, error=None):
        self.error, self.rows, self.axes = error, [], {}

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, data):
        if self.error:
            raise self.error
        self.rows.append(data)

    def finish(self):
        if self.error:
            raise self.error


def config(tmp_path, **changes):
    return AuroraConfig.model_validate({"run_dir": tmp_path / "runs" / "one", **changes})


def records(file):
    """The protobuf records of an offline run: LevelDB log blocks of 32 KiB behind a header of 7 bytes."""
    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def name(item):
    return item.key or "/".join(item.nested_key)


def test_an_offline_run_holds_what_was_logged(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    reporter = Reporter(config(tmp_path, vllm_args=("--api-key", "s3cret")))
    reporter.serving(BUILTINS, 100.0)
    reporter.serving(BUILTINS, 104.0)
    reporter.learning({"loss": 1.5, "lr": 1e-3}, 7)
    reporter.version({"gate": {"acceptance_length": 2.5}, "parent": 3}, 4)
    reporter.finish()
    assert reporter.dropped == 0

    (file,) = (tmp_path / "runs" / "one" / "wandb").glob("offline-run-*/run-*.wandb")
    found = list(records(file))
    axes = {(m.glob_name or m.name): m.step_metric for r in found if r.HasField("metric") for m in [r.metric]}
    assert axes["serving/*"] == "time_s"
    assert axes["learning/*"] == "trainer_step"
    assert axes["versions/*"] == "drafter_version"
    rows = [{name(i): i.value_json for i in r.history.item} for r in found if r.HasField("history")]
    values = [{k: json.loads(v) for k, v in row.items()} for row in rows]
    first, second, learning, version = values
    assert (first["time_s"], second["time_s"]) == (100.0, 104.0)
    assert first["serving/acceptance_length"] == 2.5
    assert (first["serving/acceptance_at_0"], first["serving/acceptance_at_1"]) == (1.0, 0.5)
    assert (first["serving/goodput"], first["serving/predicted_goodput"]) == (10, 12)
    assert (first["serving/drafter_version"], first["serving/swap_s"]) == (3, 0.25)
    assert "serving/tokens_per_s" not in first
    assert second["serving/tokens_per_s"] == 5
    assert second["serving/traces_dropped"] == 14
    assert second["serving/k/values"] == [5, 0, 4]
    assert (learning["trainer_step"], learning["learning/loss"]) == (7, 1.5)
    assert (version["drafter_version"], version["versions/gate/acceptance_length"]) == (4, 2.5)
    leaked = [p for p in (tmp_path / "runs").rglob("*") if p.is_file() and b"s3cret" in p.read_bytes()]
    assert leaked == []


def test_a_broken_run_costs_rows_and_one_warning(tmp_path, caplog):
    reporter = Reporter(config(tmp_path), FakeRun(error=BrokenPipeError("gone")))
    with caplog.at_level(logging.WARNING):
        reporter.serving(BUILTINS, 1.0)
        reporter.learning({"loss": 1.0}, 1)
        reporter.version({}, 1)
        reporter.finish()
    assert reporter.dropped == reporter.ready() == 4
    assert [r.message for r in caplog.records] == [
        "W&B does not take rows (BrokenPipeError: gone); they are dropped and counted"
    ]


_LOSES_ITS_SERVICE = """
import sys, msgspec, psutil
from pathlib import Path
from aurora import dashboard
from aurora.config import AuroraConfig
from aurora.metrics import EngineReport

row = msgspec.to_builtins(EngineReport(steps=1))
reporter = dashboard.Reporter(AuroraConfig(run_dir=Path(sys.argv[1])))
assert reporter.serving(row, 1.0) == 0
service = next(p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core")
service.kill()
service.wait(20)
for time_s in range(2, 8):
    print("dropped", reporter.serving(row, float(time_s)), flush=True)
dashboard._REOPEN_S = 0.0
reporter.learning({"loss": 1.0}, 1)
print("it goes on", flush=True)
"""


def test_a_reporter_whose_service_died_ends_so_that_another_takes_its_place(tmp_path):
    command = [sys.executable, "-c", _LOSES_ITS_SERVICE, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    dropped = [int(line.split()[1]) for line in ended.stdout.splitlines()]
    assert len(dropped) == 6, "a minute must pass first, and then it ends"
    assert 4 <= sum(dropped) <= 6, "the first row may have found an open connection"
    assert ended.returncode == 1
    assert "the W&B run is broken; the reporter starts anew" in ended.stderr


def test_rows_carry_their_axis_and_only_numbers(tmp_path):
    run = FakeRun()
    reporter = Reporter(config(tmp_path), run)
    reporter.learning({"loss": 1.5}, 3, draft_model=True)
    reporter.version({"note": "first", "gate": {"per_position": [0.5, 0.25], "passed": True}, "parent": None}, 2)
    assert run.axes == {f"{group}/*": axis for group, axis in AXES.items()}
    assert run.rows == [
        {"draft_model_step": 3, "draft_model_learning/loss": 1.5},
        {
            "drafter_version": 2,
            "versions/gate/per_position_0": 0.5,
            "versions/gate/per_position_1": 0.25,
            "versions/gate/passed": 1.0,
        },
    ]


def test_a_clock_that_jumps_back_costs_one_rate(tmp_path):
    run = FakeRun()
    reporter = Reporter(config(tmp_path), run)
    for time_s in (100.0, 104.0, 50.0, 54.0):
        reporter.serving(BUILTINS, time_s)
    assert [row.get("serving/tokens_per_s") for row in run.rows] == [None, 5.0, None, 5.0]


def test_unknown_numbers_are_left_out_of_a_row():
    row = serving_row(EngineReport(drafter_version=2), EngineReport(traces_dropped=3), None)
    assert row == {
        "drafter_version": 2,
        "swaps": 0,
        "traces": 0,
        "trace_bytes": 0,
        "traces_dropped": 3,
        "skipped_draft_steps": 0,
        "drift": 0,
        "training_share": 0.0,
    }


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # W&B reads the environment once
    yield tmp_path / "netrc"
    wandb.teardown()


def test_online_without_a_key_is_refused_at_start_up(tmp_path, no_key):
    with pytest.raises(UserError, match=r"--wandb online: no API key for wandb\.example; run `wandb login`"):
        Reporter(config(tmp_path, reporter={"mode": "online"}))
    assert not (tmp_path / "runs").exists()


def test_a_key_in_netrc_will_do(tmp_path, no_key):
    no_key.write_text("machine wandb.example login user password s3cret\n")
    check(config(tmp_path, reporter={"mode": "online"}))


def test_a_disabled_run_takes_rows_and_leaves_no_files(tmp_path):
    reporter = Reporter(config(tmp_path, reporter={"mode": "disabled"}))
    reporter.serving(BUILTINS, 1.0)
    reporter.finish()
    assert reporter.dropped == 0
    assert not list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize(
    ("arguments", "public"),
    [
        (("--api-key", "a", "b", "--seed", "1"), ["--api-key", "***", "***", "--seed", "1"]),
        (("--hf_token=abc",), ["--hf_token=***"]),
        (
            ("--max-num-batched-tokens", "64", "--tokenizer", "x"),
            ["--max-num-batched-tokens", "64", "--tokenizer", "x"],
        ),
    ],
)
def test_secrets_among_vllm_flags_are_masked(tmp_path, arguments, public):
    assert public_config(config(tmp_path, vllm_args=arguments))["vllm_args"] == public
