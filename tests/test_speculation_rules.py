"""The compiled rules decide as the ones that serve: same estimates, same choice."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora import speculation_rules as rules
from aurora.acceptance import AcceptanceModel
from aurora.goodput import DRAFTERS, NEURAL, TABLE, Batch, Caps, choose
from aurora.speculation_rules import Rule, Slots, choose_lengths, learn, new_memory
from aurora.step_time import COSTS, StepTimeModel, StepWork

K_MAX = 3


def _rule(kind: int, costs: list[float], *, passes: bool, expected=None, right=None) -> Rule:
    places = 4
    return Rule(
        kind,
        K_MAX,
        np.full(9, 2),
        np.array(costs),
        passes,
        0.0,
        np.zeros(places, np.uint8) if right is None else np.array(right, np.uint8),
        np.zeros((places, K_MAX), np.float32) if expected is None else expected.astype(np.float32),
        new_memory(),
        np.zeros(K_MAX),
        np.zeros(K_MAX),
    )


def _slots(limits: list[int], context: int = 10) -> Slots:
    slots = Slots.empty(8, K_MAX)
    slots.place[: len(limits)] = np.arange(len(limits))
    slots.limit[: len(limits)] = limits
    slots.context[: len(limits)] = context
    return slots


COST_LISTS = st.lists(st.floats(0.0, 0.2), min_size=7, max_size=7)


@given(
    st.lists(st.integers(0, K_MAX), min_size=1, max_size=4),
    st.floats(0.01, 1.0),
    COST_LISTS,
    st.booleans(),
    st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_the_choice_is_the_one_that_serves(limits, constant, more, passes, seed):
    costs = [constant, *more]
    rng = np.random.default_rng(seed)
    gains = rng.uniform(0.05, 1.0, (len(limits), K_MAX)).cumprod(axis=1).astype(np.float32).astype(np.float64)
    slots, rule = _slots(limits), _rule(rules.GOODPUT, costs, passes=passes)
    best = rules._best(slots, np.arange(len(limits)), gains, np.array(limits), rule)
    model = StepTimeModel.known(dict(zip(COSTS, costs, strict=False)))
    drafter = NEURAL if passes else TABLE
    offered, allowed = np.zeros((len(limits), DRAFTERS, K_MAX)), np.zeros((len(limits), DRAFTERS), np.int64)
    offered[:, drafter], allowed[:, drafter] = gains, limits
    base = StepWork(len(limits), 0, 0, 10 * len(limits), 0, 0)
    served = choose(Batch(offered, allowed, base, model))
    lengths = slots.length[: len(limits)].tolist()
    emitted = len(limits) + sum(gains[i, :k].sum() for i, k in enumerate(lengths))
    work = dataclasses.replace(base, drafts=sum(lengths), draft_first=int(best > 0), draft_more=max(best - 1, 0))
    assert emitted / model.predict(work) == pytest.approx(served.goodput, rel=1e-6)
    assert served.caps == Caps(served.caps.neural)


@given(st.lists(st.tuples(st.integers(1, K_MAX), st.integers(0, K_MAX)), max_size=30))
def test_the_estimates_are_those_that_serve(seen):
    rule, slots, model = _rule(rules.GOODPUT, [1.0] * 8, passes=True), _slots([K_MAX]), AcceptanceModel(K_MAX)
    model.start("r")
    for drafted, right in seen:
        accepted = min(drafted, right)
        model.observe("r", drafted, accepted)
        slots.length[0] = drafted
        learn(slots, 0, accepted, rule)
    assert rules._expected(slots, np.array([0]), rule)[0] == pytest.approx(model.gains(["r"])[0])


def test_fixed_lengths_keep_to_what_is_of_use_and_on_offer():
    rule = _rule(rules.FIXED, [1.0] + [0.0] * 7, passes=True)
    slots = _slots([3, 1, 0])
    assert choose_lengths(slots, np.arange(3), rule) == 2
    assert slots.length[:3].tolist() == [2, 1, 0]
    slots.to_read[0] = 5
    assert choose_lengths(slots, np.arange(3), rule) == 1
    assert slots.length[:3].tolist() == [0, 1, 0]
    offers = np.array([[0.9, 0.5, 0.0], [0.9, 0.0, 0.0], [0.0, 0.0, 0.0], [0.9, 0.9, 0.9]])
    slots = _slots([3, 3, 3, 3])
    assert choose_lengths(slots, np.arange(4), _rule(rules.FIXED, [1.0] * 8, passes=False, expected=offers)) == 0
    assert slots.length[:4].tolist() == [2, 1, 0, 2]


def test_the_oracle_verifies_what_is_right():
    rule = _rule(rules.ORACLE, [1.0, 0.0, 0.01, 0, 0, 0.1, 0, 0.1], passes=True, right=[3, 0, 1, 2])
    slots = _slots([3, 3, 3, 1])
    assert choose_lengths(slots, np.arange(4), rule) == 3
    assert slots.length[:4].tolist() == [3, 0, 1, 1]


def test_hindsight_goes_by_what_it_was_told_and_is_never_cold():
    told = np.array([[0.9, 0.8, 0.7], [0.01, 0.0, 0.0], [0.9, 0.01, 0.0], [0.9, 0.8, 0.7]])
    rule = _rule(rules.HINDSIGHT, [1.0, 0.0, 0.05, 0, 0, 0.05, 0, 0.02], passes=True, expected=told)
    slots = _slots([3, 3, 3, 1])
    slots.cold[:] = True
    assert choose_lengths(slots, np.arange(4), rule) == 3
    assert slots.length[:4].tolist() == [3, 0, 1, 1]


def test_smartspec_drafts_as_long_as_drafts_were_right():
    costs = [1.0, 0.01, 0.05, 0, 0, 0.05, 0, 0.05]
    lengths = {}
    for rate in (0.05, 0.9):
        rule, slots = _rule(rules.SMARTSPEC, costs, passes=True), _slots([3, 3])
        rule.memory[rules.RATE] = rate
        choose_lengths(slots, np.arange(2), rule)
        lengths[rate] = slots.length[:2].tolist()
    assert lengths == {0.05: [0, 0], 0.9: [3, 3]}


def test_what_does_not_pay_is_left_out_and_looked_at_in_bursts():
    rule = _rule(rules.GOODPUT, [1.0, 0.0, 0.2, 0.0, 0.0, 0.5, 0.0, 0.1], passes=True)._replace(exploration=0.01)
    drafted, slots = 0, _slots([3, 3])
    for step in range(2000):
        slots.cold[:] &= step % 20 > 0  # requests come and go
        drafted += choose_lengths(slots, np.arange(2), rule) > 0
        for slot in range(2):
            learn(slots, slot, 0, rule)
    assert 15 < drafted < 80, "the first burst, then one in four hundred steps, each a few steps of half a plain one"
