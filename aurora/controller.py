"""The speculation controller: what each request drafts with, how many tokens, and whether the neural drafter runs.

It owns no clock and no engine. `plan` is asked before a step whether the neural drafter shall draft at its end;
`settle` is asked after it, when all drafts are there, which of them to verify; `observe_*` are told what came of it.

A neural drafter that skips a step keeps a hole in its KV cache, so a request is *warm* only while the drafter has read
all of it; cold requests draft from the n-gram table for the rest of their life. When the drafter does not pay it is
skipped, except in *bursts* of exploration, so that leaving it out never becomes a trap: for as long as the credit lasts
it drafts one token for all warm requests. Reading a prompt is dear and one draft says little, hence bursts and not a
trickle. The table needs no exploration: what it would have drafted is compared with the target's tokens at every step.
"""

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from aurora.acceptance import AcceptanceModel
from aurora.confidence import ConfidenceModel, DraftBasis
from aurora.goodput import NEURAL, TABLE, Choice, Floats, Ints, StepTimeModel, StepWork, choose, with_drafts

_BURST = 4.0  # credit of one burst, in plain steps; granted at start and at each new drafter version
_CURVE_MEMORY = 0.9  # of what the table was worth in a request's earlier steps
_DOMAIN_CURVE_MEMORY = 0.99


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
class Plan:
    """What the neural drafter does at the end of the step at hand."""

    cap: int  # tokens that it drafts for every request
    skip_drafter: bool  # it does not even read this step's tokens


@dataclass(frozen=True)
class Offer:
    """The drafts that one request has after a step."""

    limit: int  # longest draft that the request may have now
    neural: int  # tokens that the neural drafter drafted
    table: DraftBasis | None  # what the table's drafts rest on


@dataclass(frozen=True)
class Draft:
    """What one request verifies in the next step."""

    drafter: int  # NEURAL or TABLE
    length: int


@dataclass
class SpeculationController:
    """Goodput-optimal choice of drafter and speculation length over live estimates of step time and acceptance."""

    k_max: int
    fixed_k: int | None = None
    exploration: float = 0.02  # share of the engine's steps
    neural: bool = True  # whether there is a neural drafter to use
    acceptance: AcceptanceModel = field(init=False)
    confidence: ConfidenceModel = field(default_factory=ConfidenceModel)
    step_time: StepTimeModel = field(default_factory=StepTimeModel)
    expected_tokens: float = 0.0  # emitted by the next step as it was settled; 0.0 while the step time is unknown
    _views: dict[str, RequestView] = field(default_factory=dict)  # of the step at hand
    _cold: set[str] = field(default_factory=set)
    _known: set[str] = field(default_factory=set)
    _curves: dict[str, Floats] = field(default_factory=dict)  # request -> usual gains of its table drafts, [k_max]
    _domain_curves: dict[str, Floats] = field(default_factory=dict)
    _credit: float = _BURST  # plain steps that exploration may still lose
    _exploring: bool = True

    def __post_init__(self) -> None:
        self.acceptance = AcceptanceModel(self.k_max)

    def plan(self, batch: list[RequestView]) -> Plan:
        """Decide on the neural drafter for the step that is about to run."""
        self._views = {v.request_id: v for v in batch}
        for view in batch:
            self._meet(view)
        plan = self._plan(batch)
        if plan.skip_drafter:
            self._cold.update(self._views)
        return plan

    def settle(self, plan: Plan, offers: Mapping[str, Offer]) -> dict[str, Draft]:
        """Choose among the drafts that the requests of the planned step have now; each gets at least an empty one."""
        views = [self._views[r] for r in offers]
        gains, limits = self._gains(views), np.zeros((len(views), 2), np.int64)
        for i, (view, offer) in enumerate(zip(views, offers.values(), strict=True)):
            limits[i, NEURAL] = min(offer.limit, offer.neural)
            gains[i, TABLE] = self._worth(view, offer.table)
            limits[i, TABLE] = min(offer.limit, len(offer.table.orders) if offer.table is not None else 0)
        if self.fixed_k is not None:
            drafter = NEURAL if self.neural else TABLE
            lengths = np.minimum(limits[:, drafter], self.fixed_k)
            return {v.request_id: Draft(drafter, int(k)) for v, k in zip(views, lengths, strict=True)}
        if not self.step_time.ready:
            self.expected_tokens = 0.0
            return {v.request_id: Draft(NEURAL, int(k)) for v, k in zip(views, limits[:, NEURAL], strict=True)}
        choice = choose(gains, limits, _plain_step(views), self.step_time, caps=[plan.cap])
        self.expected_tokens = choice.emitted
        drafts = map(Draft, choice.drafters, choice.lengths)
        return dict(zip(offers, drafts, strict=True))

    def is_cold(self, request_id: str) -> bool:
        """Whether the neural drafter has a hole in what it read of this request."""
        return request_id in self._cold

    def observe_step(self, work: StepWork, seconds: float) -> None:
        """A step took `seconds`; exploration earns its share of it."""
        self.step_time.observe(work, seconds)
        self._credit = min(self._credit + self.exploration, _BURST)

    def observe_neural(self, request_id: str, known: int, accepted: int) -> None:
        """The target's tokens are known for the first `known` of a neural draft; the first `accepted` equal them."""
        self.acceptance.observe(request_id, known, accepted)

    def observe_table(self, request_id: str, basis: DraftBasis, known: int, accepted: int) -> None:
        """The same for a draft of the table."""
        self.confidence.observe(request_id, basis, known, accepted)

    def drafter_changed(self, gated_rates: list[float]) -> None:
        """Another version of the neural drafter drafts from now on: widen the estimates and look at it."""
        self.acceptance.drafter_changed(gated_rates)
        self._credit = _BURST

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests."""
        for request_id in request_ids:
            self.acceptance.finish(request_id)
            self.confidence.finish(request_id)
            self._cold.discard(request_id)
            self._known.discard(request_id)
            self._curves.pop(request_id, None)

    def _meet(self, view: RequestView) -> None:
        if view.request_id not in self._known:
            self._known.add(view.request_id)
            self.acceptance.start(view.request_id, view.domain)
            self.confidence.start(view.request_id, view.domain)

    def _plan(self, batch: list[RequestView]) -> Plan:
        if not self.neural or self.fixed_k == 0:
            return Plan(0, skip_drafter=True)
        drafting = [v for v in batch if v.drafting]
        warm = bool(self._limits(batch)[:, NEURAL].any())
        if self.fixed_k is not None:
            return Plan(min(self.fixed_k, int(self._limits(drafting)[:, NEURAL].max(initial=0))), skip_drafter=False)
        if not self.step_time.ready:
            return Plan(int(bool(drafting)), skip_drafter=False)
        self._exploring = self._credit > 0 if self._exploring else self._credit >= _BURST
        best = self._choose(drafting)
        # A step may hold prompts only: the drafter reads them if their requests will be drafted for.
        reading = best.cap > 0 or (len(drafting) < len(batch) and self._choose(batch).cap > 0)
        if self._exploring and warm and not reading:
            return self._explore(batch, drafting)
        return Plan(best.cap, skip_drafter=not reading)

    def _explore(self, batch: list[RequestView], drafting: list[RequestView]) -> Plan:
        """One neural draft for all; the drafter's time is taken from the credit."""
        plain = dataclasses.replace(_plain_step(drafting), prefill_tokens=sum(v.prefill_tokens for v in batch))
        spent = self.step_time.predict(with_drafts(plain, 0, 1)) - self.step_time.predict(plain)
        self._credit -= spent / self.step_time.predict(_plain_step(drafting))
        return Plan(int(bool(drafting)), skip_drafter=False)

    def _choose(self, views: list[RequestView]) -> Choice:
        return choose(self._gains(views), self._limits(views), _plain_step(views), self.step_time)

    def _gains(self, views: list[RequestView]) -> Floats:
        """Expected extra tokens by request, drafter and position; the table's are those that it had so far."""
        neural = self.acceptance.gains([v.request_id for v in views])
        table = np.array([self._curve(v) for v in views]).reshape(len(views), self.k_max)
        return np.stack([neural, table], axis=1)

    def _curve(self, view: RequestView) -> Floats:
        usual = self._curves.get(view.request_id)
        return usual if usual is not None else self._domain_curves.get(view.domain, np.zeros(self.k_max))

    def _worth(self, view: RequestView, table: DraftBasis | None) -> Floats:
        """Expected extra tokens of the table's drafts by position, [k_max]; remembered as the request's usual ones."""
        rates = self.confidence.rates(view.request_id, table)[: self.k_max] if table is not None else []
        worth = [*accumulate(rates, operator.mul), *[0.0] * (self.k_max - len(rates))]
        gains = np.array(worth)
        self._curves[view.request_id] = gains + _CURVE_MEMORY * (self._curve(view) - gains)
        domain = self._domain_curves.get(view.domain, gains)
        self._domain_curves[view.domain] = gains + _DOMAIN_CURVE_MEMORY * (domain - gains)
        return gains

    def _limits(self, views: list[RequestView]) -> Ints:
        """Longest draft by request and drafter, [requests, 2]."""
        neural = [0 if v.request_id in self._cold or not self.neural else v.limit for v in views]
        return np.array([neural, [v.limit for v in views]], dtype=np.int64).T


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
