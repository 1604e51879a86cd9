"""Acceptance of n-gram drafts from what they rest on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aurora.confidence import ConfidenceModel, cells_of
from drafters.ngram import ORDER, Basis


def _cells(orders: list[int], share: float = 1.0, votes: float = 1.0) -> list[int]:
    """Of the drafts of one request."""
    shape = (1, len(orders))
    return cells_of(Basis(np.array([orders]), np.full(shape, share, np.float32), np.full(shape, votes, np.float32)))[0]


def _started(*requests: str, domain: str = "") -> ConfidenceModel:
    model = ConfidenceModel()
    for request in requests:
        model.start(request, domain)
    return model


def test_rates_converge_to_the_true_ones_cell_by_cell():
    rng = np.random.default_rng(0)
    true = {(1, 0.4): 0.2, (5, 1.0): 0.9}
    model = ConfidenceModel()
    for i in range(300):
        model.start(f"r{i}")
        for (order, share), rate in true.items():
            for _ in range(4):
                model.observe(f"r{i}", _cells([order], share), 1, int(rng.random() < rate))
        model.finish(f"r{i}")
    model.start("new")
    for (order, share), rate in true.items():
        assert model.rates("new", _cells([order], share)) == pytest.approx([rate], abs=0.08)


def test_before_anything_is_seen_longer_contexts_and_clearer_votes_are_trusted_more():
    model = _started("a")
    by_order = model.rates("a", _cells(list(range(1, ORDER + 1))))
    assert (np.diff(by_order) > 0).all()
    by_share = [model.rates("a", _cells([3], share))[0] for share in (0.3, 0.6, 0.9, 1.0)]
    assert by_share == sorted(by_share)


def test_drafts_past_the_first_wrong_one_teach_nothing():
    cells = _cells([1, 2, 3])
    model, other = _started("a"), _started("a")
    model.observe("a", cells, known=3, accepted=0)
    other.observe("a", _cells([1]), known=1, accepted=0)
    assert model.rates("a", cells) == pytest.approx(other.rates("a", cells))


def test_a_request_whose_drafts_do_badly_is_trusted_less_than_its_domain():
    model = _started("bad", "fresh")
    for _ in range(10):
        model.observe("bad", _cells([4]), 1, 0)
    assert model.rates("bad", _cells([4]))[0] < model.rates("fresh", _cells([4]))[0]


def test_domains_learn_apart_and_new_ones_start_from_all():
    model = ConfidenceModel()
    for domain, accepted in (("good", 1), ("poor", 0)):
        for i in range(100):
            model.start(f"{domain}{i}", domain)
            model.observe(f"{domain}{i}", _cells([3]), 1, accepted)
            model.finish(f"{domain}{i}")
    rates = {}
    for domain in ("good", "poor", "new"):
        model.start(domain, domain)
        rates[domain] = model.rates(domain, _cells([3]))[0]
    assert rates["good"] > 0.85
    assert rates["poor"] < 0.15
    assert rates["poor"] < rates["new"] < rates["good"]


@given(
    arrays(np.int64, (2, 4), elements=st.integers(1, ORDER)),
    arrays(np.float32, (2, 4), elements=st.floats(0.125, 1.0, width=32)),
    arrays(np.float32, (2, 4), elements=st.floats(0.125, 5.0, width=32)),
    st.lists(st.integers(0, 4), max_size=20),
)
def test_rates_are_probabilities(orders, shares, votes, outcomes):
    model, cells = _started("a", "b"), cells_of(Basis(orders, shares, votes))
    for accepted in outcomes:
        for request, mine in zip("ab", cells, strict=True):
            model.observe(request, mine, 4, accepted)
    assert all(0 <= rate <= 1 for request, mine in zip("ab", cells, strict=True) for rate in model.rates(request, mine))


def test_unknown_and_finished_requests_teach_nothing():
    model = _started("a")
    before = model.rates("a", _cells([2]))
    model.observe("stranger", _cells([2]), 1, 1)
    assert model.rates("a", _cells([2])) == pytest.approx(before)
    model.finish("a")
    with pytest.raises(KeyError):
        model.rates("a", _cells([2]))
