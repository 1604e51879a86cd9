import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.routing import (
    AS_GOOD,
    POLICIES,
    Arrival,
    Candidate,
    EarliestFinish,
    FleetTimes,
    LengthPredictor,
    PrefixMap,
    RequestTimes,
)

candidates = st.lists(
    st.builds(
        Candidate,
        st.sampled_from("abc"),
        st.integers(0, 9),
        st.floats(0, 1e4),
        st.floats(0, 1e3),
        st.integers(0, 2000),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
ARRIVAL = Arrival(1000, 100, 1000)


@given(candidates, st.sampled_from(sorted(POLICIES)))
def test_one_that_drains_is_chosen_only_if_all_do(replicas: list[Candidate], policy: str) -> None:
    chosen = replicas[POLICIES[policy]().choose(replicas, ARRIVAL)]
    assert not chosen.draining or all(replica.draining for replica in replicas)


@given(candidates)
def test_earliest_finish_is_about_as_early_as_any_with_the_fewest_requests_of_those(
    replicas: list[Candidate],
) -> None:
    policy = EarliestFinish(1.3)
    known = [c.tokens_per_s for c in replicas if c.tokens_per_s > 0]
    chosen = replicas[policy.choose(replicas, ARRIVAL)]
    living = [c for c in replicas if not c.draining] or replicas
    if known:
        usual = sum(known) / len(known)
        latest = AS_GOOD * min(policy.finish_s(c, ARRIVAL, usual) for c in living)
        assert policy.finish_s(chosen, ARRIVAL, usual) <= latest
        alike = [c for c in living if policy.finish_s(c, ARRIVAL, usual) <= latest]
        assert chosen.open_requests == min(c.open_requests for c in alike)
    else:
        assert chosen.open_requests == min(c.open_requests for c in living)


def test_round_robin_takes_each_in_turn() -> None:
    policy = POLICIES["round_robin"]()
    replicas = [Candidate(name, 0, 0, 0) for name in "abc"]
    assert [policy.choose(replicas, ARRIVAL) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "better",
    [
        Candidate("b", 1, 100, 50),  # fewer tokens before it
        Candidate("b", 2, 200, 80),  # faster
        Candidate("b", 2, 200, 50, cached_tokens=500),  # need not read the prompt
        Candidate("b", 2, 200, 50, has_domain=True),
    ],
)
def test_each_reason_counts(better: Candidate) -> None:
    assert EarliestFinish(1.3).choose([Candidate("a", 2, 200, 50), better], ARRIVAL) == 1


def test_long_answers_of_others_hold_up_a_short_one_only_as_long_as_it_lasts() -> None:
    policy = EarliestFinish()
    one_long, three_short = Candidate("a", 1, 5000, 50), Candidate("b", 3, 60, 50)
    assert policy.finish_s(one_long, Arrival(0, 10), 50) < policy.finish_s(three_short, Arrival(0, 20), 50)


def test_lengths_are_learned_by_label_and_size_of_prompt() -> None:
    lengths = LengthPredictor(usual=128)
    assert lengths.expected("sql", 50, 4096) == 128
    for _ in range(60):
        lengths.observe("sql", 50, 20)
        lengths.observe("essay", 50, 800)
        lengths.observe(None, 3000, 5)
    assert lengths.expected("sql", 50, 4096) == pytest.approx(20, rel=0.25)
    assert lengths.expected("essay", 60, 4096) == pytest.approx(800, rel=0.25)
    assert lengths.expected(None, 3000, 4096) < 0.2 * lengths.expected("essay", 3000, 4096)
    assert lengths.expected("essay", 50, 30) == 30


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 10**6), st.integers(0, 10**6)), max_size=50))
def test_expected_lengths_lie_between_one_and_what_the_request_allows(seen: list[tuple[str, int, int]]) -> None:
    lengths = LengthPredictor()
    for label, prompt, emitted in seen:
        lengths.observe(label, prompt, emitted)
        assert 1 <= lengths.expected(label, prompt, 50) <= 50


def test_a_cached_prefix_is_the_blocks_that_are_there_from_the_first_on() -> None:
    prefixes = PrefixMap(128, 4)
    prefixes.served("a", (1, 2, 3))
    assert prefixes.cached("a", (1, 2, 9, 3)) == 256
    assert prefixes.cached("b", (1, 2)) == 0
    prefixes.served("a", (7, 8))
    assert prefixes.cached("a", (1, 2, 3)) == 256, "the end of what was used longest ago has left first"
    prefixes.forget("a")
    assert prefixes.cached("a", (7,)) == 0


def test_times_of_requests_are_learned() -> None:
    rng = np.random.default_rng(0)
    times = RequestTimes()
    assert times.tokens_per_s(1) == times.prefill_tokens_per_s == 0
    for _ in range(300):
        new, emitted, beside = rng.integers(0, 2000), rng.integers(5, 300), rng.uniform(0, 7)
        true = new / 2000 + emitted * (0.05 + 0.01 * beside)
        times.observe(float(new), float(emitted), float(beside), true * rng.lognormal(0, 0.1))
    assert times.tokens_per_s(1) == pytest.approx(20, rel=0.1)
    assert times.tokens_per_s(4) == pytest.approx(4 / 0.08, rel=0.1)
    assert times.prefill_tokens_per_s == pytest.approx(2000, rel=0.2)
    assert times.predicted_s(2000, 100, 2) == pytest.approx(8, rel=0.1)


@given(st.lists(st.tuples(*[st.floats(0, 1e5)] * 4), min_size=1, max_size=20))
def test_no_request_makes_a_speed_negative(seen: list[tuple[float, float, float, float]]) -> None:
    times = RequestTimes()
    for row in seen:
        times.observe(*row)
        assert times.tokens_per_s(3) >= 0
        assert times.prefill_tokens_per_s >= 0


def test_replicas_share_what_they_have_in_common_and_a_slow_one_is_known_as_such() -> None:
    rng, times = np.random.default_rng(0), FleetTimes()
    for i in range(600):
        new, emitted, beside = rng.integers(0, 2000), rng.integers(5, 300), rng.uniform(0, 7)
        true = (new / 2000 + emitted * (0.05 + 0.01 * beside)) * (2 if i % 3 == 0 else 1)
        times.observe("slow" if i % 3 == 0 else f"fast{i % 3}", float(new), float(emitted), float(beside), true)
    assert times.pace("slow") / times.pace("fast1") == pytest.approx(2, rel=0.15)
    assert times.tokens_per_s("fast1", 1) == pytest.approx(20, rel=0.15)
    assert times.tokens_per_s("fast2", 4) == pytest.approx(4 / 0.08, rel=0.15)
    assert times.predicted_s("slow", 2000, 100, 2) == pytest.approx(16, rel=0.15)
    assert times.tokens_per_s("new", 4) == times.common.tokens_per_s(4), "one that is new is taken for a usual one"
    times.forget("slow")
    assert times.pace("slow") == 1


def test_requests_that_end_by_chance_sooner_do_not_draw_all_the_others() -> None:
    """Two like replicas whose requests differ by chance: neither is believed to be much faster."""
    rng, times = np.random.default_rng(1), FleetTimes()
    for i in range(40):
        times.observe("ab"[i % 2], 100.0, 50.0, float(rng.uniform(0, 3)), 3.0 * rng.lognormal(0, 0.5))
        assert 0.5 < times.pace("a") / times.pace("b") < 2
