"""The choice of lengths equals brute force; the step-time model recovers what generated its data."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora.goodput import NEURAL, TABLE, StepTimeModel, StepWork, choose, with_drafts


def _work(**changes: int) -> StepWork:
    base = {"requests": 1, "drafts": 0, "prefill_tokens": 0, "context_tokens": 0, "draft_first": 0, "draft_more": 0}
    return StepWork(**{**base, **changes})


def _model(costs: list[float]) -> StepTimeModel:
    model = StepTimeModel()
    model._costs = np.array(costs)
    return model


@st.composite
def _cases(draw):
    requests, k_max = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rate = st.floats(0.0, 1.0)
    rates = np.array([draw(rate) for _ in range(requests * 2 * k_max)]).reshape(requests, 2, k_max)
    limits = np.array([[draw(st.integers(0, k_max)) for _ in range(2)] for _ in range(requests)])
    cost = st.floats(0.0, 0.2)
    costs = [draw(st.floats(0.01, 1.0)), *[draw(cost) for _ in range(7)]]
    return np.cumprod(rates, axis=2), limits, costs


def _goodput(options, gains, base, model) -> float:
    """Of one (drafter, length) for each request, from the definition."""
    cap = max((k for drafter, k in options if drafter == NEURAL), default=0)
    emitted = len(options) + sum(gains[i, drafter, :k].sum() for i, (drafter, k) in enumerate(options))
    return emitted / model.predict(with_drafts(base, sum(k for _, k in options), cap))


@settings(max_examples=300, deadline=None)
@given(_cases())
def test_choice_equals_brute_force(case):
    gains, limits, costs = case
    model, base = _model(costs), _work(requests=len(gains))
    chosen = choose(gains, limits, base, model)
    every = product(*([(d, k) for d in (NEURAL, TABLE) for k in range(row[d] + 1)] for row in limits))
    assert chosen.goodput == pytest.approx(max(_goodput(options, gains, base, model) for options in every))
    picked = list(zip(chosen.drafters, chosen.lengths, strict=True))
    assert all(k <= limits[i, drafter] for i, (drafter, k) in enumerate(picked))
    assert all(k <= chosen.cap for drafter, k in picked if drafter == NEURAL)


@settings(max_examples=100, deadline=None)
@given(_cases(), st.integers(0, 3))
def test_with_the_drafts_already_made_the_choice_equals_brute_force(case, cap):
    gains, limits, costs = case
    limits[:, NEURAL] = np.minimum(limits[:, NEURAL], cap)
    model, base = _model(costs), _work(requests=len(gains))
    chosen = choose(gains, limits, base, model, caps=[cap])
    every = product(*([(d, k) for d in (NEURAL, TABLE) for k in range(row[d] + 1)] for row in limits))
    best = 0.0
    for options in every:
        emitted = len(options) + sum(gains[i, d, :k].sum() for i, (d, k) in enumerate(options))
        best = max(best, emitted / model.predict(with_drafts(base, sum(k for _, k in options), cap)))
    assert chosen.goodput == pytest.approx(best)


def test_certain_acceptance_and_free_drafts_take_the_longest():
    choice = choose(np.ones((2, 2, 4)), np.full((2, 2), 4), _work(requests=2), _model([1.0, *[0] * 7]))
    assert choice.lengths == (4, 4)


def test_hopeless_drafts_are_not_made():
    costs = _model([1.0, 0, 0.1, 0, 0, 0.1, 0, 0.1])
    choice = choose(np.zeros((2, 2, 4)), np.full((2, 2), 4), _work(requests=2), costs)
    assert choice.lengths == (0, 0)
    assert choice.cap == 0


def test_equal_drafts_come_from_the_drafter_that_costs_nothing():
    choice = choose(np.full((1, 2, 1), 0.9), np.ones((1, 2), int), _work(), _model([1.0, 0, 0, 0, 0, 0.1, 0, 0]))
    assert choice.drafters == (TABLE,)
    assert choice.cap == 0


def test_no_requests_is_an_empty_choice():
    choice = choose(np.zeros((0, 2, 3)), np.zeros((0, 2), dtype=np.int64), _work(requests=0), _model([1.0] * 8))
    assert choice.lengths == ()


def test_step_time_model_recovers_costs():
    rng = np.random.default_rng(0)
    true = np.array([0.05, 0.002, 0.01, 0.0004, 0.001, 0.006, 0.0001, 0.004])
    model = StepTimeModel()
    for _ in range(1500):
        cap = int(rng.integers(0, 5))
        requests = int(rng.integers(1, 9))
        work = StepWork(
            requests=requests,
            drafts=int(rng.integers(0, requests * cap + 1)),
            prefill_tokens=int(rng.choice([0, 0, 0, 100])),
            context_tokens=int(rng.integers(50, 4000)),
            draft_first=int(cap > 0),
            draft_more=max(cap - 1, 0),
        )
        model.observe(work, float(true @ work.vector()) * float(rng.lognormal(0, 0.02)))
    probe = _work(requests=4, drafts=12, context_tokens=2000, draft_first=1, draft_more=2)
    assert model.predict(probe) == pytest.approx(float(true @ probe.vector()), rel=0.05)
    assert model.median_error() < 0.05


def test_one_stalled_step_does_not_spoil_the_model():
    model = StepTimeModel()
    for i in range(200):
        model.observe(_work(requests=4), 60.0 if i == 100 else 0.06)
    assert model.predict(_work(requests=4)) == pytest.approx(0.06, rel=0.1)


def test_prediction_before_any_step_is_refused():
    with pytest.raises(ValueError, match="observe"):
        StepTimeModel().predict(_work())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 20), st.floats(0.001, 10)), min_size=9, max_size=60))
def test_costs_never_go_negative(steps):
    model = StepTimeModel()
    for requests, drafts, seconds in steps:
        model.observe(_work(requests=requests, drafts=drafts, draft_first=int(drafts > 0)), seconds)
    assert model._costs is not None
    assert (model._costs >= 0).all()
