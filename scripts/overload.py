"""How a server stands a load beyond what it takes on: refusals, and how long the requests take that it admits.

    python scripts/overload.py --url http://127.0.0.1:8000 --places 16

`--places` is what the server was started with: `--max-num-seqs` and `limits.waiting` together. In turn as many clients
ask, each one request after the other, as a half, one, two and four times that; one that is refused comes back after
the time that the server names. Prints a table in Markdown.
"""

import argparse
import asyncio
import time
from dataclasses import dataclass, field

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress

_LONGEST_S = 3600.0  # as long as the server gives a request by default (limits.request_s)


@dataclass
class Level:
    """What became of the requests of one number of clients."""

    clients: int
    latencies_s: list[float] = field(default_factory=list)  # of admitted requests, from being sent to the last byte
    refused: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def row(self) -> str:
        p50, p99 = np.percentile(self.latencies_s, [50, 99]) if self.latencies_s else (np.nan, np.nan)
        asked = len(self.latencies_s) + self.refused + self.failed
        rate = self.tokens / self.seconds
        return f"| {self.clients} | {asked} | {self.refused} | {self.failed} | {p50:.2f} | {p99:.2f} | {rate:.1f} |"


async def client(http: httpx.AsyncClient, body: dict[str, object], end_s: float, level: Level) -> None:
    """Ask until the time is over; what is under way then is waited for and counted."""
    while time.monotonic() < end_s:
        began = time.monotonic()
        answer = await http.post("/v1/completions", json=body)
        if answer.status_code == 200:
            level.latencies_s.append(time.monotonic() - began)
            level.tokens += answer.json()["usage"]["completion_tokens"]
        elif answer.status_code == 503:
            level.refused += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))
        else:
            level.failed += 1


async def run(options: argparse.Namespace) -> list[Level]:
    """All levels in turn."""
    levels = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.url, timeout=_LONGEST_S, limits=limits) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        body = {"model": model, "prompt": options.prompt, "max_tokens": options.max_tokens, "ignore_eos": True}
        with Progress(console=Console(stderr=True)) as progress:
            for times in progress.track((0.5, 1.0, 2.0, 4.0), description="loads"):
                level = Level(round(options.places * times))
                began = time.monotonic()
                asking = (client(http, body, began + options.seconds, level) for _ in range(level.clients))
                await asyncio.gather(*asking)
                level.seconds = time.monotonic() - began
                levels.append(level)
    return levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--places", type=int, required=True, help="requests that the server lets be open")
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--prompt", default="Explain what a database index is.")
    levels = asyncio.run(run(parser.parse_args()))
    print("| clients | asked | refused (503) | failed | admitted: p50, s | p99, s | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(level.row() for level in levels))


if __name__ == "__main__":
    main()
