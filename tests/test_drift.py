"""Drift: rare on traffic that stays as it is, soon on traffic that moves away, and over in the end."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from aurora.config import SpeculationConfig
from aurora.controller import RequestView
from aurora.drift import DriftDetector
from aurora.goodput import TABLE
from aurora.metrics import EngineReport
from aurora.step_time import COSTS, StepTimeModel, StepWork
from serve.portfolio import Portfolio

NOTICED = 500  # first drafts after which a fall from 0.5 to 0.2 is noticed


def report(drafts: int, right: int, version: int = 1) -> EngineReport:
    return EngineReport(drafter_version=version, first_drafts={version: [drafts, right]})


def watch(detector: DriftDetector, stream: Iterator[tuple[int, int]], drafts: int) -> list[int]:
    """Drafts after which drift began, `drafts` of the stream having been observed."""
    began, seen = [], 0
    for made, right in stream:
        before = detector.drifted
        detector.observe(report(made, right))
        seen += made
        if detector.drifted and not before:
            began.append(seen)
        if seen >= drafts:
            return began
    raise AssertionError("the stream was too short")


def independent(rate: float, seed: int) -> Iterator[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    while True:
        yield 10, int(rng.binomial(10, rate))


def requests(rate: float, spread: float, seed: int, open_requests: int = 4) -> Iterator[tuple[int, int]]:
    """Requests of 80 drafts that differ: their rates have standard deviation `spread` (a beta distribution)."""
    rng = np.random.default_rng(seed)
    total = rate * (1 - rate) / spread**2 - 1
    left, rates = rng.integers(1, 80, open_requests), rng.beta(rate * total, (1 - rate) * total, open_requests)
    while True:
        yield open_requests * 4, int(rng.binomial(4, rates).sum())
        left -= 4
        over = left <= 0
        left[over], rates[over] = 80, rng.beta(rate * total, (1 - rate) * total, int(over.sum()))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_alarms_are_rare_on_independent_drafts(rate: float):
    assert sum(len(watch(DriftDetector(1), independent(rate, seed), 20_000)) for seed in range(10)) == 0


@pytest.mark.parametrize(("rate", "spread"), [(0.5, 0.15), (0.2, 0.07), (0.7, 0.12)])
def test_alarms_are_rare_though_requests_differ(rate: float, spread: float):
    alarms = sum(len(watch(DriftDetector(1), requests(rate, spread, seed), 20_000)) for seed in range(10))
    assert alarms <= 1, "in 200,000 drafts"


@pytest.mark.parametrize("rate", [0.02, 0.25, 0.75, 0.98])
def test_alarms_are_rare_early_on(rate: float):
    assert sum(len(watch(DriftDetector(1), independent(rate, seed), 4000)) for seed in range(20)) == 0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("before", [1500, 10_000])
def test_a_fall_is_noticed(seed: int, before: int):
    detector = DriftDetector(1)
    assert not watch(detector, independent(0.5, seed), before)
    assert watch(detector, independent(0.2, 100 + seed), NOTICED)


def test_a_fall_is_noticed_though_requests_differ():
    noticed = 0
    for seed in range(20):
        detector = DriftDetector(1)
        watch(detector, requests(0.5, 0.12, seed), 8000)
        noticed += bool(watch(detector, requests(0.2, 0.07, 100 + seed), NOTICED))
    assert noticed >= 18


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("gain", [0.0, 0.1, 0.35])
def test_better_drafts_are_no_drift(rate: float, gain: float):
    alarms = 0
    for seed in range(20):
        detector = DriftDetector(1)
        watch(detector, independent(rate, seed), 3000)
        alarms += len(watch(detector, independent(rate + gain, seed + 1), 3000))
    assert alarms <= (gain == 0), "in 60,000 drafts; none when they get better"


@pytest.mark.parametrize(("rate", "drafts"), [(0.2, 15_000), (0.5, 500)], ids=["it is the usual", "the old returns"])
def test_drift_ends_with_what_is_strange(rate: float, drafts: int):
    detector = DriftDetector(1)
    watch(detector, independent(0.5, 0), 10_000)
    watch(detector, independent(0.2, 1), 1000)
    assert detector.drifted
    watch(detector, independent(rate, 2), drafts)
    assert not detector.drifted
    assert not watch(detector, independent(rate, 3), 5000)


def test_a_new_version_begins_anew():
    detector = DriftDetector(1)
    watch(detector, independent(0.5, 0), 10_000)
    watch(detector, independent(0.2, 1), 600)
    assert "of version 1's drafts 0.2" in str(detector)
    detector.observe(report(100, 10, version=2))
    assert not detector.drifted
    for made, right in islice(independent(0.2, 2), 300):
        detector.observe(report(made, right, version=2))
    assert not detector.drifted
    detector.observe(report(10**6, 0, version=1))
    assert (detector.version, detector.drifted) == (1, False), "a rollback, too"


def test_drafts_of_other_versions_do_not_count():
    detector = DriftDetector(2)
    watch_own = islice(independent(0.5, 0), 500)
    for made, right in watch_own:
        detector.observe(EngineReport(drafter_version=2, first_drafts={2: [made, right], 1: [made, 0], 3: [made, 0]}))
    assert not detector.drifted


def test_it_is_noticed_though_every_verified_draft_is_the_tables():
    """The neural drafter drafts in bursts, never for verification; the first tokens of its drafts are judged still."""
    rng, portfolio, detector = (
        np.random.default_rng(0),
        Portfolio(SpeculationConfig(exploration=0.5), 2),
        DriftDetector(1),
    )
    portfolio.controller.step_time = StepTimeModel.known(
        dict.fromkeys(COSTS, 0.0) | {"constant": 1.0, "first_pass": 0.5}
    )
    for rate, drafts, drifted in ((0.6, 1500, False), (0.2, NOTICED, True)):
        made = 0
        while made < drafts:
            made += serve_table_text(portfolio, detector, rng, rate)
        assert detector.drifted is drifted


def serve_table_text(portfolio: Portfolio, detector: DriftDetector, rng: np.random.Generator, rate: float) -> int:
    """Eight new requests whose text repeats, so that the table knows it; returns the neural drafts that were made."""
    names, text, made = [f"{rng.integers(10**9)}" for _ in range(8)], [*range(8)] * 20, 0
    known, verified = dict.fromkeys(names, 24), dict[str, int]()
    for name in names:
        portfolio.begin(name, "", "", text[:24], 100)
    for _ in range(12):
        plan = portfolio.plan([RequestView(name, 100, drafting=True, limit=2) for name in names])
        for name in names:
            emitted = text[known[name] : known[name] + verified.get(name, 0) + 1]  # the table is always right
            known[name] += len(emitted)
            portfolio.observe(name, verified.get(name, 0), emitted)
        neural = {n: [text[known[n]] if rng.random() < rate else 999][: plan.cap] for n in names}
        drafts = portfolio.settle(neural, dict.fromkeys(names, 2))
        assert portfolio.one_hot == dict.fromkeys(names, TABLE)
        verified = {name: len(drafts[name].tokens) for name in names}
        portfolio.controller.observe_step(StepWork(8, 16, 0, 800, 0, 0), 1.0)
        counted = portfolio.take_first_drafts()
        detector.observe(report(*counted))
        made += counted[0]
    portfolio.finish(names)
    return made
