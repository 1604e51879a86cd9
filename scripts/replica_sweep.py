"""How routers fare as replicas grow in number: traces x machines x replicas x loads x routers, simulated.

python scripts/replica_sweep.py TRACE... --profile table.safetensors --machine docs/machines/h100-80g-llama-3.1-8b.json

A load is a share of what the replicas together serve without speculation when requests never run out; a trace is sped
up until its mean rate is that, so that each replica has as much to do however many there are. Lengths are chosen by the
goodput rule. With --turns each request belongs by lot to a conversation of so many turns on average, whose prompts
begin alike, and replicas keep prompts as vLLM does. With --slow the first replica is slower than the others.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rate_sweep import Case, Machine, fitting, rate, saturated
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from aurora import batching, simulated_fleet, speculation_rules
from aurora.acceptance_profile import AcceptanceProfile, read_profile
from aurora.arrivals import SESSION_TOKENS, ArrivalTrace, read_arrivals
from aurora.config import UserError
from aurora.replica_states import same_rules, together
from aurora.results import Row, write_rows
from aurora.routing import POLICIES
from aurora.simulate import Simulated, SimulateOptions, draw_load, new_rule, summarise

REPLICAS = (1, 2, 4, 8)
_METRICS = ("latency_mean_s", "latency_p99_s", "first_token_p99_s", "prefix_cached")
_OPEN = 64  # conversations that may go on


@dataclass(frozen=True, eq=False)
class Found:
    """One cell: what every router makes of it, and how evenly."""

    cell: str
    replicas: int
    load: float
    by_router: dict[str, Simulated]
    most: dict[str, float]  # share of the requests that the replica with the most got, times the replicas


def sweep(
    case: Case, trace: ArrivalTrace, drafts: AcceptanceProfile, loads: tuple[float, ...], slow: float
) -> Iterator[Found]:
    """What every router makes of each number of replicas and load; slow: times that the first replica takes."""
    machine, name = case.machine, case.trace
    options = SimulateOptions(trace=Path(name), profile=Path(), costs=Path(), kv_tokens=machine.kv_tokens)
    most = len(trace) / saturated(trace, drafts, machine, options).finish.max()
    for replicas in REPLICAS:
        for share in loads:
            arrivals = trace.faster(replicas * share * most / rate(trace))
            load, known = draw_load(arrivals, drafts, options.seed), simulated_fleet.Known.of(arrivals)
            found, busiest = {}, {}
            for router in POLICIES if replicas > 1 else ("round_robin",):
                nothing = np.zeros(options.max_seqs + 1, np.int64)
                rule = new_rule(speculation_rules.GOODPUT, drafts, machine.costs, nothing, options.exploration)
                each = same_rules(rule, [rule.costs * slow, *[rule.costs] * (replicas - 1)])
                *_, state = simulated_fleet.simulate_fleet(load, options.engine, each, POLICIES[router](), known)
                busiest[router] = float(state.counts[:, batching.GIVEN].max() * replicas / len(arrivals))
                found[router] = summarise(router, load, together(state))
            for router in POLICIES:  # one replica gets everything whoever routes
                found.setdefault(router, replace(found["round_robin"], policy=router))
                busiest.setdefault(router, 1.0)
            yield Found(f"{machine.name}, {name}, {replicas} replicas, load {share:g}", replicas, share, found, busiest)


def conversations(trace: ArrivalTrace, turns: float, seed: int = 0) -> ArrivalTrace:
    """The same requests as turns of conversations, by lot: each goes on with one of the latest, or begins one."""
    rng, going, count = np.random.default_rng(seed), [], 0
    blocks = []
    for prompt in trace.prompt.tolist():
        if going and rng.random() < 1 - 1 / turns:
            mine = going.pop(int(rng.integers(len(going))))
        else:
            mine, count = count, count + 1
        going = [*going[-_OPEN + 1 :], mine]
        blocks.append(tuple((mine << 32) + b for b in range(prompt // SESSION_TOKENS)))
    return replace(trace, blocks=tuple(blocks), block_tokens=SESSION_TOKENS)


def rows(found: Found) -> Iterator[Row]:
    """Compared with the requests given to the replicas in turn."""
    command, base = shlex.join(["python", *sys.argv]), found.by_router["round_robin"]
    for router, each in found.by_router.items():
        for metric in _METRICS:
            yield Row(
                "replica_sweep", found.cell, router, metric, getattr(each, metric), getattr(base, metric), command
            )
        yield Row("replica_sweep", found.cell, router, "busiest_share", found.most[router], 1.0, command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE")
    parser.add_argument("--profile", type=Path, required=True, help="of `aurora replay`")
    parser.add_argument("--machine", type=Path, action="append", required=True, help="step costs; repeatable")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--load", type=float, action="append", help="repeatable (default: 0.8)")
    parser.add_argument("--turns", type=float, help="of a conversation, 1 or more; default: none has a next one")
    parser.add_argument("--slow", type=float, default=1.0, help="times that a step of the first replica takes")
    parser.add_argument("--results", type=Path, help="put rows of results there")
    options = parser.parse_args()
    drafts, machines = read_profile(options.profile), [Machine.read(file) for file in options.machine]
    loads = tuple(options.load or (0.8,))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found: list[Found] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("cells", total=len(options.traces) * len(machines) * len(REPLICAS) * len(loads))
        for file in options.traces:
            for machine in machines:
                trace, name = fitting(read_arrivals(file), machine).repeated(options.requests), file.stem
                if options.turns:
                    trace, name = conversations(trace, options.turns), f"{name} in {options.turns:g} turns"
                if options.slow != 1:
                    name += f", one {options.slow:g} times slower"
                for each in sweep(Case(name, "", machine), trace, drafts, loads, options.slow):
                    found.append(each)
                    progress.advance(task)
    if options.results is not None:
        write_rows(options.results, [row for each in found for row in rows(each)])
    _show(found)


def _show(found: list[Found]) -> None:
    heads = [f"{router}, {what}" for router in POLICIES for what in ("mean s", "p99 s", "cached", "busiest")]
    table = Table("cell", *heads, title="latency; share of prompts cached; requests of the busiest over the mean")
    for each in found:
        numbers = []
        for router, one in each.by_router.items():
            numbers += [f"{one.latency_mean_s:.4g}", f"{one.latency_p99_s:.4g}"]
            numbers += [f"{one.prefix_cached:.2f}", f"{each.most[router]:.2f}"]
        table.add_row(each.cell, *numbers)
    Console(width=250).print(table)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"replica_sweep: error: {error}")
