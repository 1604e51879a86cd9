from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from aurora.rollout import Rollout

REPLICAS = ("a", "b", "c")


def rollout(approved: int = 1) -> Rollout:
    """One that is at version `approved` everywhere."""
    started = Rollout(limit_s=120)
    for replica in REPLICAS:
        assert started.allowed(replica, REPLICAS, 0, approved, 0) == approved
    return started


def test_only_the_canary_gets_a_new_version_until_it_has_drafted_as_well_as_the_others() -> None:
    trial = rollout()
    assert [trial.allowed(name, REPLICAS, 1, 2, 1) for name in REPLICAS] == [2, 1, 1]
    trial.observe(2, {2: (99, 50)})
    trial.observe(1, {1: (300, 150)})
    assert trial.allowed("b", REPLICAS, 1, 2, 2) == 1
    trial.observe(2, {2: (1, 1)})
    assert [trial.allowed(name, REPLICAS, live, 2, 3) for name, live in zip(REPLICAS, (2, 1, 1), strict=True)] == [
        2
    ] * 3


def test_a_worse_version_is_refused_and_the_others_never_get_it() -> None:
    trial = rollout()
    assert trial.allowed("a", REPLICAS, 1, 2, 1) == 2
    trial.observe(1, {1: (100, 50)})
    trial.observe(2, {2: (100, 5)})
    assert trial.allowed("b", REPLICAS, 1, 2, 500) == 1, "however long the trial lasts"
    assert "canary" in trial.refuses(2, 500)
    assert not trial.refuses(1, 500)
    assert [trial.allowed(name, REPLICAS, 1, 1, 501) for name in REPLICAS] == [1, 1, 1]


def test_what_looks_a_little_worse_stays_on_trial_and_is_refused_at_its_end() -> None:
    trial = rollout()
    assert trial.allowed("a", REPLICAS, 1, 2, 0) == 2
    trial.observe(1, {1: (200, 20)})
    trial.observe(2, {2: (200, 6)})
    assert trial.allowed("b", REPLICAS, 1, 2, 119) == 1
    assert not trial.refuses(2, 119)
    assert trial.refuses(2, 120)
    assert trial.allowed("b", REPLICAS, 1, 2, 121) == 1


def test_where_next_to_nothing_is_right_the_trial_goes_on() -> None:
    trial = rollout()
    assert trial.allowed("a", REPLICAS, 1, 2, 0) == 2
    trial.observe(1, {1: (400, 2)})
    trial.observe(2, {2: (100, 0)})
    assert trial.allowed("b", REPLICAS, 1, 2, 1) == 1, "100 drafts of a rate of 1 in 50 say nothing"
    trial.observe(1, {1: (400, 14)})
    trial.observe(2, {2: (498, 0)})
    assert trial.refuses(2, 120)


def test_a_trial_without_drafts_ends_with_its_time() -> None:
    trial = rollout()
    assert trial.allowed("a", REPLICAS, 1, 2, 10) == 2
    assert trial.allowed("b", REPLICAS, 1, 2, 129) == 1
    assert trial.allowed("b", REPLICAS, 1, 2, 130) == 2


def test_while_one_is_on_trial_newer_ones_wait() -> None:
    trial = rollout()
    assert trial.allowed("a", REPLICAS, 1, 2, 1) == 2
    assert trial.allowed("a", REPLICAS, 2, 5, 2) == 2
    trial.observe(1, {1: (100, 50)})
    trial.observe(2, {2: (100, 50)})
    assert trial.allowed("a", REPLICAS, 2, 5, 3) == 2
    assert trial.allowed("a", REPLICAS, 2, 5, 4) == 5
    assert trial.allowed("b", REPLICAS, 1, 5, 4) == 2


def test_a_version_that_the_canary_took_back_makes_way_for_newer_ones() -> None:
    trial = rollout()
    assert trial.allowed("a", REPLICAS, 1, 2, 0) == 2
    trial.observe(1, {1: (530, 10)})
    trial.observe(2, {2: (530, 0)})
    assert trial.allowed("b", REPLICAS, 1, 2, 1) == 1
    assert [trial.allowed(name, REPLICAS, 1, 9, 2) for name in REPLICAS] == [9, 1, 1], "its guard was faster than we"
    assert trial.allowed("a", REPLICAS, 9, 9, 500) == 9
    assert [trial.allowed(name, REPLICAS, 1, 9, 500) for name in REPLICAS[1:]] == [9, 9]


def test_a_canary_that_starts_anew_goes_on_with_the_trial() -> None:
    trial = rollout()
    assert trial.allowed("a", REPLICAS, 1, 2, 0) == 2
    trial.observe(2, {2: (50, 20)})
    assert trial.allowed("a", REPLICAS, 0, 3, 1) == 2
    assert trial.allowed("b", ("b", "c"), 1, 3, 2) == 2, "nor has another in its place taken anything back"


def test_when_the_canary_is_gone_another_replica_takes_its_place() -> None:
    trial = rollout()
    assert trial.allowed("a", REPLICAS, 1, 2, 1) == 2
    assert trial.allowed("b", ("b", "c"), 1, 2, 2) == 2


def test_one_replica_alone_has_nobody_to_compare_with() -> None:
    trial = rollout()
    assert trial.allowed("a", ("a",), 1, 2, 1) == 2


def test_a_router_that_was_restarted_goes_on_from_what_the_replicas_use() -> None:
    anew = Rollout(limit_s=120)
    assert anew.allowed("b", REPLICAS, 4, 6, 0) == 4
    assert anew.allowed("a", REPLICAS, 4, 6, 0) == 6


@given(
    st.lists(
        st.tuples(st.sampled_from(REPLICAS), st.booleans(), st.booleans(), st.integers(0, 200), st.floats(0, 1)),
        max_size=60,
    )
)
def test_no_replica_but_the_canary_ever_drafts_with_what_was_never_approved(
    steps: list[tuple[str, bool, bool, int, float]],
) -> None:
    trial = rollout()
    live, rejected, newest, now_s = dict.fromkeys(REPLICAS, 1), set[int](), 1, 0.0
    approved = [trial.approved]
    for replica, publish, reject, drafts, rate in steps:
        now_s += 5
        newest += publish
        if reject and newest > 1:
            rejected.add(newest)
        latest = max(v for v in range(1, newest + 1) if v not in rejected)
        allowed = trial.allowed(replica, REPLICAS, live[replica], latest, now_s)
        live[replica] = max(v for v in range(1, allowed + 1) if v not in rejected)
        trial.observe(live[replica], {live[replica]: (drafts, round(rate * drafts))})
        approved.append(trial.approved)
        assert allowed <= latest
        assert replica == "a" or allowed <= trial.approved
    assert all(after >= before or before in rejected for before, after in pairwise(approved))
