"""`aurora simulate`: an arrival trace served in simulated time, by one rule for speculation lengths after the other.

Steps take what a live engine's costs say (`aurora bench --json`), drafts are accepted as they were along recorded
answers (`aurora replay --profile`), and batching is vLLM's (`aurora.batching`). Each request of the trace gets a
recorded answer by lot, the same for every rule. With several replicas (`aurora.simulated_fleet`) each batches by
itself, and a router sends every request to one of them when it comes.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from aurora import batching, replica_states, simulated_fleet, speculation_rules
from aurora.acceptance_profile import AcceptanceProfile, read_profile
from aurora.arrivals import NAMES, OPTIONAL, ArrivalTrace, read_arrivals
from aurora.config import UserError, require_positive, require_writable
from aurora.results import Row, command_line, read_rows, write_rows
from aurora.routing import POLICIES
from aurora.step_costs import read_costs
from aurora.step_time import COSTS, StepTimeModel

COLUMNS = (*NAMES, *OPTIONAL)  # of a trace, of which --columns gives the names
_STEPS = 20_000  # between two looks at the progress


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """A trace, drafts and an engine to simulate. Raises UserError for values that make no sense."""

    trace: Path
    profile: Path
    columns: tuple[str, ...] = ()  # WHAT=NAME, of COLUMNS
    requests: int | None = None  # the first N, or the trace over and over until there are N; default: the trace
    speed: float = 1.0  # as many times faster do requests come
    max_seqs: int = 256
    token_budget: int = 2048
    kv_tokens: int = 1 << 20
    router: str = "round_robin"  # of `aurora.routing.POLICIES`
    prefix_cache: bool = True  # replicas keep prompts, where the trace says which begin alike
    exploration: float = 0.01
    seed: int = 0
    json_file: Path | None = None

    def __post_init__(self) -> None:
        require_positive(self, "requests", "speed", "max_seqs", "token_budget", "kv_tokens")
        require_writable("--json", self.json_file)
        if self.router not in POLICIES:
            raise UserError(f"--router {self.router}: give one of {', '.join(POLICIES)}")
        if self.token_budget < self.max_seqs:
            raise UserError(
                f"--token-budget {self.token_budget}: below --max-seqs {self.max_seqs}; every request needs one"
            )
        bad = [c for c in self.columns if c.partition("=")[0] not in COLUMNS]
        if bad:
            raise UserError(f"--columns {bad[0]}: give WHAT=NAME, where WHAT is {', '.join(COLUMNS)}")

    def read_trace(self) -> ArrivalTrace:
        """The arrivals, repeated and sped up as asked."""
        names = dict(column.partition("=")[::2] for column in self.columns)
        trace = read_arrivals(self.trace, names)
        return trace.repeated(self.requests or len(trace)).faster(self.speed)


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(TraceOptions):
    """What to simulate; `aurora simulate` has a flag for each. Raises UserError for values that make no sense."""

    costs: Path
    replicas: int = 1
    at_once: int = 0  # requests kept open instead of coming when the trace says; 0: as the trace says
    results: Path | None = None  # file of rows (`aurora.results`)
    experiment: str = "simulate"
    cell: str = ""  # default: the trace's name

    def __post_init__(self) -> None:
        super().__post_init__()
        require_writable("--results", self.results)
        require_positive(self, "replicas")
        if self.at_once < 0:
            raise UserError(f"--at-once {self.at_once}: must not be negative")
        if self.at_once and self.replicas > 1:
            raise UserError(
                f"--at-once {self.at_once} --replicas {self.replicas}: routers need arrivals; leave one out"
            )

    @property
    def engine(self) -> batching.Engine:
        return batching.Engine(self.max_seqs, self.token_budget, self.kv_tokens, self.at_once)


@dataclass(frozen=True)
class Simulated:
    """What a rule made of the trace."""

    policy: str
    requests: int
    tokens_per_s: float  # emitted from the first arrival to the last token
    latency_p50_s: float  # from arrival to the last token
    latency_p99_s: float
    latency_mean_s: float
    first_token_p50_s: float
    first_token_p99_s: float
    acceptance_length: float  # tokens that a request emits in a step that it decodes in
    steps: int
    preempted: int
    prefix_cached: float  # share of the prompts' tokens that were in a prefix cache


def run(options: SimulateOptions) -> int:
    """Simulate every rule, print the table; 0 when done. Raises UserError for what the user can mend."""
    profile, costs = read_profile(options.profile), read_costs(options.costs)
    if options.results is not None:
        read_rows(options.results)  # one that is none must be known before the work
    trace = options.read_trace()
    load, known = draw_load(trace, profile, options.seed), simulated_fleet.Known.of(trace, options.prefix_cache)
    check_room(load, options.kv_tokens)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for policy, rule in rules(profile, costs, load, options):
            task = progress.add_task(policy, total=len(load.arrival))
            for state in _served(load, known, rule, options):
                progress.update(task, completed=int(state.ended[-1]))
            found.append(summarise(policy, load, state))
    _show(found)
    if options.results is not None:
        write_rows(options.results, _rows(found, options))
    if options.json_file is not None:
        options.json_file.write_text(json.dumps([asdict(each) for each in found], indent=1))
    return 0


def _served(
    load: batching.Load, known: simulated_fleet.Known, rule: speculation_rules.Rule, options: SimulateOptions
) -> Iterator[batching.State]:
    """The load served as the options say."""
    if options.replicas == 1 and (options.at_once or not known.blocks):
        yield from simulate(load, options.engine, rule)  # whoever routes
        return
    each = replica_states.same_rules(rule, [rule.costs] * options.replicas)
    for state in simulated_fleet.simulate_fleet(load, options.engine, each, POLICIES[options.router](), known):
        yield replica_states.together(state)


def simulate(load: batching.Load, engine: batching.Engine, rule: speculation_rules.Rule) -> Iterator[batching.State]:
    """Serve the load; yields the state now and then, and at the end. Closed loops write their arrivals into it."""
    state = batching.new_state(len(load.arrival), engine.max_seqs, rule.k_max)
    while state.counts[batching.FINISHED] < len(load.arrival):
        batching.advance(state, load, engine, rule, _STEPS)
        yield state


def draw_load(trace: ArrivalTrace, profile: AcceptanceProfile, seed: int) -> batching.Load:
    """A recorded answer for each request, and where in it to begin, by lot."""
    rng = np.random.default_rng(seed)
    begins = np.concatenate([[0], profile.ends[:-1]])
    answer = rng.integers(len(profile.ends), size=len(trace))
    return batching.Load(
        trace.seconds.astype(np.float64), trace.prompt, trace.output, begins[answer], profile.ends[answer]
    )


def rules(
    profile: AcceptanceProfile, costs: StepTimeModel, load: batching.Load, options: SimulateOptions
) -> Iterator[tuple[str, speculation_rules.Rule]]:
    """Name and rule of everything that is compared."""

    nothing = np.zeros(options.max_seqs + 1, np.int64)

    def rule(kind: int, by_batch: npt.NDArray[np.int64] = nothing) -> speculation_rules.Rule:
        return new_rule(kind, profile, costs, by_batch, options.exploration)

    for k in range(profile.k_max + 1):
        name = f"fixed_k{k}" if k else "no_speculation"
        yield name, rule(speculation_rules.FIXED, np.full(options.max_seqs + 1, k))
    yield "batch_table", rule(speculation_rules.FIXED, batch_table(rule(speculation_rules.FIXED), profile, load))
    yield "smartspec", rule(speculation_rules.SMARTSPEC)
    yield "goodput", rule(speculation_rules.GOODPUT)
    hindsight = dataclasses.replace(profile, expected=profile.hindsight())
    yield "hindsight", new_rule(speculation_rules.HINDSIGHT, hindsight, costs, nothing, options.exploration)
    yield "oracle", rule(speculation_rules.ORACLE)


def new_rule(
    kind: int,
    profile: AcceptanceProfile,
    costs: StepTimeModel,
    by_batch: npt.NDArray[np.int64],
    exploration: float,
) -> speculation_rules.Rule:
    """A rule that has seen nothing yet; by_batch: lengths of FIXED, [max_seqs + 1]."""
    return speculation_rules.Rule(
        kind,
        profile.k_max,
        by_batch,
        known_costs(costs),
        profile.drafter == "eagle3",
        exploration,
        profile.right,
        profile.expected,
        speculation_rules.new_memory(),
        np.zeros(profile.k_max),
        np.zeros(profile.k_max),
    )


def known_costs(costs: StepTimeModel) -> npt.NDArray[np.float64]:
    """Seconds of a step's costs without a draft model's, in a rule's order."""
    return np.array([costs.costs[name] for name in COSTS[:8]])


def batch_table(rule: speculation_rules.Rule, profile: AcceptanceProfile, load: batching.Load) -> npt.NDArray[np.int64]:
    """The best length for each number of decoding requests, [max_seqs + 1], by the profile's mean acceptance.

    This is what vLLM's table of lengths by batch size holds when it is measured in advance.
    """
    emitted = 1 + np.concatenate([[0.0], profile.rates().cumprod().cumsum()])  # [k_max + 1]
    context = float((load.prompt + load.output / 2).mean())
    requests, k = np.arange(len(rule.by_batch))[:, None], np.arange(rule.k_max + 1)
    costs = rule.costs
    reads = np.where(k > 0, costs[5] + costs[6] * requests * (1 + k) + costs[7] * (k - 1), 0.0) if rule.passes else 0.0
    seconds = costs[0] + costs[1] * requests + costs[2] * requests * k + costs[4] * context * requests * 1e-3 + reads
    best: npt.NDArray[np.int64] = (requests * emitted / seconds).argmax(axis=1)
    return best


def check_room(load: batching.Load, kv_tokens: int) -> None:
    """Raises UserError when a request does not fit into the KV cache."""
    longest = int((load.prompt + load.output).max())
    if longest > kv_tokens:
        raise UserError(f"--kv-tokens {kv_tokens}: a request has {longest} tokens; give it room for at least those")


def summarise(policy: str, load: batching.Load, state: batching.State) -> Simulated:
    """The numbers of a simulation that ended in `state`."""
    latency, first = state.finish - load.arrival, state.first - load.arrival
    p50, p99 = np.percentile(latency, [50, 99])
    first_p50, first_p99 = np.percentile(first, [50, 99])
    count = state.counts
    decoded = int(load.output.sum()) - len(load.output)
    return Simulated(
        policy=policy,
        requests=len(latency),
        tokens_per_s=float(load.output.sum() / (state.finish.max() - load.arrival[0])),
        latency_p50_s=float(p50),
        latency_p99_s=float(p99),
        latency_mean_s=float(latency.mean()),
        first_token_p50_s=float(first_p50),
        first_token_p99_s=float(first_p99),
        acceptance_length=decoded / max(decoded - int(count[batching.ACCEPTED]), 1),
        steps=int(count[batching.STEPS]),
        preempted=int(count[batching.PREEMPTED]),
        prefix_cached=float(state.cached.sum() / load.prompt.sum()),
    )


def best_fixed(found: list[Simulated]) -> Simulated:
    """The length that is the same for all, or none, with the least mean latency."""
    fixed = (each for each in found if each.policy.startswith(("fixed", "no_speculation")))
    return min(fixed, key=lambda each: each.latency_mean_s)


def _rows(found: list[Simulated], options: SimulateOptions) -> Iterator[Row]:
    best, cell = best_fixed(found).latency_mean_s, options.cell or options.trace.stem
    for each in found:
        metrics = {name: getattr(each, name) for name in ("tokens_per_s", "latency_p50_s", "latency_p99_s")}
        for metric, value in (metrics | {"ratio_to_best_fixed": best / each.latency_mean_s}).items():
            baseline = best if metric == "ratio_to_best_fixed" else getattr(found[0], metric)
            yield Row(options.experiment, cell, each.policy, metric, value, baseline, command_line())


def _show(found: list[Simulated]) -> None:
    heads = ("rule", "tokens/s", "tokens/step", "p50", "p99", "mean", "first p50", "over best fixed")
    table = Table(*heads, title="latency and time to the first token in seconds", title_justify="left")
    table.columns[0].no_wrap = True
    best = best_fixed(found).latency_mean_s
    for each in found:
        seconds = (each.latency_p50_s, each.latency_p99_s, each.latency_mean_s, each.first_token_p50_s)
        table.add_row(
            each.policy,
            f"{each.tokens_per_s:.1f}",
            f"{each.acceptance_length:.2f}",
            *(f"{s:.4g}" for s in seconds),
            f"{best / each.latency_mean_s:.3f}",
        )
    Console().print(table)
