"""Continuous batching in simulated time: vLLM's scheduler and a step-time model, compiled.

A step first serves the running requests in their order: one that decodes gets its token and the drafts to verify, one
that still reads its prompt gets a chunk of it, all within the token budget. Then waiting requests are admitted while
there are slots, tokens and room in the KV cache. One that finds no room sends the newest away, which later reads
prompt and answer again (recomputation, as in vLLM V1). Prefix caching is not modelled: traces hold no text.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aurora.compiled import compiled
from aurora.speculation_rules import AHEAD, Rule, Slots, choose_lengths, learn

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NOW, BUSY = range(2)  # places in State.clock
RUNNING, ARRIVED, AGAIN, FINISHED, KV, STEPS, DRAFTED, ACCEPTED, PREEMPTED = range(9)  # places in State.counts


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


class State(NamedTuple):
    """Everything that a step changes, so that a simulation can be cut into pieces."""

    clock: Floats  # [2] seconds: now, and spent in steps
    counts: Ints  # [9]
    order: Ints  # [max_seqs] slots in use, oldest first
    free: Ints  # [max_seqs] the others, as a stack
    again: Ints  # [n] requests that were sent away, as a stack
    slots: Slots
    emitted: Ints  # [n] tokens
    first: Floats  # [n] time of the first token
    finish: Floats  # [n] time of the last


def new_state(requests: int, max_seqs: int, k_max: int) -> State:
    return State(
        clock=np.zeros(2),
        counts=np.zeros(9, np.int64),
        order=np.zeros(max_seqs, np.int64),
        free=np.arange(max_seqs)[::-1].copy(),
        again=np.zeros(requests, np.int64),
        slots=Slots.empty(max_seqs, k_max),
        emitted=np.zeros(requests, np.int64),
        first=np.zeros(requests),
        finish=np.zeros(requests),
    )


@compiled
def advance(state: State, load: Load, engine: Engine, rule: Rule, steps: int) -> None:
    """Up to `steps` further engine steps; fewer when all requests are finished."""
    count = state.counts
    for _ in range(steps):
        if count[FINISHED] == len(load.arrival):
            return
        if count[RUNNING] == 0 and count[AGAIN] == 0 and not engine.at_once:
            state.clock[NOW] = max(state.clock[NOW], load.arrival[count[ARRIVED]])
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
    while count[RUNNING] < engine.max_seqs and budget > 0 and _next_waiting(state, load, engine) >= 0:
        wanted = min(_unread(state, load, _next_waiting(state, load, engine)), budget)
        if engine.kv_tokens - count[KV] < wanted:
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
    places, request = engine.max_seqs - count[RUNNING], count[ARRIVED]
    while places > 0 and tokens < left and request < len(load.arrival) and _has_come(state, load, engine, request):
        room -= load.prompt[request]
        if room < 0:
            break
        tokens += load.prompt[request]
        places, request = places - 1, request + 1
    return int(max(min(tokens, left), 0))


@compiled
def _has_come(state: State, load: Load, engine: Engine, request: int) -> bool:
    if engine.at_once:
        return bool(request - state.counts[FINISHED] < engine.at_once)
    return bool(load.arrival[request] <= state.clock[NOW])


@compiled
def _next_waiting(state: State, load: Load, engine: Engine) -> int:
    """The request that is admitted next, -1 when none waits."""
    count = state.counts
    if count[AGAIN]:
        return int(state.again[count[AGAIN] - 1])
    if count[ARRIVED] == len(load.arrival):
        return -1
    return int(count[ARRIVED]) if _has_come(state, load, engine, count[ARRIVED]) else -1


@compiled
def _unread(state: State, load: Load, request: int) -> int:
    """Tokens that the request reads before it goes on: its prompt, and what it had said if it was sent away."""
    return int(load.prompt[request] + max(state.emitted[request] - 1, 0))


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
    slot = state.free[len(state.free) - 1 - count[RUNNING]]
    state.order[count[RUNNING]] = slot
    count[RUNNING] += 1
    slots.request[slot], slots.to_read[slot], slots.context[slot] = request, _unread(state, load, request), 0
    slots.length[slot], slots.chunk[slot], slots.cold[slot] = 0, chunk, False
    slots.hits[slot], slots.trials[slot] = 0.0, 0.0
    count[KV] += chunk


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
            count[FINISHED] += 1
            _vacate(state, i)
        else:
            i += 1
