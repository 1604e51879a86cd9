"""The live comparison of a new drafter version with the one before it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.guard import VersionGuard
from aurora.metrics import EngineReport


def _verify(guard: VersionGuard, version: int, rate: float, steps: int, seed: int = 0) -> int | None:
    """Report verifications one by one; returns after how many the live version counts as worse."""
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        accepted = int(rng.random() < rate)
        guard.observe(EngineReport(first_drafts={version: [1, accepted]}))
        if guard.worse:
            return step
    return None


def _on_probation(rate: float, steps: int = 500) -> VersionGuard:
    guard = VersionGuard(live=1)
    assert _verify(guard, 1, rate, steps) is None
    guard.swapped(2)
    return guard


@pytest.mark.parametrize(("before", "after"), [(0.6, 0.0), (0.6, 0.2), (0.4, 0.0), (0.8, 0.5)])
def test_a_much_worse_version_is_seen_within_200_verifications(before: float, after: float):
    for seed in range(20):
        guard = _on_probation(before)
        steps = _verify(guard, 2, after, 200, seed)
        assert steps is not None
        assert "of version 1" in guard.worse


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.95])
def test_an_equal_or_better_version_stays(rate: float):
    alarms = [_verify(_on_probation(rate), 2, min(1.0, rate + 0.02), 400, seed) for seed in range(50)]
    assert sum(step is not None for step in alarms) <= 1


def test_nothing_is_said_before_both_were_seen():
    guard = VersionGuard(live=1)
    guard.swapped(2)
    assert _verify(guard, 2, 0.0, 300) is None
    assert _verify(_on_probation(0.9, steps=10), 2, 0.0, 300) is None


def test_a_version_that_passed_its_probation_is_not_judged_by_the_past():
    guard = _on_probation(0.6)
    assert _verify(guard, 2, 0.6, 1100) is None
    assert _verify(guard, 2, 0.0, 300) is None, "the traffic has changed, not the version"


def test_after_a_rollback_the_older_version_is_compared_with_the_one_that_left():
    guard = _on_probation(0.6)
    assert _verify(guard, 2, 0.0, 200) is not None
    guard.swapped(1)
    assert guard.live == 1
    assert _verify(guard, 1, 0.6, 400) is None


def test_versions_of_the_draft_model_are_negative_in_reports():
    guard = VersionGuard(live=1, sign=-1)
    guard.observe(EngineReport(first_drafts={-1: [400, 240], 1: [400, 0]}))
    guard.swapped(2)
    guard.observe(EngineReport(first_drafts={-2: [100, 60], 2: [100, 0]}))
    assert not guard.worse
    guard.observe(EngineReport(first_drafts={-2: [200, 0]}))
    assert "of version 1" in guard.worse


@given(st.dictionaries(st.integers(0, 5), st.tuples(st.integers(0, 2000), st.integers(0, 2000)).map(sorted)))
def test_reports_of_any_version_are_taken(drafts: dict[int, list[int]]):
    guard = VersionGuard(live=3)
    guard.swapped(4)
    for _ in range(3):
        guard.observe(EngineReport(first_drafts={version: [n, right] for version, (right, n) in drafts.items()}))
    assert isinstance(guard.worse, str)
