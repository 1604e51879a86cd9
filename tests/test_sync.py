"""A run that was written offline reaches a W&B server whole, by W&B's own client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from aurora.config import AuroraConfig
from aurora.dashboard import Reporter
from aurora.metrics import EngineReport
from tests.local_http import serving
from tests.wandb_file import rows, run_file
from tests.wandb_server import Received, wandb_app

ROWS = 60


def flat(row):
    """As `tests.wandb_file.rows` gives them: one level of nested names joined by `/`."""
    joined = {}
    for name, value in row.items():
        joined |= {f"{name}/{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return joined


def write_run(run_dir: Path) -> None:
    reporter = Reporter(AuroraConfig(run_dir=run_dir))
    for i in range(ROWS):
        report = EngineReport(steps=i, emitted_tokens=i, busy_s=1.0, k_histogram=[1, i], rollbacks=int(i == 5))
        reporter.serving(msgspec.to_builtins(report), float(i))
        reporter.learning({"loss": 1.0 / (i + 1)}, i)
    reporter.drafts([[1, "sql", 1, "SELECT", "", " x"]], ROWS)
    reporter.version({"parent": 1, "acceptance_length": 2.5}, 2)
    reporter.finish()
    assert reporter.dropped == 0


def test_an_offline_run_is_synced_without_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    write_run(tmp_path / "run")
    file = run_file(tmp_path / "run")
    received = Received()
    with serving(wandb_app(received)) as url:
        received.url = url
        environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "WANDB_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "wandb", "sync", str(file.parent)]
        done = subprocess.run(
            command,
            env=os.environ | environment,
            cwd=tmp_path,  # it leaves a directory there, by whose name ruff would take wandb for ours
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert received.unknown == []
    assert received.complete
    written = rows(file)
    assert len(written) == 2 * ROWS + 2
    assert [flat(received.rows[line]) for line in sorted(received.rows)] == written
    assert sorted(received.rows) == list(range(len(written)))
    assert received.runs[-1]["project"] == "aurora"
    assert [alert["title"] for alert in received.alerts] == ["aurora: rollback"]
    drafter = next(a for a in received.artifacts if a["artifactTypeName"] == "drafter")
    assert json.loads(drafter["metadata"]) == {"parent": 1, "acceptance_length": 2.5, "number": 2}
    (table,) = [body for name, body in received.files.items() if name.startswith("media/table/learning/drafts")]
    assert json.loads(table)["data"] == [[1, "sql", 1, "SELECT", "", " x"]]
