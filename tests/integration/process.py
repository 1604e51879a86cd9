"""`aurora serve` as a real process, and what the tests ask of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

START_LIMIT_S = 400


class ServedModel:
    """One running `aurora serve`. Ends only the processes that it started, by id."""

    def __init__(self, model: Path | str, run_dir: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self.log = run_dir / "serve.log"
        command = [sys.executable, "-m", "aurora.cli", "serve", str(model), "--run-dir", str(run_dir), "--port", "0"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            )
        self.url = ""

    def wait_ready(self) -> "ServedModel":
        end = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end:
            found = re.search(r"answers at (http://\S+)/v1", self.log.read_text())
            if found:
                self.url = found[1]
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        self.stop()
        raise AssertionError(f"aurora serve did not start: {self.log.read_text()[-3000:]}")

    def wait_end(self) -> tuple[int, str]:
        """Exit code and output of a command that is expected to fail."""
        try:
            return self.process.wait(START_LIMIT_S), self.log.read_text()
        finally:
            self.stop()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def complete(self, prompt: list[int] | str, **fields: Any) -> dict[str, Any]:
        """One completion; greedy and without end token unless told otherwise."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 32, "ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            self.url + "/v1/completions",
            json.dumps({**body, "model": self.model_name(), **fields}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return dict(json.loads(answer.read()))

    def model_name(self) -> str:
        if not hasattr(self, "_name"):
            self._name = json.loads(self.get("/v1/models"))["data"][0]["id"]
        return str(self._name)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels; 0.0 if it has no series yet."""
        lines = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, lines))

    def wait_metric(self, name: str, at_least: float, limit_s: float = 240) -> float:
        end = time.monotonic() + limit_s
        while (value := self.metric(name)) < at_least:
            assert time.monotonic() < end, f"{name} is {value}, not {at_least}, after {limit_s} s"
            time.sleep(0.5)
        return value

    def actor_pid(self, name: str) -> int:
        """Process id of a Ray actor of this deployment."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.name().startswith(f"ray::{name}"):
                return int(child.pid)
        raise AssertionError(f"no actor {name}")

    def stop(self) -> int:
        """SIGTERM, then SIGKILL for whatever of its processes is left; returns the exit code."""
        mine = _tree(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        _, alive = psutil.wait_procs(mine, timeout=20)
        for process in alive:
            process.kill()
        return code


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
