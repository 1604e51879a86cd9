"""The state of several replicas at once, and its compiled advance: what `aurora.batching` does, replica by replica."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aurora.batching import (
    AGAIN,
    FINISHED,
    GIVEN,
    LAST,
    NEXT,
    NOBODY,
    NOW,
    QUEUED,
    RUNNING,
    WAITING,
    Engine,
    Load,
    State,
    Until,
    advance_until,
    unserved,
)
from aurora.compiled import compiled
from aurora.speculation_rules import Rule, Slots

Floats = npt.NDArray[np.float64]

_LEFTOVER = 0.1  # of an answer that is longer than expected is expected to follow
_OF_ALL = ("after", "cached", "expected", "emitted", "first", "finish", "ended")  # arrays of State that replicas share


def new_fleet(requests: int, replicas: int, max_seqs: int, k_max: int) -> State:
    """The state of so many replicas that were given no request."""
    alone = unserved(requests, max_seqs, k_max)
    slots = Slots(*(_stack(array, replicas) for array in alone.slots))
    own = {name: _stack(getattr(alone, name), replicas) for name in alone._fields if name not in (*_OF_ALL, "slots")}
    return alone._replace(**own, slots=slots)


def same_rules(rule: Rule, costs: Sequence[Floats]) -> Rule:
    """The rule on several replicas, each with its own costs and memory; costs: of each replica."""
    memory, hits, trials = (_stack(array, len(costs)) for array in (rule.memory, rule.hits, rule.trials))
    return rule._replace(costs=np.stack(costs), memory=memory, hits=hits, trials=trials)


def together(fleet: State) -> State:
    """What `aurora.simulate.summarise` counts, over all replicas."""
    return fleet._replace(counts=fleet.counts.sum(axis=0), clock=fleet.clock.sum(axis=0))


def give(fleet: State, request: int, replica: int, expected: float, cached: int) -> None:
    """Put a request at the end of a replica's queue."""
    count = fleet.counts[replica]
    if count[NEXT] == NOBODY:
        count[NEXT] = request
    else:
        fleet.after[count[LAST]] = request
    count[LAST] = request
    count[GIVEN] += 1
    fleet.clock[replica, QUEUED] += expected
    fleet.expected[request], fleet.cached[request] = expected, cached


@compiled
def advance_all(fleet: State, load: Load, engine: Engine, rules: Rule, until: Until) -> None:
    """Let each replica do what it does until then, and say what it is then expected to emit."""
    for i in range(len(fleet.counts)):
        count = fleet.counts[i]
        if count[FINISHED] == count[GIVEN]:
            fleet.clock[i, WAITING] = 0.0
            continue
        state = _replica(fleet, i)
        if fleet.clock[i, NOW] < until.seconds:
            advance_until(state, load, engine, _rule(rules, i), until)
        fleet.clock[i, WAITING] = _waiting(state)


@compiled
def _waiting(state: State) -> float:
    """Tokens that the replica's open requests are expected to emit."""
    count, tokens = state.counts, state.clock[QUEUED]
    for slot in state.order[: count[RUNNING]]:
        tokens += _remaining(state, state.slots.request[slot])
    for request in state.again[: count[AGAIN]]:
        tokens += _remaining(state, request)
    return float(max(tokens, 0.0))


@compiled
def _remaining(state: State, request: int) -> float:
    """Tokens that a request is expected to emit yet, as the live router expects it (`serve.fleet`)."""
    expected, emitted = state.expected[request], state.emitted[request]
    return float(max(expected - emitted, _LEFTOVER * max(expected, emitted)))


@compiled
def _replica(fleet: State, i: int) -> State:
    """The i-th replica's part, as views."""
    s = fleet.slots
    slots = Slots(
        s.request[i],
        s.to_read[i],
        s.context[i],
        s.chunk[i],
        s.place[i],
        s.limit[i],
        s.length[i],
        s.cold[i],
        s.hits[i],
        s.trials[i],
    )
    return State(
        fleet.clock[i],
        fleet.counts[i],
        fleet.order[i],
        fleet.free[i],
        fleet.again[i],
        slots,
        fleet.after,
        fleet.cached,
        fleet.expected,
        fleet.emitted,
        fleet.first,
        fleet.finish,
        fleet.ended,
    )


@compiled
def _rule(rules: Rule, i: int) -> Rule:
    """The i-th replica's rule, its memory as views."""
    return Rule(
        rules.kind,
        rules.k_max,
        rules.by_batch,
        rules.costs[i],
        rules.passes,
        rules.exploration,
        rules.right,
        rules.expected,
        rules.memory[i],
        rules.hits[i],
        rules.trials[i],
    )


def _stack(array: Any, times: int) -> Any:
    """The array so many times over, on a first axis of their own."""
    return np.repeat(array[None], times, axis=0)
