import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.alarms import DRAFTS, NEVER_RIGHT, OFF, STEPS, SpeculationAlarms
from aurora.metrics import EngineReport
from aurora.trace import TABLE_VERSION


def _drafts(count: int, right: int, version: int = 1, steps: int = 10) -> EngineReport:
    first = {version: [count, right]} if count else {}
    return EngineReport(steps=steps, prefill_tokens=5, first_drafts=first, drafter_version=version)


def test_a_drafter_that_is_never_right_is_told_and_its_successor_forgiven() -> None:
    alarms = SpeculationAlarms()
    for _ in range(DRAFTS // 100 - 1):
        alarms.observe(_drafts(100, 0))
    assert not alarms.raised
    alarms.observe(_drafts(100, 0))
    assert alarms.raised == {NEVER_RIGHT: f"{DRAFTS} drafts of version 1, none right"}
    alarms.observe(_drafts(100, 0, version=2))
    assert not alarms.raised


@given(st.floats(0.02, 1.0), st.integers(0, 2**32 - 1))
def test_one_that_is_right_now_and_then_is_left_alone(rate: float, seed: int) -> None:
    """At the rate of an untrained drafter: a thousand wrong ones in a row come once in 5e8."""
    alarms, rng = SpeculationAlarms(), np.random.default_rng(seed)
    for _ in range(100):
        alarms.observe(_drafts(50, int(rng.binomial(50, rate))))
        assert not alarms.raised


@pytest.mark.parametrize("prompts", [True, False])
def test_speculation_that_is_off_is_told_unless_there_was_nobody_new_to_draft_for(prompts: bool) -> None:
    alarms = SpeculationAlarms()
    quiet = EngineReport(
        steps=STEPS // 2, prefill_tokens=9 * prompts, drafted_tokens={TABLE_VERSION: 50}, drafter_version=1
    )
    alarms.observe(quiet)
    assert not alarms.raised
    alarms.observe(quiet)
    assert set(alarms.raised) == ({OFF} if prompts else set())
    alarms.observe(_drafts(1, 0))
    assert not alarms.raised
