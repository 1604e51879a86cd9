"""`aurora serve` as a child process: what the benchmark and the integration tests measure is what users run."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

_POLL_S = 0.2
_STOP_LIMIT_S = 90.0
_KILL_LIMIT_S = 20.0


class LocalServer:
    """One running `aurora serve` on a free port of this machine. Ends only the processes that it started, by id."""

    def __init__(self, model: str, run_dir: Path, flags: Sequence[str] = ()) -> None:
        """Start it; `run_dir` also takes its output (`serve.log`). Ask `wait_ready` before the first request."""
        self.run_dir = run_dir
        self.log = run_dir / "serve.log"
        self.url = ""
        run_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "aurora.cli", "serve", model, "--run-dir", str(run_dir), "--port", "0", *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # a Ctrl-C in the terminal is for whoever started us; `stop` ends this one
            )

    def command(self, arguments: list[str]) -> list[str]:
        """What is run to start it; a place to put something before the command."""
        return arguments

    def wait_ready(self, limit_s: float = 900.0) -> None:
        """Return once it answers. Raises RuntimeError with the end of its output if it does not within `limit_s`."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            found = re.search(r"answers at (https?://\S+)/v1", self.output())
            if found:
                self.url = found[1]
                return
            if self.process.poll() is not None:
                break
            time.sleep(_POLL_S)  # its log is a file, which outlives us and tells nobody when it grows
        self.stop()
        raise RuntimeError(f"aurora serve did not start; {self.log} ends with:\n{self.output()[-3000:]}")

    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        """SIGTERM, then SIGKILL for whatever of its processes is left; returns the exit code."""
        mine = self.processes()
        self.let_train(True)  # one that stands still could not end
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        _, alive = psutil.wait_procs(mine, timeout=_KILL_LIMIT_S)
        for process in alive:
            process.kill()
        return code

    def let_train(self, yes: bool) -> None:
        """Let its trainer go on, or make it stand still; nothing happens where there is none."""
        for process in self.processes():
            if process.name().startswith("ray::Trainer"):
                process.resume() if yes else process.suspend()

    def processes(self) -> list[psutil.Process]:
        """Every process below it."""
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []
