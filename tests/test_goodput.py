"""The choice of lengths equals brute force; the step-time model recovers what generated its data."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora.goodput import (
    COSTS,
    DRAFTERS,
    MODEL,
    MODEL_COSTS,
    NEURAL,
    TABLE,
    Caps,
    StepTimeModel,
    StepWork,
    choose,
    with_drafts,
)


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


def test_step_time_model_recovers_costs():
    rng = np.random.default_rng(0)
    true = np.array([0.05, 0.002, 0.01, 0.0004, 0.001, 0.006, 0.0001, 0.004, 0.007, 0.0002, 0.003])
    model = StepTimeModel()
    for _ in range(1500):
        cap, drafted = int(rng.integers(0, 5)), int(rng.integers(0, 5))
        requests = int(rng.integers(1, 9))
        work = StepWork(
            requests=requests,
            drafts=int(rng.integers(0, requests * cap + 1)),
            prefill_tokens=int(rng.choice([0, 0, 0, 100])),
            context_tokens=int(rng.integers(50, 4000)),
            draft_first=int(cap > 0),
            draft_more=max(cap - 1, 0),
            model_first=int(drafted > 0),
            model_read=drafted and int(rng.integers(1, 400)),
            model_more=max(drafted - 1, 0),
        )
        model.observe(work, float(true @ work.vector()) * float(rng.lognormal(0, 0.02)))
    probe = _work(requests=4, drafts=12, context_tokens=2000, draft_first=1, draft_more=2, model_first=1, model_read=9)
    assert model.predict(probe) == pytest.approx(float(true @ probe.vector()), rel=0.05)
    assert model.median_error() < 0.05


def test_costs_of_a_draft_model_are_told_once_one_ran():
    model = StepTimeModel()
    model.observe(_work(), 0.06)
    assert set(model.costs) == set(COSTS) - set(MODEL_COSTS)
    model.observe(_work(model_first=1, model_read=3), 0.08)
    assert set(model.costs) == set(COSTS)
    assert model.reading == pytest.approx(model.costs["model_read_token"])
    older = StepTimeModel.known(dict.fromkeys(set(COSTS) - set(MODEL_COSTS), 0.1))
    assert set(older.costs) == set(COSTS) - set(MODEL_COSTS)
    assert older.reading == 0.0


def test_one_stalled_step_does_not_spoil_the_model():
    model = StepTimeModel()
    for i in range(200):
        model.observe(_work(requests=4), 60.0 if i == 100 else 0.06)
    assert model.predict(_work(requests=4)) == pytest.approx(0.06, rel=0.1)


def test_stalled_steps_at_the_start_are_got_over():
    model = StepTimeModel()
    for i in range(200):
        model.observe(_work(requests=4), 5.0 if i in (0, 10) else 0.06)
    assert model.predict(_work(requests=4)) == pytest.approx(0.06, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_what_drafts_cost_is_not_mistaken_for_the_machines_pace(seed: int):
    rng = np.random.default_rng(seed)
    true = np.array([0.037, 0.0006, 0.0015, 0, 0, 0, 0, 0, 0, 0, 0])
    model, shares = StepTimeModel(), []
    for i in range(2000):
        work = _work(requests=4, drafts=int(rng.binomial(16, 0.4)))
        slow = 1.7 if i // 200 % 3 == 1 else 1.0  # others use the machine, too
        model.observe(work, float(true @ work.vector()) * slow * float(rng.lognormal(0, 0.15)))
        shares.append(model.costs["draft"] / model.predict(_work(requests=4)))
        if i % 200 == 199:
            assert model.predict(work) == pytest.approx(float(true @ work.vector()) * slow, rel=0.1)
    right = true[2] / (true[0] + 4 * true[1])
    assert 0.6 * right < min(shares[400:]) < max(shares[400:]) < 1.6 * right


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
