"""Requests without end beside a test, and what became of each."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Any, Self

import httpx

BROKEN = "connection broke"  # where a process died in the middle of an answer
NOBODY = "nobody listened"  # until the launcher stands in

CUT_OFF = (500, BROKEN, "error event")  # how a request ends whose engine dies


@dataclass
class Traffic:
    """Some clients that ask one after the other: plain, streamed, sampled and structured requests, and some that leave.

    ask(rng) gives the body of the next request. `outcomes` counts statuses, BROKEN, NOBODY and those that left by
    themselves.
    """

    url: str
    ask: Callable[[Random], dict[str, Any]]
    clients: int = 3
    leaving: float = 0.0  # share of requests whose client goes after the first event
    outcomes: Counter[int | str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)  # of those that were answered

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(150)

    @property
    def failed(self) -> int:
        """Requests that ended otherwise than the client wanted."""
        return sum(count for outcome, count in self.outcomes.items() if outcome not in (200, "left"))

    def _run(self, seed: int) -> None:
        rng = Random(seed)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    outcome = self._one(client, rng)
                except httpx.ConnectError:
                    outcome = NOBODY
                except httpx.TransportError:
                    outcome = BROKEN
                with self._lock:
                    self.outcomes[outcome] += 1
                    if outcome == 200:
                        self.latencies_s.append(time.monotonic() - began)
                if outcome not in (200, "left"):
                    self._stop.wait(0.2)

    def _one(self, client: httpx.Client, rng: Random) -> int | str:
        body = self.ask(rng)
        if not body.get("stream"):
            return client.post("/v1/completions", json=body).status_code
        leaves = rng.random() < self.leaving
        with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return answer.status_code
            for line in answer.iter_lines():
                if leaves:
                    return "left"
                if line.startswith('data: {"error"'):
                    return "error event"
        return 200


def mixed(model: str, tokens: int = 48) -> Callable[[Random], dict[str, Any]]:
    """Requests of every kind for a model."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "stream": True},
        {"temperature": 0, "stream": True, "logprobs": 2},
        {"temperature": 1, "seed": 7, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 20, "stream": True, "stop": ["zz"]},
        {"temperature": 0.5, "presence_penalty": 0.5, "frequency_penalty": 0.2, "n": 2},
        {"temperature": 0, "structured_outputs": {"regex": "[a-c]{5,30}"}},
    ]

    def ask(rng: Random) -> dict[str, Any]:
        prompt = [rng.randrange(4, 300) for _ in range(rng.randrange(8, 40))]
        budget = {"max_tokens": rng.randrange(1, tokens)}
        return {"model": model, "prompt": prompt, **budget, **rng.choice(kinds)}

    return ask
