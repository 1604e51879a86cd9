"""`docs/first-hour.md`, run as it stands: one shell, block after block. `make tutorial`; minutes on two cores.

Only the two ports are others, so that it runs beside whatever listens there.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.documents import blocks

_LIMIT_S = 1800


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def script() -> str:
    """The page's blocks but those marked `not run`, on free ports; ends at the first command that fails."""
    text = "\n".join(block.text for block in blocks("docs/first-hour.md") if not block.marker)
    for shown, taken in zip(("8000", "8001"), free_ports(2), strict=True):
        text = text.replace(f":{shown}", f":{taken}").replace(f"--port {shown}", f"--port {taken}")
    return f"set -euo pipefail\n{text}"


@pytest.mark.timeout(_LIMIT_S + 120)
def test_the_tutorial_works_as_written(tmp_path: Path) -> None:
    file, log = tmp_path / "tutorial.sh", tmp_path / "tutorial.log"
    file.write_text(script())
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with log.open("w") as out:
        shell = subprocess.Popen(
            ["bash", str(file)],
            cwd=tmp_path,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = shell.wait(_LIMIT_S)
        finally:
            _end(shell)
    assert code == 0, log.read_text()[-5000:]
    said = log.read_text()
    print(said)
    assert "the same text with and without drafts" in said
    second = json.loads((tmp_path / "second.json").read_text())
    assert (second["requests"], second["failures"]) == (80, 0)
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["plain", "aurora"]
    assert "<svg" in (tmp_path / "report.html").read_text()
    store = tmp_path / "runs" / "first-hour" / "drafters"
    assert list(store.glob("v*/READY")), "the drafter that it began with, at least"


def _end(shell: subprocess.Popen[bytes]) -> None:
    """End what the shell left behind, which is in its session."""
    left = [p for p in psutil.process_iter() if _session(p.pid) == shell.pid]
    for process in left:
        process.send_signal(signal.SIGTERM)
    for process in psutil.wait_procs(left, timeout=60)[1]:
        process.kill()


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
