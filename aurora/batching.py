"""Continuous batching in simulated time: vLLM's scheduler and a step-time model, compiled.

A step first serves the running requests in their order: one that decodes gets its token and the drafts to verify, one
that still reads its prompt gets a chunk of it, all within the token budget. Then waiting requests are admitted while
there are slots, tokens and room in the KV cache. One that finds no room sends the newest away, which later reads
prompt and answer again (recomputation, as in vLLM V1). Of a prompt `State.cached` tokens lie in the prefix cache when
its request comes: they are not read, but take room as if they were the request's own.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aurora.compiled import compiled
from aurora.speculation_rules import AHEAD, Rule, Slots, choose_lengths, learn

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NOW, BUSY, QUEUED, WAITING = range(4)  # places in State.clock
# Places in State.counts. GIVEN: requests that it is to serve; NEXT, LAST: first and last of those never admitted.
RUNNING, ARRIVED, AGAIN, FINISHED, KV, STEPS, DRAFTED, ACCEPTED, PREEMPTED, GIVEN, NEXT, LAST = range(12)
NOBODY = -1


class Load(NamedTuple):
    """The requests, in order of arrival."""

    arrival: Floats  # [n] seconds
    prompt: Ints  # [n] tokens
    output: Ints  # [n] tokens
    begin: Ints  # [n] place in the profile where the answer begins
    end: Ints  # [n] place after its last; longer answers go round


class Engine(NamedTuple):
    """What runs them."""

    max_seqs: int
    token_budget: int  # tokens of a step
    kv_tokens: int  # that the KV cache holds
    at_once: int  # requests that are kept open whatever their arrival; 0: they come when they come


class Until(NamedTuple):
    """How far to advance."""

    steps: int
    seconds: float  # no step begins at that time or later


class State(NamedTuple):
    """Everything that a step changes, so that a simulation can be cut into pieces.

    Of several replicas (`aurora.simulated_fleet`) all arrays but those of [n] have one more axis before the others.
    """

    clock: Floats  # [4] seconds: now, and spent in steps; tokens still expected: of those never admitted, of all
    counts: Ints  # [12]
    order: Ints  # [max_seqs] slots in use, oldest first
    free: Ints  # [max_seqs] the others, as a stack
    again: Ints  # [max_seqs] requests that were sent away, as a stack
    slots: Slots
    after: Ints  # [n] the request that the same replica admits next, NOBODY after its last
    cached: Ints  # [n] tokens of the prompt that need not be read
    expected: Floats  # [n] tokens of the answer, as far as a router knows
    emitted: Ints  # [n] tokens
    first: Floats  # [n] time of the first token
    finish: Floats  # [n] time of the last
    ended: Ints  # [n + 1] requests as they end; the last place counts them


def new_state(requests: int, max_seqs: int, k_max: int) -> State:
    """One replica that is to serve all of the requests."""
    state = unserved(requests, max_seqs, k_max)
    state.counts[[GIVEN, NEXT, LAST]] = requests, 0 if requests else NOBODY, requests - 1
    state.after[:-1] = np.arange(1, requests)
    return state


def unserved(requests: int, max_seqs: int, k_max: int) -> State:
    """One replica, and requests of which none is given to it yet."""
    counts = np.zeros(12, np.int64)
    counts[[NEXT, LAST]] = NOBODY
    return State(
        clock=np.zeros(4),
        counts=counts,
        order=np.zeros(max_seqs, np.int64),
        free=np.arange(max_seqs)[::-1].copy(),
        again=np.zeros(max_seqs, np.int64),
        slots=Slots.empty(max_seqs, k_max),
        after=np.full(requests, NOBODY),
        cached=np.zeros(requests, np.int64),
        expected=np.zeros(requests),
        emitted=np.zeros(requests, np.int64),
        first=np.zeros(requests),
        finish=np.zeros(requests),
        ended=np.zeros(requests + 1, np.int64),
    )


@compiled
def advance(state: State, load: Load, engine: Engine, rule: Rule, steps: int) -> None:
    """Up to `steps` further engine steps; fewer when all requests that it was given are finished."""
    advance_until(state, load, engine, rule, Until(steps, np.inf))


@compiled
def advance_until(state: State, load: Load, engine: Engine, rule: Rule, until: Until) -> None:
    """The same, as far as `until` lets it."""
    count = state.counts
    for _ in range(until.steps):
        if count[FINISHED] == count[GIVEN]:
            return
        if count[RUNNING] == 0 and count[AGAIN] == 0 and not engine.at_once:
            state.clock[NOW] = max(state.clock[NOW], load.arrival[count[NEXT]])
        if state.clock[NOW] >= until.seconds:
            return
        _describe(state, load, rule)
        rule.memory[AHEAD] = _prompts_ahead(state, load, engine)
        work = choose_lengths(state.slots, state.order[: count[RUNNING]], rule)
        prefill = _schedule(state, load, engine)
        seconds = _seconds(state, rule, work, prefill)
        state.clock[NOW] += seconds
        state.clock[BUSY] += seconds
        count[STEPS] += 1
        _emit(state, load, rule)


@compiled
def _describe(state: State, load: Load, rule: Rule) -> None:
    """Tell each slot its place in the profile and the longest draft of use to it."""
    slots = state.slots
    for slot in state.order[: state.counts[RUNNING]]:
        request = slots.request[slot]
        span = max(load.end[request] - load.begin[request], 1)
        slots.place[slot] = load.begin[request] + max(state.emitted[request] - 1, 0) % span
        left = load.output[request] - max(state.emitted[request], 1) - 1
        slots.limit[slot] = max(0, min(rule.k_max, left))


@compiled
def _schedule(state: State, load: Load, engine: Engine) -> int:
    """Give out tokens and KV cache: `slots.chunk` of each running request; returns the prompt tokens among them."""
    count, slots = state.counts, state.slots
    budget, prefill, i = engine.token_budget, 0, 0
    while i < count[RUNNING]:
        slot = state.order[i]
        reads = slots.to_read[slot] > 0
        wanted = min(slots.to_read[slot], budget) if reads else min(1 + slots.length[slot], budget)
        while engine.kv_tokens - count[KV] < wanted and count[RUNNING] > i + 1:
            _send_away(state, count[RUNNING] - 1)
        wanted = min(wanted, engine.kv_tokens - count[KV])
        slots.chunk[slot] = wanted
        if not reads:
            slots.length[slot] = max(wanted - 1, 0)
        count[KV] += wanted
        budget -= wanted
        prefill += wanted if reads else 0
        i += 1
    while count[RUNNING] < engine.max_seqs and budget > 0 and _next_waiting(state, load, engine) != NOBODY:
        request = _next_waiting(state, load, engine)
        wanted = min(_unread(state, load, request), budget)
        if engine.kv_tokens - count[KV] < state.cached[request] + wanted:
            break
        _admit(state, load, engine, wanted)
        budget -= wanted
        prefill += wanted
    return prefill


@compiled
def _prompts_ahead(state: State, load: Load, engine: Engine) -> int:
    """Prompt tokens that the step will read if nobody drafts: of prompts half read, and of the next that wait."""
    count = state.counts
    running = state.order[: count[RUNNING]]
    unread = state.slots.to_read[running]
    left = engine.token_budget - (unread == 0).sum()
    tokens, room = unread.sum(), engine.kv_tokens - count[KV] - unread.sum()
    places, request, place = engine.max_seqs - count[RUNNING], count[NEXT], count[ARRIVED]
    while places > 0 and tokens < left and request != NOBODY and _has_come(state, load, engine, request, place):
        room -= load.prompt[request]
        if room < 0:
            break
        tokens += load.prompt[request] - state.cached[request]
        places, request, place = places - 1, state.after[request], place + 1
    return int(max(min(tokens, left), 0))


@compiled
def _has_come(state: State, load: Load, engine: Engine, request: int, place: int) -> bool:
    """Whether the request, the replica's `place`-th from 0, can be admitted."""
    if engine.at_once:
        return bool(place - state.counts[FINISHED] < engine.at_once)
    return bool(load.arrival[request] <= state.clock[NOW])


@compiled
def _next_waiting(state: State, load: Load, engine: Engine) -> int:
    """The request that is admitted next, NOBODY when none waits."""
    count = state.counts
    if count[AGAIN]:
        return int(state.again[count[AGAIN] - 1])
    if count[NEXT] == NOBODY:
        return NOBODY
    return int(count[NEXT]) if _has_come(state, load, engine, count[NEXT], count[ARRIVED]) else NOBODY


@compiled
def _unread(state: State, load: Load, request: int) -> int:
    """Tokens that the request reads before it goes on: its prompt, and what it had said if it was sent away."""
    return int(load.prompt[request] - state.cached[request] + max(state.emitted[request] - 1, 0))


@compiled
def _admit(state: State, load: Load, engine: Engine, chunk: int) -> None:
    count, slots = state.counts, state.slots
    request = _next_waiting(state, load, engine)
    if count[AGAIN]:
        count[AGAIN] -= 1
    else:
        if engine.at_once:
            load.arrival[request] = state.clock[NOW]
        count[ARRIVED] += 1
        count[NEXT] = state.after[request]
        state.clock[QUEUED] -= state.expected[request]
    slot = state.free[len(state.free) - 1 - count[RUNNING]]
    state.order[count[RUNNING]] = slot
    count[RUNNING] += 1
    slots.request[slot], slots.to_read[slot] = request, _unread(state, load, request)
    slots.context[slot] = state.cached[request]
    slots.length[slot], slots.chunk[slot], slots.cold[slot] = 0, chunk, False
    slots.hits[slot], slots.trials[slot] = 0.0, 0.0
    count[KV] += state.cached[request] + chunk


@compiled
def _send_away(state: State, i: int) -> None:
    """The request of the i-th slot in use loses its KV cache and waits again."""
    count, slots = state.counts, state.slots
    state.again[count[AGAIN]] = slots.request[state.order[i]]
    count[AGAIN] += 1
    count[PREEMPTED] += 1
    _vacate(state, i)


@compiled
def _vacate(state: State, i: int) -> None:
    count, slot = state.counts, state.order[i]
    count[KV] -= state.slots.context[slot]
    for j in range(i, count[RUNNING] - 1):
        state.order[j] = state.order[j + 1]
    count[RUNNING] -= 1
    state.free[len(state.free) - 1 - count[RUNNING]] = slot


@compiled
def _seconds(state: State, rule: Rule, passes: int, prefill: int) -> float:
    """Time of the step; `passes` of the drafter."""
    slots, costs = state.slots, rule.costs
    decoding, drafts, context = 0, 0, 0
    for slot in state.order[: state.counts[RUNNING]]:
        context += slots.context[slot] + slots.chunk[slot]
        if slots.to_read[slot] == 0:
            decoding += 1
            drafts += slots.length[slot]
    seconds = costs[0] + costs[1] * decoding + costs[2] * drafts + costs[3] * prefill + costs[4] * context * 1e-3
    if passes:
        seconds += costs[5] + costs[6] * (decoding + drafts + prefill) + costs[7] * (passes - 1)
    return float(seconds)


@compiled
def _emit(state: State, load: Load, rule: Rule) -> None:
    """What the step's tokens lead to: prompts read on, drafts accepted, requests finished."""
    count, slots, now = state.counts, state.slots, state.clock[NOW]
    i = 0
    while i < count[RUNNING]:
        slot = state.order[i]
        request, chunk = slots.request[slot], slots.chunk[slot]
        if slots.to_read[slot] > 0:
            slots.to_read[slot] -= chunk
            slots.context[slot] += chunk
            if slots.to_read[slot] == 0 and state.emitted[request] == 0:
                state.emitted[request], state.first[request] = 1, now
        elif chunk:
            accepted = min(slots.length[slot], rule.right[slots.place[slot]])
            learn(slots, slot, accepted, rule)
            state.emitted[request] += accepted + 1
            slots.context[slot] += accepted + 1
            count[KV] -= chunk - accepted - 1  # rejected drafts leave the KV cache
            count[DRAFTED] += slots.length[slot]
            count[ACCEPTED] += accepted
        if state.emitted[request] >= load.output[request]:
            state.finish[request] = now
            state.ended[state.ended[-1]] = request
            state.ended[-1] += 1
            count[FINISHED] += 1
            _vacate(state, i)
        else:
            i += 1
