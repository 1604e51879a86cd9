"""`aurora traffic` against the router of a trial: 1 and 2 replicas, and the policies that say who answers, in turns."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aurora.config import UserError
from aurora.routing import POLICIES
from scripts.trial_cluster import REPLICAS, ClusterServer, RayNodes, look

__all__ = ["HEADS", "POLICIES", "Plan", "Round", "Summed", "policies", "replicas", "summed"]

_LIMIT_S = 1200.0
_METRICS = ("tokens_per_s", "latency_p50_s", "latency_p99_s", "ttft_p50_s", "acceptance_length", "failures")
HEADS = (
    "",
    "tokens/s (of rounds)",
    "latency p50, s",
    "p99, s",
    "first token p50, s",
    "failed",
    "versions seen, by replica",
)


@dataclass(frozen=True)
class Plan:
    """What is sent in a round, and how many rounds of each cell there are."""

    prompts: Path
    limit: int
    concurrency: int
    max_tokens: int
    rounds: int

    @property
    def workload(self) -> str:
        return f"{self.prompts.stem}, {self.limit} requests, {self.concurrency} at a time, {self.max_tokens} tokens"


@dataclass(frozen=True)
class Round:
    """One round of a cell."""

    cell: str
    number: int
    workload: str
    measured: dict[str, float]
    versions: dict[str, list[int]]  # live at its beginning and end, by replica
    answered: dict[str, float]  # requests, by replica

    @property
    def tokens_per_s(self) -> float:
        return self.measured["tokens_per_s"]


@dataclass
class Summed:
    """All rounds of a cell: medians."""

    cell: str
    workload: str
    rounds: list[Round] = field(default_factory=list)

    @property
    def numbers(self) -> dict[str, float]:
        found = {name: [r.measured[name] for r in self.rounds if r.measured.get(name) is not None] for name in _METRICS}
        return {name: statistics.median(values) for name, values in found.items() if values}

    @property
    def line(self) -> tuple[object, ...]:
        n, each = self.numbers, ", ".join(f"{r.tokens_per_s:.1f}" for r in self.rounds)
        seen = {name: sorted({v for r in self.rounds for v in r.versions.get(name, [])}) for name in REPLICAS}
        shown = "; ".join(f"{min(v)} to {max(v)}" if v else "-" for v in seen.values())
        failed = sum(r.measured["failures"] for r in self.rounds)
        return (
            self.cell,
            f"{n['tokens_per_s']:.1f} ({each})",
            f"{n['latency_p50_s']:.2f}",
            f"{n['latency_p99_s']:.2f}",
            f"{n['ttft_p50_s']:.2f}",
            f"{failed:g}",
            shown,
        )


def summed(rounds: Sequence[Round]) -> list[Summed]:
    """By cell, in the order in which the cells came first."""
    cells: dict[str, Summed] = {}
    for each in rounds:
        cells.setdefault(each.cell, Summed(each.cell, each.workload)).rounds.append(each)
    return list(cells.values())


def replicas(nodes: RayNodes, model: str, run_dir: Path, flags: Sequence[str], plan: Plan) -> Iterator[Round]:
    """1 and 2 replicas in turns, of one deployment that learns all the time."""
    server = ClusterServer(nodes, model, run_dir, *flags)
    try:
        server.wait_all()
        _send(server, plan, plan.limit)  # what nobody has asked before is slower
        for number in range(plan.rounds):
            for count in (1, 2):
                _scale(nodes, server, count)
                yield _round(server, plan, f"{count} replica{'s' * (count > 1)}", number)
    finally:
        server.stop()


def policies(nodes: RayNodes, model: str, run_dir: Path, flags: Sequence[str], plan: Plan) -> Iterator[Round]:
    """Each policy in turns, of deployments that do not learn, so that nothing but the policy changes."""
    for number in range(plan.rounds):
        for policy in POLICIES:
            fixed = ("--set=trainer.enabled=false", f"--set=cluster.router={policy}")
            server = ClusterServer(nodes, model, run_dir, *flags, *fixed)
            try:
                server.wait_all()
                yield _round(server, plan, policy, number)
            finally:
                server.stop()


def _scale(nodes: RayNodes, server: ClusterServer, count: int) -> None:
    command = [sys.executable, "-m", "aurora.cli", "scale", str(count), "--run-dir", str(server.run_dir)]
    done = subprocess.run(
        nodes.inside("router", command), capture_output=True, text=True, env=nodes.environment, check=False
    )
    if done.returncode != 0:
        raise UserError(f"aurora scale {count}: {done.stderr[-1000:]}")
    look(lambda: server.up() == set(REPLICAS[:count]), _LIMIT_S, f"{count} of the replicas are up")


def _round(server: ClusterServer, plan: Plan, cell: str, number: int) -> Round:
    _send(server, plan, 2 * plan.concurrency)  # first requests meet an engine that has just started
    before, answered = server.versions(), server.samples("aurora_router_requests_total")
    measured = _send(server, plan, plan.limit)
    after, later = server.versions(), server.samples("aurora_router_requests_total")
    versions = {name: [before[name], after[name]] for name in before if name in after}
    grown = {name: later[name] - answered.get(name, 0.0) for name in later}
    return Round(cell, number, plan.workload, measured, versions, grown)


def _send(server: ClusterServer, plan: Plan, limit: int) -> dict[str, float]:
    """What `aurora traffic` finds with the first `limit` prompts. Raises UserError when it does not run."""
    file = server.run_dir / "traffic.json"
    command = [
        *(sys.executable, "-m", "aurora.cli", "traffic", str(plan.prompts), "--url", server.url, "--json", str(file)),
        *("--limit", str(limit), "--concurrency", str(plan.concurrency), "--max-tokens", str(plan.max_tokens)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise UserError(f"aurora traffic: {done.stderr[-1000:]}")
    return dict(json.loads(file.read_text()))
