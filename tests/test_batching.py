"""Simulated batching: nothing is lost, the scheduler's limits hold, time is the sum of the steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora import batching
from aurora.batching import Engine, Load, State, advance, new_state
from aurora.speculation_rules import FIXED, GOODPUT, ORACLE, SMARTSPEC, Rule, new_memory

COSTS = [0.05, 0.002, 0.003, 0.0004, 0.001, 0.006, 0.0001, 0.005]


def _rule(kind: int, k: int, right: list[int], *, passes: bool = True, costs: list[float] = COSTS) -> Rule:
    k_max = 4
    expected = np.where(np.arange(k_max) < np.array(right)[:, None], 0.9, 0.0).astype(np.float32)
    memory = new_memory(), np.zeros(k_max), np.zeros(k_max)
    lengths = np.full(65, k)
    return Rule(kind, k_max, lengths, np.array(costs), passes, 0.01, np.array(right, np.uint8), expected, *memory)


def _load(requests: list[tuple[float, int, int]], places: int) -> Load:
    arrival, prompt, output = (np.array(column) for column in zip(*requests, strict=True))
    n = len(requests)
    return Load(np.cumsum(arrival.astype(np.float64)), prompt, output, np.zeros(n, np.int64), np.full(n, places))


def _serve(load: Load, engine: Engine, rule: Rule) -> State:
    state = new_state(len(load.arrival), engine.max_seqs, rule.k_max)
    while state.counts[batching.FINISHED] < len(load.arrival):
        before = state.clock[0]
        advance(state, load, engine, rule, 1)
        assert state.clock[0] > before
        assert 0 <= state.counts[batching.KV] <= engine.kv_tokens
        assert state.counts[batching.RUNNING] <= engine.max_seqs
        running = state.order[: state.counts[batching.RUNNING]]
        assert len(set(running.tolist())) == len(running)
        assert state.slots.context[running].sum() == state.counts[batching.KV]
    return state


REQUESTS = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=12)


@given(
    REQUESTS,
    st.lists(st.integers(0, 4), min_size=1, max_size=9),
    st.sampled_from([FIXED, SMARTSPEC, GOODPUT, ORACLE]),
    st.booleans(),
    st.integers(0, 4),
    st.sampled_from([(1, 8, 95), (3, 8, 95), (3, 40, 150), (64, 300, 4000)]),
    st.sampled_from([0, 0, 2]),
)
@settings(max_examples=120, deadline=None)
def test_every_request_gets_its_tokens_once(requests, right, kind, passes, k, engine, at_once):
    load = _load(requests, len(right))
    state = _serve(load, Engine(*engine, at_once), _rule(kind, k, right, passes=passes))
    assert state.emitted.tolist() == load.output.tolist()
    assert state.counts[batching.KV] == state.counts[batching.RUNNING] == 0
    assert (load.arrival < state.first).all()
    assert (state.first <= state.finish).all()
    assert state.finish.max() == state.clock[0]
    alone = (load.output - 1).sum()
    assert state.counts[batching.ACCEPTED] <= alone
    assert state.counts[batching.DRAFTED] >= state.counts[batching.ACCEPTED]


def test_one_request_takes_the_sum_of_its_steps():
    load = _load([(2.0, 10, 7)], 1)
    state = _serve(load, Engine(4, 8, 100, 0), _rule(FIXED, 2, [1]))
    c = COSTS
    reading = 2 * c[0] + 10 * c[3] + (8 + 10) * 1e-3 * c[4]  # chunks of 8 and 2 tokens
    assert state.first[0] == pytest.approx(2.0 + reading)
    # Six more tokens, two a step: two drafts each as long as three tokens are missing, then none is of use.
    steps, context = 0.0, 10
    for drafts in (2, 2, 1):
        steps += c[0] + c[1] + drafts * c[2] + (context + 1 + drafts) * 1e-3 * c[4]
        steps += c[5] + c[6] * (1 + drafts) + c[7] * (drafts - 1)
        context += 2
    assert state.finish[0] == pytest.approx(2.0 + reading + steps)
    assert state.counts[batching.DRAFTED] == 5
    assert state.counts[batching.ACCEPTED] == 3


def test_a_batch_shares_its_steps_and_a_full_cache_makes_the_newest_wait():
    together = _serve(_load([(0.0, 4, 20)] * 3, 1), Engine(3, 64, 100, 0), _rule(FIXED, 0, [0]))
    assert together.counts[batching.STEPS] == 20
    assert together.counts[batching.PREEMPTED] == 0
    crowded = _serve(_load([(0.0, 4, 20)] * 3, 1), Engine(3, 64, 40, 0), _rule(FIXED, 0, [0]))
    assert crowded.counts[batching.PREEMPTED] > 0
    assert crowded.finish.argmax() == 2
    assert crowded.finish[0] == pytest.approx(together.finish[0], rel=0.05)


def test_a_closed_loop_keeps_as_many_open():
    load = _load([(5.0, 4, 10)] * 6, 1)
    state = _serve(load, Engine(8, 64, 1000, 2), _rule(FIXED, 0, [0]))
    assert load.arrival[:2].tolist() == [0.0, 0.0], "whenever the trace has them come"
    assert load.arrival[2:].tolist() == [*([state.finish[0]] * 2), *([state.finish[2]] * 2)]


def test_goodput_costs_little_where_nothing_is_right_and_nears_the_oracle_where_all_is():
    def seconds(kind: int, right: int, k: int = 0) -> float:
        load = _load([(0.0, 20, 60)] * 40, 1)
        return float(_serve(load, Engine(4, 256, 10_000, 4), _rule(kind, k, [right])).clock[0])

    assert seconds(GOODPUT, 0) < 1.03 * seconds(FIXED, 0)
    assert seconds(GOODPUT, 4) < 1.05 * seconds(ORACLE, 4) < 0.6 * seconds(FIXED, 4)
