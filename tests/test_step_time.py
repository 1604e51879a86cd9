"""The step-time model recovers what generated its data, through stalls and slow minutes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora.step_time import COSTS, MODEL_COSTS, MODEL_READ, StepTimeModel, StepWork


def _work(**changes: int) -> StepWork:
    base = {"requests": 1, "drafts": 0, "prefill_tokens": 0, "context_tokens": 0, "draft_first": 0, "draft_more": 0}
    return StepWork(**{**base, **changes})


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


def test_the_same_tokens_without_speculation_take_a_plain_step_for_each_round_of_them():
    costs = dict(
        zip(COSTS, [0.05, 0.002, 0.01, 0.0004, 0.001, 0.006, 0.0001, 0.004, 0.007, 0.0002, 0.003], strict=True)
    )
    model = StepTimeModel.known(costs)
    drafted = _work(requests=2, drafts=6, context_tokens=1000, draft_first=1, draft_more=2, model_first=1)
    plain = 0.05 + 2 * 0.002 + 0.001
    assert model.predict_plain(drafted, emitted=2) == pytest.approx(plain)
    assert model.predict_plain(drafted, emitted=5) == pytest.approx(2.5 * plain)
    reading = _work(requests=0, prefill_tokens=100, draft_first=1)
    assert model.predict_plain(reading, emitted=0) == pytest.approx(0.05 + 0.04)
    mixed = _work(requests=1, prefill_tokens=100, drafts=2)
    assert model.predict_plain(mixed, emitted=3) == pytest.approx(3 * 0.052 + 0.04), "a prompt is read once"
    undrafted = _work(requests=3, context_tokens=700, prefill_tokens=9)
    assert model.predict_plain(undrafted, emitted=3) == pytest.approx(model.predict(undrafted))


def test_costs_of_a_draft_model_are_told_once_one_ran():
    model = StepTimeModel()
    model.observe(_work(), 0.06)
    assert set(model.costs) == set(COSTS) - set(MODEL_COSTS)
    model.observe(_work(model_first=1, model_read=3), 0.08)
    assert set(model.costs) == set(COSTS)
    older = StepTimeModel.known(dict.fromkeys(set(COSTS) - set(MODEL_COSTS), 0.1))
    assert set(older.costs) == set(COSTS) - set(MODEL_COSTS)
    assert older.now[MODEL_READ] > 0, "it is guessed"


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
        shares.append(model.costs["draft"] / float(model.now @ _work(requests=4).vector()))
        if i % 200 == 199:
            usual = float(model.now @ work.vector())
            assert usual == pytest.approx(float(true @ work.vector()) * slow, rel=0.1)
    right = true[2] / (true[0] + 4 * true[1])
    assert 0.6 * right < min(shares[400:]) < max(shares[400:]) < 1.6 * right


@pytest.mark.parametrize(("likeness", "most"), [(0.8, 0.8), (0.0, 1.05)])
def test_slow_steps_that_do_not_come_alone_are_foreseen(likeness: float, most: float):
    rng = np.random.default_rng(0)
    model, noise, errors, usual_errors = StepTimeModel(), 0.0, [], []
    for i in range(2000):
        work = _work(requests=4, drafts=int(rng.binomial(16, 0.4)))
        noise = likeness * noise + float(rng.normal(0, 0.15 * (1 - likeness**2) ** 0.5))
        seconds = (0.04 + 0.0015 * work.drafts) * float(np.exp(noise))
        if i > 500:
            errors.append(abs(model.predict(work) - seconds) / seconds)
            usual_errors.append(abs(float(model.now @ work.vector()) - seconds) / seconds)
        model.observe(work, seconds)
    assert np.median(errors) < most * np.median(usual_errors)


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


def test_what_was_measured_on_purpose_gives_the_costs():
    rng, true = np.random.default_rng(0), np.array([0.03, 0.002, 0.003, 0.001, 0.004, 0.01, 0.0001, 0.005, 0, 0, 0])
    works = [
        _work(requests=n, drafts=int(rng.integers(4 * n)), context_tokens=50 * n, draft_first=n % 2)
        for n in map(int, rng.integers(1, 17, size=200))
    ]
    stalled = [float(true @ work.vector()) * (20.0 if i % 25 == 0 else 1.0) for i, work in enumerate(works)]
    model = StepTimeModel.measured(list(zip(works, stalled, strict=True)))
    for work in works[:20]:
        assert model.predict(work) == pytest.approx(float(true @ work.vector()), rel=0.08)
    with pytest.raises(ValueError, match="no steps"):
        StepTimeModel.measured([])


def test_drafts_that_are_held_to_be_free_are_found_out():
    """As many drafts as possible at every step: only what was measured before tells their cost from the requests'."""
    rng = np.random.default_rng(0)
    costs = {
        "constant": 0.033,
        "request": 0.002,
        "draft": 0.00225,
        "prefill_token": 0.0015,
        "kilo_context_token": 0.004,
    }
    true = dict.fromkeys(COSTS, 0.0) | costs
    drilled = [
        _work(requests=n, drafts=int(rng.integers(4 * n + 1)), context_tokens=200 * n) for n in (1, 2, 4, 8) * 25
    ]
    model = StepTimeModel.measured([(w, float(np.array([true[n] for n in COSTS]) @ w.vector())) for w in drilled])
    fooled = true | {"request": true["request"] + 4 * true["draft"], "draft": 0.0}
    model._costs = np.array([fooled[name] for name in COSTS])
    for step in range(400):
        requests, slow = 3 + step % 2, 1.6 if step // 100 % 2 else 1.0
        work = _work(requests=requests, drafts=4 * requests, context_tokens=200 * requests)
        seconds = float(np.array([true[name] for name in COSTS]) @ work.vector())
        model.observe(work, seconds * slow * float(rng.lognormal(0, 0.15)))
    # A request comes with 200 tokens of context: the two cannot be told apart, and need not be.
    mine, right = (c["draft"] / (c["request"] + 0.2 * c["kilo_context_token"]) for c in (model.costs, true))
    assert mine == pytest.approx(right, rel=0.3)
