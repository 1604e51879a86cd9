"""The choice of drafters and lengths equals brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora.goodput import (
    DRAFTERS,
    LATE,
    MODEL,
    NEURAL,
    TABLE,
    Caps,
    choose,
    choose_latency,
    with_drafts,
    within,
)
from aurora.step_time import COSTS, StepTimeModel, StepWork


def _work(**changes: int) -> StepWork:
    base = {"requests": 1, "drafts": 0, "prefill_tokens": 0, "context_tokens": 0, "draft_first": 0, "draft_more": 0}
    return StepWork(**{**base, **changes})


def _model(costs: list[float]) -> StepTimeModel:
    """Those at the end may be left out and are then nothing."""
    model = StepTimeModel()
    model._costs = np.array([*costs, *[0.0] * (len(COSTS) - len(costs))])
    return model


@st.composite
def _cases(draw):
    requests, k_max = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if requests == 3:
        k_max = min(k_max, 2)  # brute force takes (1 + k_max * DRAFTERS) ** requests
    rate = st.floats(0.0, 1.0)
    rates = np.array([draw(rate) for _ in range(requests * DRAFTERS * k_max)]).reshape(requests, DRAFTERS, k_max)
    limits = np.array([[draw(st.integers(0, k_max)) for _ in range(DRAFTERS)] for _ in range(requests)])
    cost = st.floats(0.0, 0.2)
    costs = [draw(st.floats(0.01, 1.0)), *[draw(cost) for _ in COSTS[1:]]]
    unread = np.array([float(draw(st.integers(0, 5))) for _ in range(requests)])
    return np.cumprod(rates, axis=2), limits, costs, unread


def _every(limits) -> list[tuple[tuple[int, int], ...]]:
    """All ways to give each request a drafter and a length."""
    options = [[(NEURAL, 0), *((d, k) for d in range(DRAFTERS) for k in range(1, row[d] + 1))] for row in limits]
    return list(product(*options))


def _emitted(options, gains) -> float:
    return len(options) + sum(gains[i, drafter, :k].sum() for i, (drafter, k) in enumerate(options))


def _goodput(options, gains, base, model, unread) -> float:
    """Of one (drafter, length) for each request, from the definition."""
    caps = Caps(*(max((k for d, k in options if d == drafter), default=0) for drafter in (NEURAL, MODEL)))
    read = sum(unread[i] for i, (drafter, k) in enumerate(options) if drafter == MODEL and k)
    work = with_drafts(base, sum(k for _, k in options), caps, read)
    return _emitted(options, gains) / model.predict(work)


@settings(max_examples=200, deadline=None)
@given(_cases())
def test_choice_equals_brute_force(case):
    gains, limits, costs, unread = case
    model, base = _model(costs), _work(requests=len(gains))
    chosen = choose(gains, limits, base, model, unread=unread)
    picked = tuple(zip(chosen.drafters, chosen.lengths, strict=True))
    best = max(_goodput(options, gains, base, model, unread) for options in _every(limits))
    assert chosen.goodput == pytest.approx(best)
    assert _goodput(picked, gains, base, model, unread) == pytest.approx(best), "what it says is what it is"
    assert all(k <= limits[i, drafter] for i, (drafter, k) in enumerate(picked))
    assert all(k <= chosen.caps.neural for drafter, k in picked if drafter == NEURAL)
    assert all(k <= chosen.caps.model for drafter, k in picked if drafter == MODEL)


@settings(max_examples=100, deadline=None)
@given(_cases(), st.integers(0, 3), st.integers(0, 3))
def test_with_the_drafts_already_made_the_choice_equals_brute_force(case, neural, drafted):
    gains, limits, costs, _ = case
    limits[:, NEURAL], limits[:, MODEL] = np.minimum(limits[:, NEURAL], neural), np.minimum(limits[:, MODEL], drafted)
    model, base = _model(costs), _work(requests=len(gains))
    caps = Caps(min(neural, gains.shape[2]), min(drafted, gains.shape[2]))
    chosen = choose(gains, limits, base, model, caps=[caps])
    drafts = [(options, sum(k for _, k in options)) for options in _every(limits)]
    best = max(_emitted(options, gains) / model.predict(with_drafts(base, n, caps)) for options, n in drafts)
    assert chosen.goodput == pytest.approx(best)
    assert chosen.caps == caps


def test_certain_acceptance_and_free_drafts_take_the_longest():
    choice = choose(np.ones((2, DRAFTERS, 4)), np.full((2, DRAFTERS), 4), _work(requests=2), _model([1.0, *[0] * 7]))
    assert choice.lengths == (4, 4)


def test_hopeless_drafts_are_not_made():
    costs = _model([1.0, 0, 0.1, 0, 0, 0.1, 0, 0.1])
    choice = choose(np.zeros((2, DRAFTERS, 4)), np.full((2, DRAFTERS), 4), _work(requests=2), costs)
    assert choice.lengths == (0, 0)
    assert choice.caps == Caps(0, 0)


def test_equal_drafts_come_from_the_drafter_that_costs_nothing():
    passes = [1.0, 0, 0, 0, 0, 0.1, 0, 0, 0.1, 0, 0]
    choice = choose(np.full((1, DRAFTERS, 1), 0.9), np.ones((1, DRAFTERS), int), _work(), _model(passes))
    assert choice.drafters == (TABLE,)
    assert choice.caps == Caps(0, 0)


def test_no_requests_is_an_empty_choice():
    choice = choose(
        np.zeros((0, DRAFTERS, 3)), np.zeros((0, DRAFTERS), dtype=np.int64), _work(requests=0), _model([1.0] * 8)
    )
    assert choice.lengths == ()


def _mean_time_a_token(options, gains, base, model, unread) -> float:
    slowness = np.mean([1 / (1 + gains[i, drafter, :k].sum()) for i, (drafter, k) in enumerate(options)])
    return slowness * _emitted(options, gains) / _goodput(options, gains, base, model, unread)


@settings(max_examples=200, deadline=None)
@given(_cases())
def test_least_latency_equals_brute_force(case):
    gains, limits, costs, unread = case
    model, base = _model(costs), _work(requests=len(gains))
    chosen = choose_latency(gains, limits, base, model, unread=unread)
    picked = tuple(zip(chosen.drafters, chosen.lengths, strict=True))
    best = min(_mean_time_a_token(options, gains, base, model, unread) for options in _every(limits))
    assert 1 / chosen.merit == pytest.approx(best)
    assert _mean_time_a_token(picked, gains, base, model, unread) == pytest.approx(best), "what it says is what it is"
    assert all(k <= limits[i, drafter] for i, (drafter, k) in enumerate(picked))


@settings(max_examples=100, deadline=None)
@given(_cases(), st.lists(st.floats(-2, 4), min_size=3, max_size=3))
def test_tokens_that_are_due_count_more(case, needed):
    gains, limits, costs, unread = case
    model, base, needs = _model(costs), _work(requests=len(gains)), np.array(needed[: len(gains)])

    def merit(options) -> float:
        tokens = [1 + gains[i, drafter, :k].sum() for i, (drafter, k) in enumerate(options)]
        worth = sum(t + (LATE - 1) * min(t, max(need, 0)) for t, need in zip(tokens, needs, strict=True))
        return worth * _goodput(options, gains, base, model, unread) / sum(tokens)

    chosen = choose(gains, limits, base, model, unread=unread, needs=needs)
    best = max(merit(options) for options in _every(limits))
    assert chosen.merit == pytest.approx(best)
    assert merit(tuple(zip(chosen.drafters, chosen.lengths, strict=True))) == pytest.approx(best)
    assert chosen.merit >= choose(gains, limits, base, model, unread=unread).goodput


@settings(max_examples=100, deadline=None)
@given(_cases(), st.integers(0, 6))
def test_where_there_is_little_room_the_best_drafts_stay(case, room):
    gains, limits, costs, _ = case
    limits[:, [NEURAL, MODEL]] = 0
    model, base = _model(costs), _work(requests=len(gains))
    chosen = choose(gains, limits, base, model, caps=[Caps(0)])
    cut = within(chosen, gains, room)
    assert sum(cut.lengths) == min(room, sum(chosen.lengths))
    fitting = [options for options in _every(limits) if sum(k for _, k in options) <= room]
    best = max(_goodput(options, gains, base, model, np.zeros(len(gains))) for options in fitting)
    picked = tuple((TABLE, k) for k in cut.lengths)
    assert _goodput(picked, gains, base, model, np.zeros(len(gains))) == pytest.approx(best)
    assert cut.emitted == pytest.approx(_emitted(picked, gains))
