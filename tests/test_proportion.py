"""An estimated share against its definition: the posterior mean and variance under one trial of each outcome added."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.proportion import Proportion

COUNTS = st.integers(0, 10_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@given(COUNTS)
def test_the_rate_is_inside_the_unit_interval_and_nears_the_share(counts: tuple[int, int]):
    trials, right = counts
    seen = Proportion(trials, right)
    assert 0 < seen.rate < 1
    assert abs(seen.rate * trials - right) <= 1, "off by less than one of the trials added"
    assert seen.variance == pytest.approx(seen.rate * (1 - seen.rate) / (trials + 2))
    assert seen.variance <= Proportion().variance


@given(COUNTS, COUNTS)
def test_sums_count_both(first: tuple[int, int], second: tuple[int, int]):
    both = Proportion(*first) + Proportion(*second)
    assert (both.trials, both.right) == (first[0] + second[0], first[1] + second[1])


@given(COUNTS, st.floats(0, 1))
def test_fading_keeps_the_share_and_widens_the_doubt(counts: tuple[int, int], keep: float):
    seen = Proportion(*counts)
    faded = seen.faded(keep)
    assert faded.trials == pytest.approx(keep * seen.trials)
    assert faded.right == pytest.approx(keep * seen.right)
    assert abs(faded.rate - 0.5) <= abs(seen.rate - 0.5) + 1e-12, "nearer to knowing nothing"
