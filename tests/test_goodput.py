"""The choice of drafters and lengths equals brute force."""

import dataclasses
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
    Batch,
    Caps,
    Choice,
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
def _batches(draw) -> Batch:
    requests, k_max = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if requests == 3:
        k_max = min(k_max, 2)  # brute force takes (1 + k_max * DRAFTERS) ** requests
    rate = st.floats(0.0, 1.0)
    rates = np.array([draw(rate) for _ in range(requests * DRAFTERS * k_max)]).reshape(requests, DRAFTERS, k_max)
    limits = np.array([[draw(st.integers(0, k_max)) for _ in range(DRAFTERS)] for _ in range(requests)])
    cost = st.floats(0.0, 0.2)
    costs = [draw(st.floats(0.01, 1.0)), *[draw(cost) for _ in COSTS[1:]]]
    unread = np.array([float(draw(st.integers(0, 5))) for _ in range(requests)])
    return Batch(np.cumprod(rates, axis=2), limits, _work(requests=requests), _model(costs), unread=unread)


def _every(limits) -> list[tuple[tuple[int, int], ...]]:
    """All ways to give each request a drafter and a length."""
    options = [[(NEURAL, 0), *((d, k) for d in range(DRAFTERS) for k in range(1, row[d] + 1))] for row in limits]
    return list(product(*options))


def _emitted(options, batch: Batch) -> float:
    return len(options) + sum(batch.gains[i, drafter, :k].sum() for i, (drafter, k) in enumerate(options))


def _goodput(options, batch: Batch) -> float:
    """Of one (drafter, length) for each request, from the definition."""
    caps = Caps(*(max((k for d, k in options if d == drafter), default=0) for drafter in (NEURAL, MODEL)))
    read = sum(batch.unread[i] for i, (drafter, k) in enumerate(options) if drafter == MODEL and k)
    work = with_drafts(batch.base, sum(k for _, k in options), caps, read)
    return _emitted(options, batch) / batch.model.predict(work)


def _picked(chosen: Choice, batch: Batch) -> tuple[tuple[int, int], ...]:
    """What was chosen for each request, within its limits."""
    picked = tuple(zip(chosen.drafters, chosen.lengths, strict=True))
    assert all(k <= batch.limits[i, drafter] for i, (drafter, k) in enumerate(picked))
    return picked


@settings(max_examples=200, deadline=None)
@given(_batches())
def test_choice_equals_brute_force(batch):
    chosen = choose(batch)
    picked = _picked(chosen, batch)
    assert chosen.goodput == pytest.approx(max(_goodput(options, batch) for options in _every(batch.limits)))
    assert _goodput(picked, batch) == pytest.approx(chosen.goodput), "what it says is what it is"
    assert all(k <= chosen.caps.neural for drafter, k in picked if drafter == NEURAL)
    assert all(k <= chosen.caps.model for drafter, k in picked if drafter == MODEL)


@settings(max_examples=100, deadline=None)
@given(_batches(), st.integers(0, 3), st.integers(0, 3))
def test_with_the_drafts_already_made_the_choice_equals_brute_force(batch, neural, drafted):
    limits, k_max = batch.limits, batch.gains.shape[2]
    limits[:, NEURAL], limits[:, MODEL] = np.minimum(limits[:, NEURAL], neural), np.minimum(limits[:, MODEL], drafted)
    caps = Caps(min(neural, k_max), min(drafted, k_max))
    chosen = choose(dataclasses.replace(batch, caps=[caps], unread=None))
    drafts = [(options, sum(k for _, k in options)) for options in _every(limits)]
    seconds = [batch.model.predict(with_drafts(batch.base, n, caps)) for _, n in drafts]
    best = max(_emitted(options, batch) / time for (options, _), time in zip(drafts, seconds, strict=True))
    assert chosen.goodput == pytest.approx(best)
    assert chosen.caps == caps


def test_certain_acceptance_and_free_drafts_take_the_longest():
    gains, limits = np.ones((2, DRAFTERS, 4)), np.full((2, DRAFTERS), 4)
    choice = choose(Batch(gains, limits, _work(requests=2), _model([1.0, *[0] * 7])))
    assert choice.lengths == (4, 4)


def test_hopeless_drafts_are_not_made():
    costs = _model([1.0, 0, 0.1, 0, 0, 0.1, 0, 0.1])
    choice = choose(Batch(np.zeros((2, DRAFTERS, 4)), np.full((2, DRAFTERS), 4), _work(requests=2), costs))
    assert choice.lengths == (0, 0)
    assert choice.caps == Caps(0, 0)


def test_prompts_in_the_step_make_no_second_cheap():
    """Their time is spent whatever is chosen, so drafts that do not pay in a plain step do not pay beside a prompt."""
    costs = _model([1.0, 0, 0.3, 0.01, 0, 0, 0.002, 0])
    gains, limits = np.full((1, DRAFTERS, 1), 0.2), np.array([[1, 1, 0]])
    assert choose(Batch(gains, limits, _work(prefill_tokens=500), costs)).lengths == (0,)
    assert choose_latency(Batch(gains, limits, _work(prefill_tokens=500), costs)).lengths == (0,)
    better = choose(Batch(gains * 2, limits, _work(prefill_tokens=500), costs))
    assert better.drafters == (TABLE,), "the neural drafter would read the prompt"
    assert better.seconds == pytest.approx(1.3)


def test_equal_drafts_come_from_the_drafter_that_costs_nothing():
    passes = [1.0, 0, 0, 0, 0, 0.1, 0, 0, 0.1, 0, 0]
    choice = choose(Batch(np.full((1, DRAFTERS, 1), 0.9), np.ones((1, DRAFTERS), int), _work(), _model(passes)))
    assert choice.drafters == (TABLE,)
    assert choice.caps == Caps(0, 0)


def test_no_requests_is_an_empty_choice():
    gains, limits = np.zeros((0, DRAFTERS, 3)), np.zeros((0, DRAFTERS), dtype=np.int64)
    choice = choose(Batch(gains, limits, _work(requests=0), _model([1.0] * 8)))
    assert choice.lengths == ()


def _mean_time_a_token(options, batch: Batch) -> float:
    slowness = np.mean([1 / (1 + batch.gains[i, drafter, :k].sum()) for i, (drafter, k) in enumerate(options)])
    return slowness * _emitted(options, batch) / _goodput(options, batch)


@settings(max_examples=200, deadline=None)
@given(_batches())
def test_least_latency_equals_brute_force(batch):
    chosen = choose_latency(batch)
    assert 1 / chosen.merit == pytest.approx(
        min(_mean_time_a_token(options, batch) for options in _every(batch.limits))
    )
    assert _mean_time_a_token(_picked(chosen, batch), batch) == pytest.approx(1 / chosen.merit)


@settings(max_examples=100, deadline=None)
@given(_batches(), st.lists(st.floats(-2, 4), min_size=3, max_size=3))
def test_tokens_that_are_due_count_more(batch, needed):
    needs = np.array(needed[: len(batch.gains)])

    def merit(options) -> float:
        tokens = [1 + batch.gains[i, drafter, :k].sum() for i, (drafter, k) in enumerate(options)]
        worth = sum(t + (LATE - 1) * min(t, max(need, 0)) for t, need in zip(tokens, needs, strict=True))
        return worth * _goodput(options, batch) / sum(tokens)

    chosen = choose(batch, needs)
    assert chosen.merit == pytest.approx(max(merit(options) for options in _every(batch.limits)))
    assert merit(_picked(chosen, batch)) == pytest.approx(chosen.merit)
    assert chosen.merit >= choose(batch).goodput


@settings(max_examples=100, deadline=None)
@given(_batches(), st.integers(0, 6))
def test_where_there_is_little_room_the_best_drafts_stay(batch, room):
    batch.limits[:, [NEURAL, MODEL]] = 0
    chosen = choose(dataclasses.replace(batch, caps=[Caps(0)]))
    cut = within(chosen, batch.gains, room)
    assert sum(cut.lengths) == min(room, sum(chosen.lengths))
    fitting = [options for options in _every(batch.limits) if sum(k for _, k in options) <= room]
    picked = _picked(cut, batch)
    assert all(drafter == TABLE for drafter, k in picked if k)
    assert _goodput(picked, batch) == pytest.approx(max(_goodput(options, batch) for options in fitting))
    assert cut.emitted == pytest.approx(_emitted(picked, batch))
