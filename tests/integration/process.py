"""`aurora serve` as a real process, and what the tests ask of it."""

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from aurora.local_server import LocalServer

START_LIMIT_S = 240


class ServedModel(LocalServer):
    """A server under test, with the requests that tests make."""

    def __init__(self, model: Path | str, run_dir: Path, *flags: str) -> None:
        super().__init__(str(model), run_dir, flags)

    def wait_end(self) -> tuple[int, str]:
        """Exit code and output of a command that is expected to fail."""
        try:
            return self.process.wait(START_LIMIT_S), self.output()
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

    def answers(self, prompts: list[list[int]], tokens: int = 48, **fields: Any) -> list[list[int]]:
        """Greedy token ids for each prompt, four requests at a time."""
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda prompt: self.complete(prompt, max_tokens=tokens, **fields), prompts)
            return [answer["choices"][0]["token_ids"] for answer in answers]

    def serve_until_version(self, number: int) -> None:
        """Send traffic until this drafter version is live."""
        for seed in range(100):
            if self.metric("aurora_drafter_version") >= number:
                return
            self.answers(random_prompts(16, seed=100 + seed % 4))
        raise AssertionError(f"drafter version {number} was never swapped in; see {self.log}")

    def actor_pid(self, name: str) -> int:
        """Process id of a Ray actor of this deployment."""
        for child in self.processes():
            if child.name().startswith(f"ray::{name}"):
                return int(child.pid)
        raise AssertionError(f"no actor {name}")


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 300, int(rng.integers(8, 60))).tolist() for _ in range(count)]


def end(pid: int) -> None:
    """End a process that a test started, and those below it: SIGTERM, after a while SIGKILL. It may be over already."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        mine = [process, *process.children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(mine, timeout=20)[1]:
            left.kill()
