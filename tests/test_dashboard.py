import json
import logging
import subprocess
import sys

import msgspec
import pytest
import wandb

from aurora.config import AuroraConfig, UserError
from aurora.dashboard import Reporter, check, public_config
from aurora.metrics import EngineReport
from aurora.rows import AXES, serving_row
from aurora.store import DrafterStore
from tests.wandb_file import records, rows, run_file

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


class FakeSink:
    """Keeps rows and whatever else it is told, or fails."""

    def __init__(self, error=None):
        self.error, self.rows, self.axes, self.alerts, self.drafters = error, [], {}, [], []

    def define(self, group, axis):
        self.axes[group] = axis

    def log(self, axis, at, values):
        self._keep(self.rows, {axis: at, **values})

    def drafter(self, drafter):
        self._keep(self.drafters, drafter)

    def alert(self, alert):
        self._keep(self.alerts, alert)

    def finish(self):
        self._keep([], None)

    def _keep(self, where, what):
        if self.error:
            raise self.error
        where.append(what)


def config(tmp_path, **changes):
    return AuroraConfig.model_validate({"run_dir": tmp_path / "runs" / "one", **changes})


def test_an_offline_run_holds_what_was_logged(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    reporter = Reporter(config(tmp_path, vllm_args=("--api-key", "s3cret")))
    reporter.serving(BUILTINS, 100.0)
    reporter.serving(BUILTINS, 104.0)
    reporter.learning({"loss": 1.5, "lr": 1e-3}, 7)
    reporter.version({"gate": {"acceptance_length": 2.5}, "parent": 3}, 4)
    reporter.finish()
    assert reporter.dropped == 0

    file = run_file(tmp_path / "runs" / "one")
    found = list(records(file))
    axes = {(m.glob_name or m.name): m.step_metric for r in found if r.HasField("metric") for m in [r.metric]}
    assert axes["serving/*"] == "time_s"
    assert axes["learning/*"] == "trainer_step"
    assert axes["versions/*"] == "drafter_version"
    first, second, learning, version = rows(file)
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
    reporter = Reporter(config(tmp_path), FakeSink(error=BrokenPipeError("gone")))
    with caplog.at_level(logging.WARNING):
        reporter.serving(BUILTINS, 1.0)
        reporter.learning({"loss": 1.0}, 1)
        reporter.version({}, 1)
        reporter.finish()
    assert reporter.dropped == reporter.ready() == 4
    assert [r.message for r in caplog.records] == [
        "the reporter's sink does not take rows (BrokenPipeError: gone); they are dropped and counted"
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
    sink = FakeSink()
    reporter = Reporter(config(tmp_path), sink)
    reporter.learning({"loss": 1.5}, 3, draft_model=True)
    reporter.version({"note": "first", "gate": {"per_position": [0.5, 0.25], "passed": True}, "parent": None}, 2)
    assert sink.axes == AXES
    assert sink.rows == [
        {"draft_model_step": 3, "draft_model_learning/loss": 1.5},
        {
            "drafter_version": 2,
            "versions/gate/per_position_0": 0.5,
            "versions/gate/per_position_1": 0.25,
            "versions/gate/passed": 1.0,
        },
    ]


def test_a_clock_that_jumps_back_costs_one_rate(tmp_path):
    sink = FakeSink()
    reporter = Reporter(config(tmp_path), sink)
    for time_s in (100.0, 104.0, 50.0, 54.0):
        reporter.serving(BUILTINS, time_s)
    assert [row.get("serving/tokens_per_s") for row in sink.rows] == [None, 5.0, None, 5.0]


def test_unknown_numbers_are_left_out_of_a_row():
    row = serving_row(EngineReport(drafter_version=2), EngineReport(traces_dropped=3), None)
    assert row == {
        "drafter_version": 2,
        "swaps": 0,
        "traces": 0,
        "trace_bytes": 0,
        "traces_dropped": 3,
        "skipped_draft_steps": 0,
        "swap_failures": 0,
        "rollbacks": 0,
        "requests_refused": 0,
        "alarms": 0,
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


def test_a_row_tells_of_drafters_domains_lengths_and_latencies():
    report = EngineReport(
        request_steps=10,
        draft_steps={0: 2, 3: 4, -1: 1},
        accepted_by_domain={"": [2, 1], "a b/c": [8, 6], "idle": [0, 0]},
        tokens_by_source={"target": 6, "ngram": 2},
        plain_s=3.0,
        measured_s=2.0,
        k_histogram=[3, 0, 7],
        latency_s={"token_p99": 0.25},
        capture_s=0.5,
        busy_s=10.0,
    )
    row = serving_row(report, report, None)
    mix = {name: row[f"drafter_mix/{name}"] for name in ("neural", "table", "model", "none")}
    assert mix == {"neural": 0.4, "table": 0.2, "model": 0.1, "none": 0.3}
    lengths = {name: value for name, value in row.items() if name.startswith("domain/")}
    assert lengths == {"domain/unlabelled/acceptance": 0.5, "domain/a_b_c/acceptance": 0.75}
    assert (row["tokens_from/target"], row["tokens_from/ngram"], row["speedup"]) == (0.75, 0.25, 1.5)
    assert (row["k_share/0"], row["k_share/2"], row["mean_k"]) == (0.3, 0.7, 1.4)
    assert (row["latency/token_p99"], row["capture_share"]) == (0.25, 0.05)


def test_alerts_and_published_drafters_reach_the_sink(tmp_path):
    sink = FakeSink()
    settings = config(tmp_path)
    reporter = Reporter(settings, sink)
    reporter.serving(msgspec.to_builtins(EngineReport(rollbacks=1)), 1.0)
    assert [alert.kind for alert in sink.alerts] == ["rollback"]
    store = DrafterStore(settings.store_dir)
    published = store.publish(lambda directory: (directory / "model.safetensors").write_bytes(b"w"), {"parent": 0})
    reporter.version({"parent": 0, "acceptance_length": 2.0}, 1)
    reporter.version({"parent": 1}, 9, draft_model=True)
    here, elsewhere = sink.drafters
    assert (here.kind, here.number, here.directory) == ("drafter", 1, published.path)
    assert here.metadata == {"parent": 0, "acceptance_length": 2.0, "sha256": published.digests}
    assert (elsewhere.kind, elsewhere.directory) == ("draft_model", None)


@pytest.mark.parametrize("artifacts", ["off", "reference", "files"])
def test_a_published_drafter_is_an_artifact_with_its_lineage(tmp_path, monkeypatch, artifacts):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    settings = config(tmp_path, reporter={"artifacts": artifacts})
    store = DrafterStore(settings.store_dir)
    store.publish(lambda directory: (directory / "model.safetensors").write_bytes(b"weights"), {})
    reporter = Reporter(settings)
    reporter.version({"parent": 3, "acceptance_length": 2.5}, 1)
    reporter.finish()
    assert reporter.dropped == 0
    found = [r.request.log_artifact.artifact for r in records(run_file(settings.run_dir)) if r.HasField("request")]
    found += [r.artifact for r in records(run_file(settings.run_dir)) if r.HasField("artifact")]
    if artifacts == "off":
        assert found == []
        return
    (artifact,) = found
    told = json.loads(artifact.metadata)
    assert (artifact.type, artifact.name, told["parent"], told["number"]) == ("drafter", "drafter-one", 3, 1)
    assert set(told["sha256"]) == {"model.safetensors"}
    assert "version-1" in artifact.aliases
    contents = {entry.path: entry for entry in artifact.manifest.contents}
    assert set(contents) == {"version.json", "model.safetensors", "READY"}
    assert contents["model.safetensors"].ref.startswith("file://") == (artifacts == "reference")
