"""Simulated replicas behind a router: one is the plain simulator, several lose nothing, prefixes are read once."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora import batching
from aurora.batching import Engine, Load, advance, new_state
from aurora.replica_states import same_rules
from aurora.routing import POLICIES
from aurora.simulated_fleet import Known, simulate_fleet
from aurora.speculation_rules import FIXED, GOODPUT, Rule, new_memory

COSTS = [0.05, 0.002, 0.003, 0.0004, 0.001, 0.006, 0.0001, 0.005]
NOTHING = Known()
ROUTERS = sorted(POLICIES)


def _rule(kind: int, k: int = 0, *, passes: bool = True) -> Rule:
    right = [2, 0, 4, 1, 1]
    expected = np.where(np.arange(4) < np.array(right)[:, None], 0.9, 0.0).astype(np.float32)
    memory = new_memory(), np.zeros(4), np.zeros(4)
    return Rule(kind, 4, np.full(65, k), np.array(COSTS), passes, 0.01, np.array(right, np.uint8), expected, *memory)


def _load(requests: list[tuple[float, int, int]]) -> Load:
    gaps, prompt, output = (np.array(column) for column in zip(*requests, strict=True))
    n = len(requests)
    return Load(np.cumsum(gaps.astype(np.float64)), prompt, output, np.zeros(n, np.int64), np.full(n, 5))


def _serve(load: Load, engine: Engine, rule: Rule, replicas: int, router: str, known: Known = NOTHING):
    each = same_rules(rule, [rule.costs] * replicas)
    *_, state = simulate_fleet(load, engine, each, POLICIES[router](), known)
    return state


REQUESTS = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=12)
ENGINES = st.sampled_from([(1, 8, 95), (3, 8, 95), (3, 40, 150), (64, 300, 4000)])


@given(REQUESTS, ENGINES, st.sampled_from([FIXED, GOODPUT]), st.booleans(), st.sampled_from(ROUTERS))
@settings(max_examples=60, deadline=None)
def test_one_replica_is_the_plain_simulator_whoever_routes(requests, limits, kind, passes, router):
    load, engine = _load(requests), Engine(*limits, 0)
    plain = new_state(len(requests), engine.max_seqs, 4)
    advance(plain, load, engine, _rule(kind, 2, passes=passes), 1 << 40)
    fleet = _serve(load, engine, _rule(kind, 2, passes=passes), 1, router)
    for name in ("emitted", "first", "finish", "ended"):
        assert (getattr(fleet, name) == getattr(plain, name)).all()
    assert (fleet.counts[0] == plain.counts).all()
    assert (fleet.clock[0, :2] == plain.clock[:2]).all()


@given(REQUESTS, ENGINES, st.integers(2, 4), st.sampled_from(ROUTERS), st.lists(st.integers(0, 2), min_size=12))
@settings(max_examples=60, deadline=None)
def test_every_request_is_served_once_by_one_replica(requests, limits, replicas, router, sessions):
    load, engine = _load(requests), Engine(*limits, 0)
    blocks = [[(sessions[i] << 20) + b for b in range(int(p) // 16)] for i, p in enumerate(load.prompt)]
    known = Known((), blocks, 16)
    fleet = _serve(load, engine, _rule(GOODPUT), replicas, router, known)
    assert fleet.emitted.tolist() == load.output.tolist()
    assert sorted(fleet.ended[:-1].tolist()) == list(range(len(requests)))
    assert fleet.counts[:, batching.GIVEN].sum() == len(requests)
    assert (fleet.counts[:, batching.KV] == 0).all()
    assert (load.arrival < fleet.first).all()
    assert (fleet.cached >= 0).all()
    assert (fleet.cached < load.prompt).all()
    again = _serve(load, engine, _rule(GOODPUT), replicas, router, known)
    assert (again.finish == fleet.finish).all()


def test_requests_in_turn_are_so_many_separate_servers():
    rng = np.random.default_rng(1)
    load = _load(list(zip(rng.exponential(0.2, 90), rng.integers(1, 60, 90), rng.integers(1, 40, 90), strict=True)))
    engine = Engine(8, 64, 4000, 0)
    fleet = _serve(load, engine, _rule(GOODPUT), 3, "round_robin")
    for i in range(3):
        mine = Load(*(column[i::3].copy() for column in load))
        alone = new_state(30, 8, 4)
        advance(alone, mine, engine, _rule(GOODPUT), 1 << 40)
        assert fleet.finish[i::3].tolist() == alone.finish.tolist()


def test_a_cached_prefix_is_not_read_again_and_is_looked_for_where_it_is():
    prompts = [(5.0, 512, 4)] * 12  # far apart: replicas are idle when one comes
    load, engine = _load(prompts), Engine(8, 2048, 4000, 0)
    blocks = [[(i % 3 << 20) + b for b in range(32)] for i in range(12)]  # three conversations in turn
    known = Known((), blocks, 16)
    cold = _serve(load, engine, _rule(FIXED), 2, "round_robin")
    assert not cold.cached.any()
    spread = _serve(load, engine, _rule(FIXED), 2, "round_robin", known)
    kept = _serve(load, engine, _rule(FIXED), 2, "earliest_finish", known)
    assert (spread.cached > 0).sum() == 12 - 6, "each conversation is read once by each replica"
    assert (kept.cached > 0).sum() >= 8
    assert kept.cached.max() == 511, "the last token is always read"
    first = (kept.first - load.arrival)[kept.cached > 0]
    reading = COSTS[0] + COSTS[3] + 512 * COSTS[4] * 1e-3
    assert first.tolist() == pytest.approx([reading] * len(first))


def test_where_one_replica_is_slow_the_others_get_more_and_answers_come_sooner():
    rng = np.random.default_rng(0)
    load = _load(list(zip(rng.exponential(0.12, 600), rng.integers(5, 60, 600), rng.integers(5, 60, 600), strict=True)))
    engine, rule = Engine(64, 300, 4000, 0), _rule(FIXED)
    each = same_rules(rule, [rule.costs * 4, rule.costs, rule.costs])
    mean, given_to_slow = {}, {}
    for router in ROUTERS:
        *_, state = simulate_fleet(load, engine, each, POLICIES[router](), NOTHING)
        mean[router] = (state.finish - load.arrival).mean()
        given_to_slow[router] = int(state.counts[0, batching.GIVEN])
    assert given_to_slow["round_robin"] == 200
    assert given_to_slow["earliest_finish"] < 150
    assert mean["earliest_finish"] < 0.8 * mean["round_robin"]
    assert mean["least_loaded"] < mean["round_robin"]


def test_the_trace_says_what_is_known_of_a_prompt(tmp_path: Path):
    from aurora.arrivals import read_arrivals

    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 2], "domain": "sql"},
        {"timestamp": 500, "input_length": 600, "output_length": 3, "hash_ids": [0, 3], "domain": None},
    ]
    file = tmp_path / "hashed.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    trace = read_arrivals(file)
    assert trace.seconds.tolist() == [0.0, 0.5]
    assert Known.of(trace) == (("sql", None), ((0, 1, 2), (0, 3)), 512)
    assert Known.of(trace, prefix_cache=False).blocks == ()
    twice = trace.repeated(4)
    assert len(twice.blocks) == 4
    assert not set(twice.blocks[0]) & set(twice.blocks[2]), "nothing of a round is in the cache of the next"
    assert twice.labels == ("sql", None) * 2


def test_prompts_of_a_session_begin_alike(tmp_path: Path):
    from aurora.arrivals import read_arrivals

    rows = [{"t_s": i, "request_tokens": 130, "response_tokens": 3, "session_id": s} for i, s in enumerate("aba")]
    file = tmp_path / "sessions.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"t_s": 9, "session_id": None}])))
    trace = read_arrivals(file)
    assert trace.blocks[0] == trace.blocks[2] != trace.blocks[1]
    assert [len(each) for each in trace.blocks] == [2, 2, 2, 0]
    assert trace.block_tokens == 64
