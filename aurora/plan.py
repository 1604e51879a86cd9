"""`aurora plan`: replicas and machines that keep a promise for a trace, the longest draft and the trainer's share.

A router sends the requests to the replicas (`aurora.simulated_fleet`), which serve them in simulated time by the
goodput rule (`aurora.simulate`). A machine is what a step costs on it and its price. The trainer sits beside the
first replica and slows it down.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from aurora import batching, speculation_rules
from aurora.acceptance_profile import AcceptanceProfile, read_profile
from aurora.arrivals import ArrivalTrace
from aurora.config import UserError, require_positive
from aurora.replica_states import same_rules
from aurora.routing import POLICIES
from aurora.simulate import TraceOptions, check_room, draw_load, known_costs, new_rule
from aurora.simulated_fleet import Known, simulate_fleet
from aurora.step_costs import read_costs
from aurora.step_time import StepTimeModel

_AS_GOOD = 1.01  # times the best mean latency that a shorter longest draft may take
_DUTY_STEPS = 20  # of trainer.duty between 0 and 1


@dataclass(frozen=True)
class Machine:
    """A type of machine."""

    name: str
    costs: StepTimeModel
    price: float  # an hour
    kv_tokens: int

    @classmethod
    def of(cls, text: str, kv_tokens: int) -> "Machine":
        """From NAME=COSTS,PRICE[,KV_TOKENS]. Raises UserError."""
        name, _, rest = text.partition("=")
        try:
            costs, price_text, *kv = rest.split(",")
            price, room = float(price_text), int(kv[0]) if kv else kv_tokens
        except ValueError as error:
            raise UserError(f"--machine {text}: give NAME=COSTS,PRICE[,KV_TOKENS]") from error
        if not name or not price >= 0 or room <= 0:
            raise UserError(f"--machine {text}: it needs a name, a price of 0 or more and room in the KV cache")
        return cls(name, read_costs(Path(costs)), price, room)

    def slowed(self, factor: float) -> "Machine":
        """The same machine when each step takes `factor` times as long."""
        costs = {name: seconds * factor for name, seconds in self.costs.costs.items()}
        return dataclasses.replace(self, costs=StepTimeModel.known(costs))


@dataclass(frozen=True, kw_only=True)
class PlanOptions(TraceOptions):
    """What to plan for; `aurora plan` has a flag for each. Raises UserError for values that make no sense."""

    machines: tuple[str, ...]  # NAME=COSTS,PRICE[,KV_TOKENS]
    first_token_s: float | None = None  # promised time to the first token
    token_ms: float | None = None  # promised time a further token, as a mean over an answer
    attain: float = 0.99  # share of the requests that are to be served so
    max_replicas: int = 64
    training_slowdown: float = 0.15  # of steps beside a trainer that never rests

    def __post_init__(self) -> None:
        if None in (self.trace, self.profile) or not self.machines:
            raise UserError("TRACE, --profile, --machine: give all three, or --placement")
        super().__post_init__()
        require_positive(self, "first_token_s", "token_ms", "max_replicas")
        if self.first_token_s is None and self.token_ms is None:
            raise UserError("--first-token-s, --token-ms: give what is promised, one of them or both")
        if not 0 < self.attain <= 1:
            raise UserError(f"--attain {self.attain}: must be above 0 and at most 1")
        if self.training_slowdown < 0:
            raise UserError(f"--training-slowdown {self.training_slowdown}: must not be negative")


@dataclass(frozen=True)
class Plan:
    """What one type of machine needs."""

    machine: str
    replicas: int | None  # None: the promise is not kept with as many as are allowed
    without_speculation: int | None  # replicas
    price: float  # an hour, of all of them
    attained: float  # share of the requests that are served as promised
    first_token_p99_s: float
    token_p99_ms: float
    busy: float  # share of the time in which a replica computes, from the first arrival to the last token
    k_max: int  # shortest longest draft that is as good as any
    training_duty: float  # share of the time that a trainer beside one replica may compute under load


def run(options: PlanOptions) -> int:
    """Print a plan for each machine and the cheapest; 1 when none keeps the promise. Raises UserError."""
    machines = [Machine.of(text, options.kv_tokens) for text in options.machines]
    trace, profile = options.read_trace(), read_profile(options.profile)
    for machine in machines:
        check_room(draw_load(trace, profile, options.seed), machine.kv_tokens)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("plan", total=len(machines))
        plans = []
        for machine in machines:
            trials = Trials(machine, trace, profile, options, lambda what: progress.update(task, description=what))
            plans.append(plan(machine, trials, options))
            progress.advance(task)
    _show(plans, options)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps([asdict(each) for each in plans], indent=1))
    return 0 if any(each.replicas for each in plans) else 1


def plan(machine: Machine, trials: "Trials", options: PlanOptions) -> Plan:
    """The fewest replicas of one machine, and what they leave room for."""
    replicas = trials.fewest(trials.k_max)
    count = replicas or options.max_replicas
    served = {k: trials.served(count, k) for k in range(trials.k_max + 1)}
    best = min((each.latency_s for each in served.values() if each.attained >= options.attain), default=0.0)
    good = [k for k, s in served.items() if s.attained >= options.attain and s.latency_s <= _AS_GOOD * best]
    k_max = min(good, default=trials.k_max)
    return Plan(
        machine=machine.name,
        replicas=replicas,
        without_speculation=trials.fewest(0),
        price=count * machine.price,
        attained=served[k_max].attained,
        first_token_p99_s=served[k_max].first_token_p99_s,
        token_p99_ms=served[k_max].token_p99_ms,
        busy=served[k_max].busy,
        k_max=k_max,
        training_duty=trials.duty(count, k_max) if replicas else 0.0,
    )


@dataclass(frozen=True)
class _Served:
    """The trace served by a number of replicas."""

    attained: float
    latency_s: float  # mean
    first_token_p99_s: float
    token_p99_ms: float
    busy: float


class Trials:
    """Simulations of one machine, each run once."""

    def __init__(
        self,
        machine: Machine,
        trace: ArrivalTrace,
        profile: AcceptanceProfile,
        options: PlanOptions,
        tell: Callable[[str], object] = str,
    ) -> None:
        """tell: is told what runs now."""
        self._machine, self._profile, self._options, self._tell = machine, profile, options, tell
        self._load = draw_load(trace, profile, options.seed)
        self._prompts = Known.of(trace, options.prefix_cache)
        self._known: dict[tuple[int, int, float], _Served] = {}

    @property
    def k_max(self) -> int:
        """The longest draft that the profile knows."""
        return self._profile.k_max

    @cached_property
    def _by_batch(self) -> np.ndarray:
        return np.zeros(self._options.max_seqs + 1, np.int64)

    def served(self, replicas: int, k_max: int, duty: float = 0.0) -> _Served:
        """By so many replicas that draft up to `k_max` tokens, with a trainer of that duty beside the first."""
        key = replicas, k_max, duty
        if key not in self._known:
            self._tell(f"{self._machine.name} x {replicas}, k at most {k_max}")
            self._known[key] = self._serve(replicas, k_max, duty)
        return self._known[key]

    def fewest(self, k_max: int) -> int | None:
        """Replicas that keep the promise; None if as many as are allowed do not."""
        low, high = 0, 1  # low is too few
        while not self._keeps(high, k_max):
            if high >= self._options.max_replicas:
                return None
            low, high = high, min(2 * high, self._options.max_replicas)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._keeps(middle, k_max) else (middle, high)
        return high

    def duty(self, replicas: int, k_max: int) -> float:
        """The most that a trainer may compute under load."""
        if not self._options.training_slowdown:
            return 1.0
        low, high = 0, _DUTY_STEPS + 1  # high is too much
        while high - low > 1:
            middle = (low + high) // 2
            kept = self._keeps(replicas, k_max, middle / _DUTY_STEPS)
            low, high = (middle, high) if kept else (low, middle)
        return low / _DUTY_STEPS

    def _keeps(self, replicas: int, k_max: int, duty: float = 0.0) -> bool:
        return self.served(replicas, k_max, duty).attained >= self._options.attain

    def _serve(self, replicas: int, k_max: int, duty: float) -> _Served:
        state, load = self._replicas(replicas, k_max, duty), self._load
        first_s = state.first - load.arrival
        token_s = (state.finish - state.first) / np.maximum(load.output - 1, 1)
        kept = np.ones(len(first_s), bool)
        if self._options.first_token_s is not None:
            kept &= first_s <= self._options.first_token_s
        if self._options.token_ms is not None:
            kept &= token_s * 1e3 <= self._options.token_ms
        return _Served(
            attained=float(kept.mean()),
            latency_s=float((state.finish - load.arrival).mean()),
            first_token_p99_s=float(np.percentile(first_s, 99)),
            token_p99_ms=float(np.percentile(token_s, 99)) * 1e3,
            busy=float(state.clock[:, batching.BUSY].mean() / (state.finish.max() - load.arrival[0])),
        )

    def _replicas(self, replicas: int, k_max: int, duty: float) -> batching.State:
        """What became of all requests."""
        options = self._options
        engine = batching.Engine(options.max_seqs, options.token_budget, self._machine.kv_tokens, 0)
        profile = self._profile.up_to(max(k_max, 1))
        kind = speculation_rules.GOODPUT if k_max else speculation_rules.FIXED
        machines = [self._machine] * replicas
        machines[0] = self._machine.slowed(1 + options.training_slowdown * duty)
        rule = new_rule(kind, profile, self._machine.costs, self._by_batch, options.exploration)
        each = same_rules(rule, [known_costs(machine.costs) for machine in machines])
        *_, state = simulate_fleet(self._load, engine, each, POLICIES[options.router](), self._prompts)
        return state


def _show(plans: list[Plan], options: PlanOptions) -> None:
    heads = ("machine", "n", "n, k=0", "price/h", "kept", "first, s", "token, ms", "busy", "k", "duty")
    table = Table(
        *heads, title="n replicas; 99th percentiles; the trainer's duty", title_justify="left", padding=(0, 0)
    )
    table.columns[0].no_wrap = True
    for each in plans:
        table.add_row(
            each.machine,
            f">{options.max_replicas}" if each.replicas is None else str(each.replicas),
            f">{options.max_replicas}" if each.without_speculation is None else str(each.without_speculation),
            f"{each.price:.2f}",
            f"{each.attained:.4f}",
            f"{each.first_token_p99_s:.3g}",
            f"{each.token_p99_ms:.3g}",
            f"{each.busy:.2f}",
            str(each.k_max),
            f"{each.training_duty:.2f}",
        )
    Console().print(table)
    kept = [each for each in plans if each.replicas is not None]
    if not kept:
        print(f"no machine keeps the promise with {options.max_replicas} replicas: promise less, or allow more of them")
        return
    best = min(kept, key=lambda each: each.price)
    flags = f"--k-max {best.k_max}" if best.k_max else "--no-speculation"
    print(
        f"cheapest: {best.replicas} x {best.machine} at {best.price:.2f} an hour; on each `aurora serve {flags}`, "
        f"on the one beside the trainer `--set trainer.duty={best.training_duty:g}`"
    )
