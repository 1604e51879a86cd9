"""The speculation controller: each request's draft length for the next step, and whether the drafter runs at all.

It owns no clock and no engine: `plan` is asked before a step, `observe_*` told after it. A drafter that skips a step
keeps a hole in its KV cache, so a request is *warm* only while the drafter has read all of it; cold requests get no
drafts for the rest of their life. When no speculation is the best choice the drafter is skipped, except in *bursts* of
exploration: for as long as the credit lasts every warm request gets at least one draft, so that k = 0 never becomes a
trap. Reading a prompt is dear and one draft says little, hence bursts and not a trickle.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from aurora.acceptance import AcceptanceModel
from aurora.goodput import Choice, Floats, Ints, StepTimeModel, StepWork, choose_lengths, evaluate

_BURST = 4.0  # credit of one burst, in plain steps; granted at start and at each new drafter version


@dataclass(frozen=True)
class RequestView:
    """What the controller sees of one request in a step."""

    request_id: str
    context_tokens: int
    drafting: bool  # emits a token in this step, so that drafts can follow
    limit: int  # longest draft it may have
    prefill_tokens: int = 0  # prompt tokens read in this step
    domain: str = ""


@dataclass(frozen=True)
class Plan:
    """The decision for the drafts made at the end of the step at hand and verified in the next."""

    lengths: dict[str, int]
    skip_drafter: bool
    expected_tokens: float  # emitted by the next step; 0.0 while the step time is unknown

    @property
    def cap(self) -> int:
        return max(self.lengths.values(), default=0)


@dataclass
class SpeculationController:
    """Goodput-optimal speculation lengths over live estimates of step time and acceptance."""

    k_max: int
    fixed_k: int | None = None
    exploration: float = 0.02  # share of the engine's steps
    acceptance: AcceptanceModel = field(init=False)
    step_time: StepTimeModel = field(default_factory=StepTimeModel)
    _cold: set[str] = field(default_factory=set)
    _known: set[str] = field(default_factory=set)
    _credit: float = _BURST  # plain steps that exploration may still lose
    _exploring: bool = True

    def __post_init__(self) -> None:
        self.acceptance = AcceptanceModel(self.k_max)

    def plan(self, batch: list[RequestView]) -> Plan:
        """Choose for every request of the step that is about to run."""
        for view in batch:
            self._meet(view)
        drafting = [v for v in batch if v.drafting]
        if self.fixed_k is not None:
            return Plan({v.request_id: min(self.fixed_k, v.limit) for v in drafting}, False, self._expected(drafting))
        if not self.step_time.ready:
            return Plan({v.request_id: min(1, v.limit) for v in drafting}, False, 0.0)
        self._exploring = self._credit > 0 if self._exploring else self._credit >= _BURST
        plan = self._explore(batch, drafting) if self._exploring else self._exploit(batch, drafting)
        if plan.skip_drafter:
            self._cold.update(v.request_id for v in batch)
        return plan

    def observe_step(self, work: StepWork, seconds: float) -> None:
        """A step took `seconds`; exploration earns its share of it."""
        self.step_time.observe(work, seconds)
        self._credit = min(self._credit + self.exploration, _BURST)

    def observe_verification(self, request_id: str, k: int, accepted: int) -> None:
        self.acceptance.observe(request_id, k, accepted)

    def drafter_changed(self, gated_rates: list[float]) -> None:
        """Another drafter version drafts from now on: widen the estimates and look at it."""
        self.acceptance.drafter_changed(gated_rates)
        self._credit = _BURST

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests."""
        for request_id in request_ids:
            self.acceptance.finish(request_id)
            self._cold.discard(request_id)
            self._known.discard(request_id)

    def _meet(self, view: RequestView) -> None:
        if view.request_id not in self._known:
            self._known.add(view.request_id)
            self.acceptance.start(view.request_id, view.domain)

    def _exploit(self, batch: list[RequestView], drafting: list[RequestView]) -> Plan:
        choice = self._choose(drafting)
        # A step may hold prompts only: the drafter reads them if their requests will be drafted for.
        reading = choice.cap > 0 or (len(drafting) < len(batch) and self._choose(batch).cap > 0)
        return _plan(drafting, choice, skip=not reading)

    def _explore(self, batch: list[RequestView], drafting: list[RequestView]) -> Plan:
        """At least one draft for every warm request; what this is expected to lose is taken from the credit."""
        best = self._choose(drafting)
        lengths = np.maximum(best.lengths, np.minimum(self._limits(drafting), 1))
        tried = evaluate(lengths, self._gains(drafting), _plain_step(drafting), self.step_time)
        reading = bool(self._limits(batch).any())
        if drafting:
            lost_s = tried.seconds - tried.emitted / best.goodput
            self._credit -= max(lost_s, 0.0) / self.step_time.predict(_plain_step(drafting))
        if reading and not best.cap:
            self._credit -= self._reading_s(batch) / self.step_time.predict(_plain_step(batch))
        return _plan(drafting, tried, skip=not reading)

    def _choose(self, views: list[RequestView]) -> Choice:
        return choose_lengths(self._gains(views), self._limits(views), _plain_step(views), self.step_time)

    def _gains(self, views: list[RequestView]) -> Floats:
        return self.acceptance.gains([v.request_id for v in views])

    def _limits(self, views: list[RequestView]) -> Ints:
        return np.array([0 if v.request_id in self._cold else v.limit for v in views], dtype=np.int64)

    def _reading_s(self, batch: list[RequestView]) -> float:
        """Seconds in which the drafter reads the prompts of the step at hand; 0.0 if there are none."""
        prompts = sum(v.prefill_tokens for v in batch)
        plain, read = (StepWork(0, 0, prompts, 0, draft_first=first, draft_more=0) for first in (0, 1))
        return self.step_time.predict(read) - self.step_time.predict(plain) if prompts else 0.0

    def _expected(self, drafting: list[RequestView]) -> float:
        if not self.step_time.ready or self.fixed_k is None:
            return 0.0
        lengths = np.array([min(self.fixed_k, v.limit) for v in drafting], dtype=np.int64)
        return evaluate(lengths, self._gains(drafting), _plain_step(drafting), self.step_time).emitted


def _plan(drafting: list[RequestView], choice: Choice, skip: bool) -> Plan:
    return Plan({v.request_id: k for v, k in zip(drafting, choice.lengths, strict=True)}, skip, choice.emitted)


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
