"""The controller against a simulated engine with known costs and acceptance."""

import numpy as np
import pytest

from aurora.controller import RequestView, SpeculationController
from aurora.goodput import StepWork


def _simulate(controller: SpeculationController, rate: float, steps: int, requests: int = 4, life: int = 60):
    """Run an engine whose drafts are accepted at `rate`; returns (tokens, seconds, share of steps with drafts)."""
    rng = np.random.default_rng(0)
    tokens, seconds, drafted = 0, 0.0, 0
    lengths: dict[str, int] = {}
    for step in range(steps):
        names = [f"r{i}-{(step + 7 * i) // life}" for i in range(requests)]
        gone = [n for n in lengths if n not in names]
        controller.finish(gone)
        views = [RequestView(n, 100, drafting=True, limit=4) for n in names]
        drafts = {n: lengths.get(n, 0) for n in names}
        plan = controller.plan(views)
        for name, k in drafts.items():
            accepted = int((rng.random(k) < rate).cumprod().sum())
            controller.observe_verification(name, k, accepted)
            tokens += accepted + 1
        work = StepWork(
            requests=requests,
            drafts=sum(drafts.values()),
            prefill_tokens=0,
            context_tokens=100 * requests,
            draft_first=int(not plan.skip_drafter),
            draft_more=max(plan.cap - 1, 0),
        )
        took = 0.06 + 0.002 * requests + 0.008 * work.drafts + 0.004 * work.draft_first + 0.003 * work.draft_more
        controller.observe_step(work, took)
        seconds += took
        drafted += plan.cap > 0
        lengths = dict(plan.lengths)
    return tokens, seconds, drafted / steps


def test_hopeless_drafter_costs_little_more_than_no_speculation():
    tokens, seconds, _ = _simulate(SpeculationController(4, exploration=0.02), rate=0.0, steps=4000)
    plain = 4 / (0.06 + 0.008)
    assert tokens / seconds > 0.95 * plain


def test_good_drafter_beats_every_fixed_length_or_ties():
    adaptive, fixed = SpeculationController(4), []
    tokens, seconds, drafted = _simulate(adaptive, rate=0.85, steps=1500)
    for k in (1, 2, 3, 4):
        t, s, _ = _simulate(SpeculationController(4, fixed_k=k), rate=0.85, steps=1500)
        fixed.append(t / s)
    assert drafted > 0.9
    assert tokens / seconds > 0.98 * max(fixed)


def test_zero_is_not_a_trap():
    controller = SpeculationController(4, exploration=0.02)
    _simulate(controller, rate=0.0, steps=1500)
    _, _, drafted = _simulate(controller, rate=0.9, steps=3000)
    assert drafted > 0.5


def test_a_cold_request_gets_no_drafts_again():
    controller = SpeculationController(4, exploration=0.0)
    controller._credit, controller._exploring = 0.0, False
    view = RequestView("a", 10, drafting=True, limit=4)
    controller.observe_step(StepWork(1, 0, 0, 10, 0, 0), 0.06)
    controller.acceptance.start("a")
    for _ in range(100):
        controller.observe_verification("a", 1, 0)
    assert controller.plan([view]).skip_drafter
    controller.drafter_changed([0.99, 0.99, 0.99, 0.99])
    assert controller.plan([view]).lengths == {"a": 0}
    assert controller.plan([view, RequestView("b", 10, drafting=True, limit=4)]).lengths["b"] > 0


def test_limits_and_fixed_k_are_respected():
    controller = SpeculationController(4, fixed_k=3)
    plan = controller.plan([RequestView("a", 10, drafting=True, limit=1), RequestView("b", 10, drafting=True, limit=9)])
    assert plan.lengths == {"a": 1, "b": 3}
    assert not plan.skip_drafter


def test_prefilling_requests_get_no_length():
    controller = SpeculationController(4)
    controller.observe_step(StepWork(1, 0, 0, 10, 0, 0), 0.06)
    plan = controller.plan([RequestView("a", 10, drafting=False, limit=4)])
    assert plan.lengths == {}


def test_finished_requests_leave_nothing_behind():
    controller = SpeculationController(4)
    controller.plan([RequestView("a", 10, drafting=True, limit=4)])
    controller.finish(["a"])
    assert not controller._known
    with pytest.raises(KeyError):
        controller.acceptance.rates("a")


def test_a_step_of_prompts_only_keeps_them_warm_while_the_drafter_is_good():
    controller = SpeculationController(4, exploration=0.0)
    _simulate(controller, rate=0.9, steps=300)
    controller._credit, controller._exploring = 0.0, False
    prompt = RequestView("new", 200, drafting=False, limit=4, prefill_tokens=200)
    assert not controller.plan([prompt]).skip_drafter
    assert controller.plan([RequestView("new", 201, drafting=True, limit=4)]).lengths["new"] > 0


def test_reading_a_long_prompt_to_explore_is_paid_for():
    controllers = [SpeculationController(4, exploration=0.0) for _ in range(2)]
    for controller, prompt_tokens in zip(controllers, (10, 1000), strict=True):
        _simulate(controller, rate=0.0, steps=300)
        controller._credit, controller._exploring = 4.0, True
        controller.plan([RequestView("new", 10, drafting=False, limit=4, prefill_tokens=prompt_tokens)])
    short, long = controllers
    assert 4.0 > short._credit > long._credit
