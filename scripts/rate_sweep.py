"""How every rule for speculation lengths fares as the load grows: traces x drafters x machines x loads, simulated.

python scripts/rate_sweep.py TRACE... --profile table.safetensors --machine docs/machines/h100-80g-llama-3.1-8b.json

A load is a share of what the machine serves without speculation when requests never run out; a trace is sped up until
its mean rate is that. Machines are files of step costs with `kv_tokens` and the `source` of their numbers.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from aurora import speculation_rules
from aurora.acceptance_profile import AcceptanceProfile, read_profile
from aurora.arrivals import ArrivalTrace, read_arrivals
from aurora.batching import State
from aurora.config import UserError
from aurora.results import Row, write_rows
from aurora.simulate import Simulated, SimulateOptions, best_fixed, draw_load, new_rule, rules, simulate, summarise
from aurora.step_costs import read_costs
from aurora.step_time import StepTimeModel

LOADS = (0.3, 0.5, 0.7, 0.9, 1.1)
SHOWN = ("no_speculation", "best_fixed", "batch_table", "smartspec", "goodput", "hindsight", "oracle")
_METRICS = ("latency_mean_s", "latency_p99_s")


@dataclass(frozen=True, eq=False)
class Machine:
    """A machine that a file describes."""

    name: str
    costs: StepTimeModel
    kv_tokens: int

    @classmethod
    def read(cls, file: Path) -> "Machine":
        costs = read_costs(file)
        return cls(file.stem, costs, int(json.loads(file.read_text())["kv_tokens"]))


@dataclass(frozen=True)
class Case:
    """One trace with one drafter on one machine."""

    trace: str
    profile: str
    machine: Machine


def sweep(arrivals: ArrivalTrace, drafts: AcceptanceProfile, case: Case, requests: int) -> Iterator[list[Simulated]]:
    """What every rule makes of each load, one list for each of LOADS."""
    options = SimulateOptions(
        trace=Path(case.trace), profile=Path(case.profile), costs=Path(), kv_tokens=case.machine.kv_tokens
    )
    trace = fitting(arrivals, case.machine).repeated(requests)
    most = len(trace) / saturated(trace, drafts, case.machine, options).finish.max()
    for share in LOADS:
        load = draw_load(trace.faster(share * most / rate(trace)), drafts, options.seed)
        found = []
        for policy, rule in rules(drafts, case.machine.costs, load, options):
            *_, state = simulate(load, options.engine, rule)
            found.append(summarise(policy, load, state))
        yield found


def fitting(arrivals: ArrivalTrace, machine: Machine) -> ArrivalTrace:
    """The requests that the machine's KV cache has room for."""
    return arrivals.only(np.flatnonzero(arrivals.prompt + arrivals.output <= machine.kv_tokens))


def rate(trace: ArrivalTrace) -> float:
    """Requests a second."""
    return (len(trace) - 1) / float(trace.seconds[-1])


def saturated(
    trace: ArrivalTrace,
    drafts: AcceptanceProfile,
    machine: Machine,
    options: SimulateOptions,
    kind: int = speculation_rules.FIXED,
) -> State:
    """How a machine ends that never runs out of requests; kind: of rule, FIXED: no speculation."""
    nothing = np.zeros(options.max_seqs + 1, np.int64)
    rule = new_rule(kind, drafts, machine.costs, nothing, options.exploration)
    full = options.engine._replace(at_once=options.max_seqs)
    *_, state = simulate(draw_load(trace, drafts, options.seed), full, rule)
    return state


def with_best_fixed(found: list[Simulated]) -> list[Simulated]:
    return [*found, replace(best_fixed(found), policy="best_fixed")]


def rows(found: list[Simulated], case: Case, share: float) -> Iterator[Row]:
    """Of one load; `found` with the best fixed length at the end."""
    cell = f"{case.machine.name}, {case.trace}, {case.profile}, load {share:g}"
    command, plain, best = shlex.join(["python", *sys.argv]), found[0], found[-1]
    for each in found:
        if each.policy in SHOWN:
            place = "rate_sweep", cell, each.policy
            for metric in _METRICS:
                yield Row(*place, metric, getattr(each, metric), getattr(plain, metric), command)
            ratio = best.latency_mean_s / each.latency_mean_s
            yield Row(*place, "ratio_to_best_fixed", ratio, best.latency_mean_s, command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE")
    parser.add_argument("--profile", type=Path, action="append", required=True, help="of `aurora replay`; repeatable")
    parser.add_argument("--machine", type=Path, action="append", required=True, help="step costs; repeatable")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--results", type=Path, help="put rows of results there")
    parser.add_argument("--plot", type=Path, help="picture to write, .png")
    options = parser.parse_args()
    machines, profiles = [Machine.read(f) for f in options.machine], {f.stem: read_profile(f) for f in options.profile}
    traces = {f.stem: read_arrivals(f) for f in options.traces}
    cases = [Case(trace, profile, machine) for machine in machines for profile in profiles for trace in traces]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found: dict[Case, list[list[Simulated]]] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loads", total=len(cases) * len(LOADS))
        for case in cases:
            found[case] = []
            for each in map(with_best_fixed, sweep(traces[case.trace], profiles[case.profile], case, options.requests)):
                found[case].append(each)
                progress.advance(task)
                if options.results is not None:
                    write_rows(options.results, rows(each, case, LOADS[len(found[case]) - 1]))
    _show(found)
    if options.plot is not None:
        _draw(found, options.plot)


def _mean_latencies(found: list[Simulated]) -> dict[str, float]:
    return {each.policy: each.latency_mean_s for each in found}


def _show(found: dict[Case, list[list[Simulated]]]) -> None:
    table = Table("machine", "trace", "drafts", "load", *SHOWN, title="mean latency, no speculation's over it")
    for case, loads in found.items():
        for share, each in zip(LOADS, loads, strict=True):
            means = _mean_latencies(each)
            ratios = [f"{means['no_speculation'] / means[policy]:.2f}" for policy in SHOWN]
            table.add_row(case.machine.name, case.trace, case.profile, f"{share:g}", *ratios)
    Console(width=200).print(table)


def _draw(found: dict[Case, list[list[Simulated]]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = list(dict.fromkeys((case.machine.name, case.profile) for case in found))
    down = list(dict.fromkeys(case.trace for case in found))
    figure = Figure(figsize=(4 * len(across), 3 * len(down)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(down), len(across), squeeze=False, sharex=True)
    for case, loads in found.items():
        panel = panels[down.index(case.trace), across.index((case.machine.name, case.profile))]
        for policy in SHOWN[1:]:
            speedups = [m["no_speculation"] / m[policy] for m in map(_mean_latencies, loads)]
            panel.plot(LOADS, speedups, "o-", markersize=3, label=policy.replace("_", " "))
        panel.axhline(1.0, color="grey", linewidth=0.8)
        panel.set_title(f"{case.machine.name}\n{case.trace}, {case.profile}", fontsize=8)
        panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    figure.supxlabel("load, of what is served without speculation")
    figure.supylabel("mean latency without speculation over the rule's")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"rate_sweep: error: {error}")
