"""The controller against a simulated engine with known costs and acceptance."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from aurora.confidence import cells_of
from aurora.config import Objective
from aurora.controller import MODEL, NEURAL, TABLE, UNKNOWN, Ahead, Offer, RequestView, SpeculationController
from aurora.step_time import COSTS, StepTimeModel, StepWork
from drafters.ngram import Basis

K = 4


def _cells(k: int = K, order: int = 3, share: float = 0.9, votes: float = 2.0) -> list[int]:
    """Of table drafts that all rest on the same thing."""
    shape = (1, k)
    basis = Basis(np.full(shape, order), np.full(shape, share, np.float32), np.full(shape, votes, np.float32))
    return cells_of(basis)[0]


@dataclass
class _Engine:
    """Requests that live `life` steps each; drafts are accepted at fixed rates; None: that drafter has no drafts."""

    controller: SpeculationController
    neural: float | None
    table: float | None = None
    model: float | None = None
    requests: int = 4
    life: int = 60
    costs: tuple[float, ...] = (0.06, 0.002, 0.008, 0.004, 0.003)  # constant, request, draft, first pass, further pass
    model_costs: tuple[float, ...] = (0.004, 0.0002, 0.003)  # first pass, token that it reads, further pass
    tokens: int = 0
    seconds: float = 0.0
    drafted: int = 0  # steps in which the neural drafter drafted
    model_read: int = 0  # tokens that the draft model read
    used: dict[int, int] = field(default_factory=lambda: {NEURAL: 0, TABLE: 0, MODEL: 0})
    _pending: dict[str, tuple[int, int]] = field(default_factory=dict)
    _warm: set[str] = field(default_factory=set)
    _drafted_for: set[str] = field(default_factory=set)
    _model_drafted_for: frozenset[str] = frozenset()
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def run(self, steps: int) -> "_Engine":
        for step in range(steps):
            self._step([f"r{i}-{(step + 7 * i) // self.life}" for i in range(self.requests)])
        return self

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    def _step(self, names: list[str]) -> None:
        self.controller.finish([n for n in self._pending if n not in names])
        self._warm = {n for n in names if n in self._warm or n not in self._pending}
        verified = {n: self._pending.get(n, (NEURAL, 0)) for n in names}
        plan = self.controller.plan([RequestView(n, 100, drafting=True, limit=K) for n in names])
        self._warm = set() if plan.skip_drafter else self._warm
        for name, (drafter, k) in verified.items():
            self.tokens += 1 + self._verify(name, drafter, k)
        work = StepWork(
            requests=self.requests,
            drafts=sum(k for _, k in verified.values()),
            prefill_tokens=0,
            context_tokens=100 * self.requests,
            draft_first=int(not plan.skip_drafter),
            draft_more=max(plan.cap - 1, 0),
            model_first=int(plan.model_cap > 0),
            model_read=plan.model_read,
            model_more=max(plan.model_cap - 1, 0),
        )
        parts = (1, work.requests, work.drafts, work.draft_first, work.draft_more)
        parts = (*parts, work.model_first, work.model_read, work.model_more)
        took = sum(cost * part for cost, part in zip((*self.costs, *self.model_costs), parts, strict=True))
        self.controller.observe_step(work, took)
        self.seconds += took
        self.drafted += plan.cap > 0
        self.model_read += plan.model_read
        self._model_drafted_for = plan.model_for
        self._drafted_for = self._warm if plan.cap else set()
        table = _cells() if self.table is not None else None
        model = {n: plan.model_cap if n in plan.model_for else 0 for n in names}
        neural = {n: plan.cap if n in self._warm else 0 for n in names}
        drafts = self.controller.settle(plan, {n: Offer(K, neural[n], table, model[n]) for n in names})
        for draft in drafts.values():
            self.used[draft.drafter] += draft.length > 0
        self._pending = {n: (d.drafter, d.length) for n, d in drafts.items()}

    def _verify(self, name: str, drafter: int, k: int) -> int:
        """Accepted tokens; the controller is told of every draft as far as the target's tokens are known."""
        rates = {NEURAL: self.neural, TABLE: self.table, MODEL: self.model}
        accepted = {d: int((self._rng.random(K) < (rate or 0.0)).cumprod().sum()) for d, rate in rates.items()}
        taken = min(accepted[drafter], k)
        if name in self._drafted_for:
            known = max(k if drafter == NEURAL else 1, 1)
            self.controller.observe_neural(name, known, min(accepted[NEURAL], known))
        if name in self._model_drafted_for:
            known = max(k if drafter == MODEL else 1, 1)
            self.controller.observe_model(name, known, min(accepted[MODEL], known))
        if self.table is not None:
            known = max(k if drafter == TABLE else 1, 1)
            self.controller.observe_table(name, _cells(), known, min(accepted[TABLE], known))
        return taken


def _plain(requests: int = 4) -> float:
    return requests / (0.06 + 0.002 * requests)


def test_hopeless_drafter_costs_little_more_than_no_speculation():
    assert _Engine(SpeculationController(K), neural=0.0).run(4000).speed > 0.95 * _plain()


def test_good_drafter_beats_every_fixed_length_or_ties():
    adaptive = _Engine(SpeculationController(K), neural=0.85).run(1500)
    fixed = [_Engine(SpeculationController(K, fixed_k=k), neural=0.85).run(1500).speed for k in range(1, K + 1)]
    assert adaptive.drafted > 0.9 * 1500
    assert adaptive.speed > 0.98 * max(fixed)


def test_zero_is_not_a_trap():
    engine = _Engine(SpeculationController(K), neural=0.0).run(1500)
    engine.neural, engine.drafted = 0.9, 0
    assert engine.run(3000).drafted > 0.5 * 3000


def test_the_better_drafter_is_used():
    good_table = _Engine(SpeculationController(K), neural=0.3, table=0.9).run(1000)
    assert good_table.used[TABLE] > 0.9 * 4000
    alone = _Engine(SpeculationController(K, neural=False), neural=None, table=0.9).run(1000)
    assert good_table.speed > 0.96 * alone.speed
    good_drafter = _Engine(SpeculationController(K), neural=0.95, table=0.2).run(1000)
    assert good_drafter.used[NEURAL] > 0.9 * 4000


def test_a_draft_model_is_used_when_it_is_the_better_one_and_left_out_when_it_is_none():
    good = _Engine(SpeculationController(K, model=True), neural=0.1, model=0.9).run(1000)
    assert good.used[MODEL] > 0.8 * 4000
    assert good.speed > 1.3 * _plain()
    useless = _Engine(SpeculationController(K, neural=False, model=True), neural=None, model=0.0).run(3000)
    assert useless.speed > 0.95 * _plain()


def test_a_draft_model_that_was_no_use_is_used_again_when_it_is():
    engine = _Engine(SpeculationController(K, neural=False, model=True), neural=None, model=0.0).run(1000)
    engine.model, engine.used[MODEL] = 0.95, 0
    assert engine.run(3000).used[MODEL] > 0.4 * 4 * 3000


def test_the_draft_model_reads_a_request_once():
    engine = _Engine(SpeculationController(K, neural=False, model=True), neural=None, model=0.9, life=100).run(100)
    requests = 4 * 2 - 1  # the first of them ends with the run
    assert engine.model_read <= requests * 101 + engine.used[MODEL], "the prompt, then the newest token of each step"


def test_a_request_that_is_dear_to_read_waits_while_others_are_drafted_for():
    """What one step gains does not pay for reading it, nor would many: it is the last tokens of a long text."""
    controller = SpeculationController(K, neural=False, model=True, exploration=0.0)
    controller._credit, controller._exploring = 0.0, False
    controller.step_time = StepTimeModel.known(dict.fromkeys(COSTS, 0.0) | {"constant": 0.05, "model_read_token": 1e-3})
    views = [RequestView("short", 8, True, K), RequestView("long", 100_000, True, K)]
    plan = controller.plan(views)
    assert plan.model_for == {"short"}
    assert plan.model_read == 9


def test_fixed_k_without_a_neural_drafter_is_the_draft_models():
    controller = SpeculationController(K, fixed_k=2, neural=False, model=True)
    plan = controller.plan([RequestView("a", 10, drafting=True, limit=K)])
    assert (plan.model_cap, plan.model_for, plan.skip_drafter) == (2, {"a"}, True)
    draft = controller.settle(plan, {"a": Offer(K, 0, _cells(), 2)})["a"]
    assert (draft.drafter, draft.length) == (MODEL, 2)


def test_the_table_alone_beats_no_speculation_and_gives_up_when_it_is_no_use():
    assert _Engine(SpeculationController(K, neural=False), neural=None, table=0.8).run(1000).speed > 1.2 * _plain()
    useless = _Engine(SpeculationController(K, neural=False), neural=None, table=0.0).run(1000)
    assert useless.speed > 0.97 * _plain()
    assert useless.drafted == 0


def test_a_table_that_was_no_use_is_used_again_when_it_is():
    engine = _Engine(SpeculationController(K, neural=False), neural=None, table=0.0).run(1000)
    engine.table, engine.used[TABLE] = 0.9, 0
    assert engine.run(1000).used[TABLE] > 0.5 * 4000


def test_a_cold_request_gets_no_neural_drafts_again():
    controller = SpeculationController(K, exploration=0.0)
    controller._credit, controller._exploring = 0.0, False
    view = RequestView("a", 10, drafting=True, limit=K)
    controller.observe_step(StepWork(1, 0, 0, 10, 0, 0), 0.06)
    controller.acceptance.start("a")
    for _ in range(100):
        controller.observe_neural("a", 1, 0)
    assert controller.plan([view]).skip_drafter
    controller.drafter_changed([0.99, 0.99, 0.99, 0.99])
    controller._credit, controller._exploring = 0.0, False
    assert controller.plan([view]).cap == 0
    assert controller.plan([view, RequestView("b", 10, drafting=True, limit=K)]).cap > 0


def test_limits_and_fixed_k_are_respected():
    controller = SpeculationController(K, fixed_k=3)
    views = [RequestView("a", 10, drafting=True, limit=1), RequestView("b", 10, drafting=True, limit=9)]
    plan = controller.plan(views)
    drafts = controller.settle(plan, {v.request_id: Offer(v.limit, plan.cap, _cells()) for v in views})
    assert {name: (d.drafter, d.length) for name, d in drafts.items()} == {"a": (NEURAL, 1), "b": (NEURAL, 3)}
    assert not plan.skip_drafter


def test_fixed_k_without_a_neural_drafter_is_the_tables():
    controller = SpeculationController(K, fixed_k=2, neural=False)
    plan = controller.plan([RequestView("a", 10, drafting=True, limit=K)])
    assert plan.skip_drafter
    draft = controller.settle(plan, {"a": Offer(K, 0, _cells())})["a"]
    assert (draft.drafter, draft.length) == (TABLE, 2)


def test_fixed_k_zero_never_drafts():
    controller = SpeculationController(K, fixed_k=0)
    plan = controller.plan([RequestView("a", 10, drafting=True, limit=K)])
    assert plan.skip_drafter
    assert controller.settle(plan, {"a": Offer(K, 0, _cells())})["a"].length == 0


def test_a_step_of_prompts_only_keeps_them_warm_while_the_drafter_is_good():
    controller = SpeculationController(K, exploration=0.0)
    _Engine(controller, neural=0.9).run(300)
    controller._credit, controller._exploring = 0.0, False
    prompt = RequestView("new", 200, drafting=False, limit=K, prefill_tokens=200)
    assert not controller.plan([prompt]).skip_drafter
    assert controller.plan([RequestView("new", 201, drafting=True, limit=K)]).cap > 0


@pytest.mark.parametrize(("rate", "reads"), [(0.8, True), (0.1, False)])
def test_a_request_among_cold_ones_is_read_where_drafting_for_all_would_pay(rate: float, reads: bool):
    controller = SpeculationController(K, exploration=0.0)
    _Engine(controller, neural=rate).run(300)
    controller._credit, controller._exploring = 0.0, False
    views = [RequestView(name, 100, drafting=True, limit=K) for name in ("a", "b", "c", "new")]
    controller._cold.update("abc")
    plan = controller.plan(views)
    assert (not plan.skip_drafter, plan.cap > 0) == (reads, reads)
    controller._cold.add("new")
    assert controller.plan(views).skip_drafter, "there is nobody to draft for"


def test_reading_a_long_prompt_to_explore_is_paid_for():
    left = []
    for prompt_tokens in (10, 1000):
        controller = SpeculationController(K, exploration=0.0)
        _Engine(controller, neural=0.0).run(300)
        controller._credit, controller._exploring = 4.0, True
        controller.plan([RequestView("new", 10, drafting=False, limit=K, prefill_tokens=prompt_tokens)])
        left.append(controller._credit)
    assert 4.0 > left[0] > left[1]


def test_finished_requests_leave_nothing_behind():
    controller = SpeculationController(K)
    plan = controller.plan([RequestView("a", 10, drafting=True, limit=K)])
    controller.settle(plan, {"a": Offer(K, plan.cap, _cells())})
    controller.finish(["a"])
    assert not controller._known
    assert not controller._curves
    with pytest.raises(KeyError):
        controller.acceptance.rates("a")
    with pytest.raises(KeyError):
        controller.confidence.rates("a", _cells())


def _with_table(objective: Objective = "goodput", draft_s: float = 0.012, **fields: float) -> SpeculationController:
    """One whose requests have nothing but the table, at known costs of a step (0.02 s of them its constant)."""
    controller = SpeculationController(K, objective=objective, neural=False)
    costs = {"constant": 0.02, "request": 0.002, "draft": draft_s, "prefill_token": 0.001} | fields
    controller.step_time = StepTimeModel.known(dict.fromkeys(COSTS, 0.0) | costs)
    return controller


def _lengths(controller: SpeculationController, bases: dict[str, list[int]], ahead: Ahead = UNKNOWN) -> dict[str, int]:
    plan = controller.plan([RequestView(name, 100, drafting=True, limit=K) for name in bases], ahead)
    drafts = controller.settle(plan, {name: Offer(K, 0, basis) for name, basis in bases.items()}, ahead)
    return {name: draft.length for name, draft in drafts.items()}


def test_drafts_that_do_not_pay_alone_do_not_pay_beside_a_prompt():
    """The prompt is read whatever is drafted: the step's time is no reason to spend more of it."""
    bases = {"a": _cells(), "b": _cells()}
    for draft_s, lengths in ((0.012, {0}), (0.0001, {K})):
        for ahead in (UNKNOWN, Ahead(prefill_tokens=200)):
            assert set(_lengths(_with_table(draft_s=draft_s), bases, ahead).values()) == lengths


def test_no_more_drafts_than_there_is_room_for():
    controller = _with_table(draft_s=0.0001)
    bases = {"a": _cells(1), "b": _cells()}
    assert _lengths(controller, bases) == {"a": 1, "b": K}
    for room in range(6):
        assert sum(_lengths(controller, bases, Ahead(room=room)).values()) == min(room, K + 1)
        assert controller.expected_tokens <= 2 + room


def test_who_would_be_late_gets_drafts_that_do_not_pay_for_the_batch():
    bases = {"late": _cells(), "early": _cells()}
    needs = {"late": 3.0, "early": -5.0}
    assert set(_lengths(_with_table("goodput", draft_s=0.006), bases, Ahead(needs=needs)).values()) == {0}
    assert _lengths(_with_table("slo", draft_s=0.006), bases, Ahead(needs=needs)) == {"late": 1, "early": 0}
    assert set(
        _lengths(_with_table("slo", draft_s=0.006), bases, Ahead(needs=dict.fromkeys(bases, -5.0))).values()
    ) == {0}


def test_for_latency_nobody_waits_for_anothers_drafts():
    """One sure draft makes five requests emit more tokens a second, though four of them wait for it."""
    sure = _cells(K, order=9, share=0.999, votes=500.0)
    bases = {"sure": sure, **{f"r{i}": _cells() for i in range(4)}}
    others = dict.fromkeys([f"r{i}" for i in range(4)], 0)
    assert _lengths(_with_table("goodput", draft_s=0.004), bases) == {"sure": 1} | others
    assert _lengths(_with_table("latency", draft_s=0.004), bases) == {"sure": 0} | others
