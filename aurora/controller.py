"""The speculation controller: what each request drafts with, how many tokens, and which drafters run.

It owns no clock and no engine. `plan` is asked before a step whether neural drafter and draft model shall draft at its
end; `settle` is asked after it, when all drafts are there, which of them to verify; `observe_*` are told what came of
it.

A neural drafter that skips a step keeps a hole in its KV cache, so a request is *warm* only while the drafter has read
all of it; cold requests are not drafted for by it for the rest of their life. When the drafter does not pay it is
skipped, except in *bursts* of exploration, so that leaving it out never becomes a trap: for as long as the credit lasts
it drafts one token for all warm requests. Reading a prompt is dear and one draft says little, hence bursts and not a
trickle. The draft model is never cold: it reads what it has not read when it is asked, which takes its time; it is
explored in the same bursts. The table needs no exploration: what it would have drafted is compared with the target's
tokens at every step.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aurora.acceptance import AcceptanceModel
from aurora.confidence import ConfidenceModel
from aurora.config import Objective
from aurora.goodput import (
    DRAFTERS,
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
from aurora.step_time import Floats, Ints, StepTimeModel, StepWork

BURST = 4.0  # credit of one burst, in plain steps; granted at start and at each new drafter version
_CURVE_MEMORY = 0.9  # of what the table was worth in a request's earlier steps
_DOMAIN_CURVE_MEMORY = 0.99
WORTH_READING = 1.02  # times the merit without it that must come of the neural drafter once no request is cold
_NEARLY_READ = 16.0  # unread tokens up to which the draft model goes along with a request at each step
INVESTED_STEPS = 256.0  # steps that reading more than that, or a prompt, is an investment for: those of an answer


@dataclass(frozen=True)
class RequestView:
    """What the controller sees of one request in a step."""

    request_id: str
    context_tokens: int
    drafting: bool  # emits a token in this step, so that drafts can follow
    limit: int  # longest draft that it may have after this step
    prefill_tokens: int = 0  # prompt tokens read in this step
    domain: str = ""


@dataclass(frozen=True)
class Ahead:
    """What is known of the step after the one at hand, in which the drafts are verified."""

    prefill_tokens: int = 0  # prompt tokens that it reads
    room: int | None = None  # drafts, over all requests, that token budget and KV cache leave room for; None: any
    needs: Mapping[str, float] = field(default_factory=dict)  # request -> tokens it must emit then to be on time


UNKNOWN = Ahead()


@dataclass(frozen=True)
class Plan:
    """What neural drafter and draft model do at the end of the step at hand."""

    cap: int  # tokens that the neural drafter drafts for every request
    skip_drafter: bool  # it does not even read this step's tokens
    model_cap: int = 0  # tokens that the draft model drafts for each request of `model_for`
    model_for: frozenset[str] = frozenset()
    model_read: int = 0  # tokens that it reads for that, as far as known before the step

    @property
    def caps(self) -> Caps:
        return Caps(self.cap, self.model_cap)


@dataclass(frozen=True)
class Offer:
    """The drafts that one request has after a step."""

    limit: int  # longest draft that the request may have now
    neural: int  # tokens that the neural drafter drafted
    table: Sequence[int] | None  # what the table's drafts rest on: cell of each (`aurora.confidence`)
    model: int = 0  # tokens that the draft model drafted


@dataclass(frozen=True)
class Draft:
    """What one request verifies in the next step."""

    drafter: int  # NEURAL, TABLE or MODEL
    length: int


@dataclass
class SpeculationController:
    """Goodput-optimal choice of drafter and speculation length over live estimates of step time and acceptance."""

    k_max: int
    fixed_k: int | None = None
    objective: Objective = "goodput"
    exploration: float = 0.01  # share of the engine's steps
    neural: bool = True  # whether there is a neural drafter to use
    model: bool = False  # whether there is a draft model
    acceptance: AcceptanceModel = field(init=False)  # of the neural drafter
    model_acceptance: AcceptanceModel = field(init=False)
    confidence: ConfidenceModel = field(default_factory=ConfidenceModel)
    step_time: StepTimeModel = field(default_factory=StepTimeModel)
    expected_tokens: float = 0.0  # emitted by the next step as it was settled; 0.0 while the step time is unknown
    _views: dict[str, RequestView] = field(default_factory=dict)  # of the step at hand
    _ahead: Ahead = field(default_factory=Ahead)
    _cold: set[str] = field(default_factory=set)
    _read: dict[str, int] = field(default_factory=dict)  # request -> tokens that the draft model has read
    _reads: frozenset[str] = frozenset()  # requests that it reads in the step at hand
    _known: set[str] = field(default_factory=set)
    _curves: dict[str, Floats] = field(default_factory=dict)  # request -> usual gains of its table drafts, [k_max]
    _domain_curves: dict[str, Floats] = field(default_factory=dict)
    _credit: float = BURST  # plain steps that exploration may still lose
    _exploring: bool = True

    def __post_init__(self) -> None:
        self.acceptance, self.model_acceptance = AcceptanceModel(self.k_max), AcceptanceModel(self.k_max)

    def plan(self, batch: list[RequestView], ahead: Ahead = UNKNOWN) -> Plan:
        """Decide on neural drafter and draft model for the step that is about to run."""
        self._views = {v.request_id: v for v in batch}
        self._ahead = ahead
        for view in batch:
            self._meet(view)
        plan = self._plan(batch)
        self._reads = plan.model_for
        if plan.skip_drafter:
            self._cold.update(self._views)
        return plan

    def settle(self, plan: Plan, offers: Mapping[str, Offer], ahead: Ahead = UNKNOWN) -> dict[str, Draft]:
        """Choose among the drafts that the requests of the planned step have now; each gets at least an empty one."""
        views = [self._views[r] for r in offers]
        self._ahead = ahead
        tables = [offer.table for offer in offers.values()]
        gains = self._gains(views)
        gains[:, TABLE] = self._worth(views, tables)
        made = [(o.neural, len(o.table or ()), o.model) for o in offers.values()]
        most = np.array([offer.limit for offer in offers.values()], np.int64)
        limits = np.minimum(np.array(made, np.int64).reshape(len(views), DRAFTERS), most[:, None])
        if self.fixed_k is not None:
            drafter = NEURAL if self.neural else MODEL if self.model else TABLE
            lengths = np.minimum(limits[:, drafter], self.fixed_k)
            return {v.request_id: Draft(drafter, int(k)) for v, k in zip(views, lengths, strict=True)}
        if not self.step_time.ready:
            self.expected_tokens = 0.0
            return {v.request_id: Draft(NEURAL, int(k)) for v, k in zip(views, limits[:, NEURAL], strict=True)}
        choice = self._best(views, gains, limits, caps=[plan.caps])
        if ahead.room is not None:
            choice = within(choice, gains, ahead.room)
        self.expected_tokens = choice.emitted
        drafts = map(Draft, choice.drafters, choice.lengths)
        return dict(zip(offers, drafts, strict=True))

    def is_cold(self, request_id: str) -> bool:
        """Whether the neural drafter has a hole in what it read of this request."""
        return request_id in self._cold

    def observe_step(self, work: StepWork, seconds: float) -> None:
        """A step took `seconds`; exploration earns its share of it."""
        self.step_time.observe(work, seconds)
        self._credit = min(self._credit + self.exploration, BURST)

    def observe_neural(self, request_id: str, known: int, accepted: int) -> None:
        """The target's tokens are known for the first `known` of a neural draft; the first `accepted` equal them."""
        self.acceptance.observe(request_id, known, accepted)

    def observe_model(self, request_id: str, known: int, accepted: int) -> None:
        """The same for a draft of the draft model."""
        self.model_acceptance.observe(request_id, known, accepted)

    def observe_table(self, request_id: str, cells: Sequence[int], known: int, accepted: int) -> None:
        """The same for a draft of the table."""
        self.confidence.observe(request_id, cells, known, accepted)

    def drafter_changed(self, gated_rates: list[float]) -> None:
        """Another version of the neural drafter drafts from now on: widen the estimates and look at it."""
        self.acceptance.drafter_changed(gated_rates)
        self._credit = BURST

    def model_changed(self, gated_rates: list[float]) -> None:
        """The same for the draft model."""
        self.model_acceptance.drafter_changed(gated_rates)
        self._credit = BURST

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests."""
        for request_id in request_ids:
            self.acceptance.finish(request_id)
            self.model_acceptance.finish(request_id)
            self._read.pop(request_id, None)
            self.confidence.finish(request_id)
            self._cold.discard(request_id)
            self._known.discard(request_id)
            self._curves.pop(request_id, None)

    def _meet(self, view: RequestView) -> None:
        if view.request_id not in self._known:
            self._known.add(view.request_id)
            self.acceptance.start(view.request_id, view.domain)
            self.model_acceptance.start(view.request_id, view.domain)
            self.confidence.start(view.request_id, view.domain)
        if view.request_id in self._reads:
            self._read[view.request_id] = view.context_tokens

    def _plan(self, batch: list[RequestView]) -> Plan:
        if not (self.neural or self.model) or self.fixed_k == 0:
            return Plan(0, skip_drafter=True)
        known = self._look(batch)
        drafting = known.of([v.drafting for v in batch])
        if self.fixed_k is not None:
            return self._plan_fixed(drafting, self.fixed_k)
        if not self.step_time.ready:
            return Plan(int(bool(drafting.views)) if self.neural else 0, skip_drafter=not self.neural)
        self._exploring = self._credit > 0 if self._exploring else self._credit >= BURST
        best = self._choose(drafting, drafting.limits)
        plan = self._plan_model(drafting.views, best)
        drafts = bool(known.limits[:, NEURAL].any())  # whether the neural drafter could, now or soon
        reading = best.caps.neural > 0 or (drafts and self._invests(known))
        explores = self._exploring and drafts and not reading
        cap = best.caps.neural or int((reading or explores) and bool(drafting.views))
        plan = dataclasses.replace(plan, cap=cap, skip_drafter=not (reading or explores))
        if self._exploring:
            self._pay(batch, plan, new=Caps(int(explores), int(plan.model_cap > best.caps.model)))
        return plan

    def _invests(self, known: "_Known") -> bool:
        """Whether the neural drafter reads on, though it does not pay now, because it will once no request is cold.

        Prompts are read in steps that draft nothing, and after a pause new requests meet a batch of cold ones: drafting
        for them alone may not pay, and they would be the cold ones that the next meet.
        """
        with_it = self._choose(known, known.warm_limits)
        if not with_it.caps.neural:
            return False
        without = known.limits.copy()
        without[:, NEURAL] = 0
        return with_it.merit > WORTH_READING * self._choose(known, without).merit

    def _plan_fixed(self, drafting: "_Known", k: int) -> Plan:
        """The same length for all, drafted by the neural drafter if there is one."""
        longest = min(k, int(drafting.limits[:, NEURAL if self.neural else MODEL].max(initial=0)))
        if self.neural:
            return Plan(longest, skip_drafter=False)
        return self._model_plan(drafting.views, longest)

    def _plan_model(self, drafting: list[RequestView], best: Choice) -> Plan:
        """The draft model's part: what was chosen, or one draft for all to explore it."""
        if not self.model:
            return Plan(0, skip_drafter=True)
        usable = [v for v in drafting if v.limit]
        if best.caps.model:
            takes = {
                v.request_id for v, d, k in zip(drafting, best.drafters, best.lengths, strict=True) if d == MODEL and k
            }
            # The table may turn out to have nothing: whoever costs little to read is drafted for as well.
            chosen = [v for v in usable if v.request_id in takes or self._unread(v) <= _NEARLY_READ]
            return self._model_plan(chosen, best.caps.model)
        return self._model_plan(usable, int(self._exploring))

    def _model_plan(self, views: list[RequestView], cap: int) -> Plan:
        if not views or not cap:
            return Plan(0, skip_drafter=True)
        read = sum(self._unread(v) for v in views)
        return Plan(0, True, model_cap=cap, model_for=frozenset(v.request_id for v in views), model_read=read)

    def _pay(self, batch: list[RequestView], plan: Plan, new: Caps) -> None:
        """Take the time of the drafters that run only to be explored, `new`, from the credit."""
        drafting = [v for v in batch if v.drafting]
        plain = dataclasses.replace(_plain_step(drafting), prefill_tokens=sum(v.prefill_tokens for v in batch))
        busy = with_drafts(plain, 0, new, plan.model_read if new.model else 0)
        spent = self.step_time.predict(busy) - self.step_time.predict(plain)
        self._credit -= spent / self.step_time.predict(_plain_step(drafting))

    def _look(self, batch: list[RequestView]) -> "_Known":
        """What is known of the requests before the step."""
        room = self.k_max if self._ahead.room is None else self._ahead.room
        most = np.minimum(np.array([v.limit for v in batch], np.int64), room)
        warm_limits = np.stack([most * self.neural, most, most * self.model], axis=1)
        limits = warm_limits.copy()
        limits[[v.request_id in self._cold for v in batch], NEURAL] = 0
        unread = np.array([self._unread(v) if self.model else 1 for v in batch], np.float64)
        # Beyond what comes with each step, reading is paid back over the steps that follow.
        price = np.minimum(unread, _NEARLY_READ) + np.maximum(unread - _NEARLY_READ, 0.0) / INVESTED_STEPS
        return _Known(batch, self._gains(batch), limits, warm_limits, price)

    def _choose(self, known: "_Known", limits: Ints) -> Choice:
        """The best choice as far as it is known before the step."""
        return self._best(known.views, known.gains, limits, unread=known.unread)

    def _best(self, views: list[RequestView], gains: Floats, limits: Ints, **known: Any) -> Choice:
        """What the objective says; known: `caps` and `unread` of `Batch`."""
        # Reading a prompt is an investment: it is paid back over the steps that follow.
        base = dataclasses.replace(_plain_step(views), prefill_tokens=self._ahead.prefill_tokens / INVESTED_STEPS)
        batch = Batch(gains, limits, base, self.step_time, **known)
        if self.objective == "latency":
            return choose_latency(batch)
        needs = np.array([self._ahead.needs.get(v.request_id, 0.0) for v in views]) if self.objective == "slo" else None
        return choose(batch, needs)

    def _unread(self, view: RequestView) -> int:
        """Tokens that the draft model would read for this request at the end of the step: at least the newest."""
        return max(view.context_tokens - self._read.get(view.request_id, 0), 0) + 1

    def _gains(self, views: list[RequestView]) -> Floats:
        """Expected extra tokens by request, drafter and position; the table's are those that it had so far."""
        names = [v.request_id for v in views]
        gains = np.zeros((len(views), DRAFTERS, self.k_max))
        gains[:, NEURAL], gains[:, TABLE] = self.acceptance.gains(names), self._usual(views)
        if self.model:
            gains[:, MODEL] = self.model_acceptance.gains(names)
        return gains

    def _usual(self, views: list[RequestView]) -> Floats:
        """What the table's drafts were usually worth to each request, at first to its domain, [requests, k_max]."""
        nothing = np.zeros(self.k_max)
        unknown = {v.domain: self._domain_curves.get(v.domain, nothing) for v in views}
        curves = [self._curves.get(v.request_id, unknown[v.domain]) for v in views]
        return np.array(curves).reshape(len(views), self.k_max)

    def _worth(self, views: list[RequestView], tables: list[Sequence[int] | None]) -> Floats:
        """Expected extra tokens of the table's drafts, [requests, k_max]; remembered as the requests' usual ones."""
        rates = [self.confidence.rates(v.request_id, t or ()) for v, t in zip(views, tables, strict=True)]
        chances = [[*each, *[0.0] * self.k_max][: self.k_max] for each in rates]
        gains = np.array(chances).reshape(len(views), self.k_max).cumprod(axis=1)
        usual = gains + _CURVE_MEMORY * (self._usual(views) - gains)
        self._curves.update(zip([view.request_id for view in views], usual, strict=True))
        domains = np.array([view.domain for view in views])
        for domain in {view.domain for view in views}:
            mine = gains[domains == domain]
            now, kept = mine.mean(axis=0), _DOMAIN_CURVE_MEMORY ** len(mine)
            self._domain_curves[domain] = now + kept * (self._domain_curves.get(domain, now) - now)
        return gains


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of some requests before their drafts are there."""

    views: list[RequestView]
    gains: Floats  # [requests, DRAFTERS, k_max]
    limits: Ints  # [requests, DRAFTERS] longest draft
    warm_limits: Ints  # the same if no request were cold
    unread: Floats  # [requests] tokens that the draft model would read, as far as this step has to pay for them

    def of(self, which: list[bool]) -> "_Known":
        """Of some of the requests."""
        if all(which):
            return self
        views = [view for view, one in zip(self.views, which, strict=True) if one]
        return _Known(views, self.gains[which], self.limits[which], self.warm_limits[which], self.unread[which])


def _plain_step(drafting: list[RequestView]) -> StepWork:
    """The next step of these requests without drafts."""
    return StepWork(
        requests=len(drafting),
        drafts=0,
        prefill_tokens=0,
        context_tokens=sum(v.context_tokens for v in drafting),
        draft_first=0,
        draft_more=0,
    )
