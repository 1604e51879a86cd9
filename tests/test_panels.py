import json
import re
from pathlib import Path

import msgspec
import pytest

from aurora.cli import main
from aurora.dashboard import Reporter
from aurora.metrics import EngineReport
from aurora.panels import SECTIONS
from aurora.rows import AXES, DRAFT_COLUMNS
from aurora.trace import encode_traces
from tests.tiny import TinyServer, half_right, prompts, tiny_config
from tests.wandb_file import rows, run_file
from trainer.loop import TrainerLoop
from trainer.sinks import Sinks

QUANTITIES = ("mean", "p50", "p99")
EVERYTHING = EngineReport(
    steps=5,
    request_steps=9,
    emitted_tokens=20,
    prefill_tokens=4,
    busy_s=2.0,
    draft_steps={0: 1, 3: 4, -1: 2},
    drafted_tokens={3: 8},
    accepted_tokens={3: 6},
    accepted_at={3: [4, 2]},
    verified_at={3: [4, 4]},
    first_drafts={3: [4, 4]},
    accepted_by_domain={"sql": [8, 6], "": [1, 0]},
    tokens_by_source={"target": 10, "neural": 10},
    k_histogram=[5, 0, 4],
    predicted_s=2.0,
    measured_s=2.0,
    plain_s=3.0,
    predicted_goodput=12.0,
    step_error=0.125,
    step_costs={"draft": 0.01},
    capture_s=0.1,
    traces=9,
    trace_bytes=100,
    traces_dropped=7,
    traces_waiting=1,
    drafter_version=3,
    swaps=1,
    swap_s=0.25,
    skipped_draft_steps=1,
    drift=1,
    training_share=0.5,
    latency_s={f"{what}_{name}": 0.1 for what in ("first_token", "token", "request") for name in QUANTITIES},
    alarms=["training_unsaved"],
    rollbacks=1,
    swap_failures=1,
    refused=1,
)
PANELS = [pytest.param(panel, id=panel.title) for section in SECTIONS for panel in section.panels]


@pytest.fixture(scope="module")
def logged(directory, tmp_path_factory):
    """The rows of an offline run that server and trainer, two optimiser steps and a gate, reported to."""
    server = TinyServer(directory)
    traffic = [t for i, p in enumerate(prompts(12)) for t in server.traces(f"r{i}", p, 12, half_right, domain="sql")]
    config = tiny_config(tmp_path_factory.mktemp("run"))
    config = config.model_copy(update={"reporter": config.reporter.model_copy(update={"draft_tables": True})})
    reporter = Reporter(config)
    loop = TrainerLoop(config, directory, Sinks(reporter.learning, reporter.version, reporter.drafts))
    loop.ingest(encode_traces(traffic))
    for _ in range(2):
        loop.train()
    loop.publish()
    reporter.version(loop.last_verdict.metadata(1, 2, 128), 2)
    for time_s in (100.0, 105.0):
        reporter.serving(msgspec.to_builtins(EVERYTHING), time_s)
    reporter.finish()
    assert reporter.dropped == 0
    return rows(run_file(config.run_dir))


def test_the_report_has_everything():
    quiet = EngineReport()
    assert [f for f in EngineReport.__struct_fields__ if getattr(EVERYTHING, f) == getattr(quiet, f)] == []


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_shows_what_a_run_has_over_the_axis_that_it_has(panel, logged):
    assert bool(panel.metrics) != bool(panel.pattern)
    over_axis = {name for row in logged if panel.axis in row for name in row}
    missing = [name for name in panel.metrics if name not in over_axis]
    assert missing == []
    if panel.pattern:
        assert [name for name in over_axis if re.search(panel.pattern, name)], panel.pattern


def test_drafts_are_a_table_of_text_when_asked_for(logged, directory):
    (table,) = [value for row in logged for name, value in row.items() if name.startswith("learning/drafts/nrows")]
    assert table > 0
    (columns,) = [value for row in logged for name, value in row.items() if name.startswith("learning/drafts/ncols")]
    assert columns == len(DRAFT_COLUMNS)


def test_the_workspace_is_printed_without_a_server(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["dashboard", "wandb", "--project", "p", "--entity", "e", "--offline"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["project"], tree["entity"]) == ("p", "e")
    sections = tree["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Serving", "Learning", "Versions", "Cost"]
    plots = [panel["config"] for section in sections for panel in section["panels"]]
    shown = {name for plot in plots for name in plot.get("metrics", [])}
    assert shown == {name for section in SECTIONS for panel in section.panels for name in panel.metrics}
    assert {plot["xAxis"] for plot in plots} <= set(AXES.values())
    assert sum(bool(plot.get("metricRegex")) for plot in plots) == sum(
        bool(panel.pattern) for section in SECTIONS for panel in section.panels
    )


def test_the_documentation_lists_the_panels():
    text = (Path(__file__).parent.parent / "docs" / "dashboards.md").read_text()
    for section in SECTIONS:
        assert f"| {section.name} | {'; '.join(panel.title for panel in section.panels)} |" in text


def test_a_workspace_wants_a_key(monkeypatch, tmp_path, capsys):
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert main(["dashboard", "wandb"]) == 2
    assert "aurora dashboard wandb: no API key" in capsys.readouterr().err
