"""Acceptance estimates: censoring, shrinkage and the change of a drafter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.acceptance import AcceptanceModel


def test_rates_converge_to_the_true_conditional_rates():
    rng = np.random.default_rng(1)
    true = np.array([0.8, 0.5, 0.3])
    model = AcceptanceModel(3)
    for i in range(400):
        model.start(f"r{i}")
        for _ in range(5):
            accepted = int((rng.random(3) < true).cumprod().sum())
            model.observe(f"r{i}", 3, accepted)
        model.finish(f"r{i}")
    assert model.shared_rates() == pytest.approx(true, abs=0.08)


def test_k_zero_teaches_nothing():
    model = AcceptanceModel(4)
    model.start("a")
    before = model.rates("a")
    model.observe("a", 0, 0)
    assert (model.rates("a") == before).all()


def test_positions_past_the_first_rejection_are_censored():
    model = AcceptanceModel(4)
    model.start("a")
    model.observe("a", 4, 1)
    rates = model._requests["a"][1]
    assert rates.trials == [1, 1, 0, 0]
    assert rates.hits == [1, 0, 0, 0]


def test_a_request_moves_away_from_its_domain():
    model = AcceptanceModel(2)
    model.start("good")
    model.start("bad")
    for _ in range(40):
        model.observe("good", 2, 2)
        model.observe("bad", 2, 0)
    assert model.rates("good")[0] > 0.75 > 0.3 > model.rates("bad")[0]


def test_a_new_version_starts_at_its_gate_result():
    model = AcceptanceModel(3)
    model.start("a")
    for _ in range(200):
        model.observe("a", 1, 0)
    model.drafter_changed([0.7, 0.6])
    model.start("b")
    assert model.rates("b")[0] > 0.3
    assert model.rates("b")[2] == pytest.approx(0.6)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=60))
def test_gains_are_probabilities_that_never_rise(steps):
    model = AcceptanceModel(4)
    model.start("a")
    for k, accepted in steps:
        model.observe("a", k, min(k, accepted))
    gains = model.gains(["a"])
    assert ((gains >= 0) & (gains <= 1)).all()
    assert (np.diff(gains, axis=1) <= 0).all()
