"""The speculation controller: each request's draft length for the next step, and whether the drafter runs at all.

It owns no clock and no engine: `plan` is asked before a step, `observe_*` told after it. A drafter that skips a step
keeps a hole in its KV cache, so a request is *warm* only while the drafter has read all of it; cold requests get no
drafts for the rest of their life. When no speculation is the best choice the drafter is skipped, except for
*explorers*: requests kept warm and drafted for within a budget, so that k = 0 never becomes a trap.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from aurora.acceptance import AcceptanceModel
from aurora.goodput import Choice, StepTimeModel, StepWork, choose_lengths, evaluate

_FIRST_CREDIT_S = 1.0  # seconds of exploration granted at start and at each new drafter version
_SKIP_MARGIN = 1.02  # no speculation must win by this much before requests are let go cold


@dataclass(frozen=True)
class RequestView:
    """What the controller sees of one request in a step."""

    request_id: str
    context_tokens: int
    drafting: bool  # emits a token in this step, so that drafts can follow
    limit: int  # longest draft it may have
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
    exploration: float = 0.02  # share of engine time
    acceptance: AcceptanceModel = field(init=False)
    step_time: StepTimeModel = field(default_factory=StepTimeModel)
    _cold: set[str] = field(default_factory=set)
    _known: set[str] = field(default_factory=set)
    _explorers: set[str] = field(default_factory=set)
    _credit_s: float = _FIRST_CREDIT_S

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
        plan = self._best(batch, drafting)
        if plan.skip_drafter:
            self._cold.update(v.request_id for v in batch)
        return plan

    def observe_step(self, work: StepWork, seconds: float) -> None:
        """A step took `seconds`; exploration earns its share of it."""
        self.step_time.observe(work, seconds)
        self._credit_s = min(self._credit_s + self.exploration * seconds, _FIRST_CREDIT_S)

    def observe_verification(self, request_id: str, k: int, accepted: int) -> None:
        self.acceptance.observe(request_id, k, accepted)

    def drafter_changed(self, gated_rates: list[float]) -> None:
        """Another drafter version drafts from now on: widen the estimates and look at it."""
        self.acceptance.drafter_changed(gated_rates)
        self._credit_s = _FIRST_CREDIT_S

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests."""
        for request_id in request_ids:
            self.acceptance.finish(request_id)
            for group in (self._cold, self._known, self._explorers):
                group.discard(request_id)

    def _meet(self, view: RequestView) -> None:
        if view.request_id in self._known:
            return
        self._known.add(view.request_id)
        self.acceptance.start(view.request_id, view.domain)
        if self._credit_s > 0:
            self._explorers.add(view.request_id)

    def _best(self, batch: list[RequestView], drafting: list[RequestView]) -> Plan:
        ids = [v.request_id for v in drafting]
        gains = self.acceptance.gains(ids)
        limits = np.array([0 if v.request_id in self._cold else v.limit for v in drafting], dtype=np.int64)
        base = _plain_step(drafting)
        choice = choose_lengths(gains, limits, base, self.step_time)
        if choice.cap:
            return Plan(dict(zip(ids, choice.lengths, strict=True)), False, choice.emitted)
        explorers = [v for v in batch if v.request_id in self._explorers and v.request_id not in self._cold]
        if explorers and self._credit_s > 0:
            return self._explore(explorers, drafting, choice)
        skip = bool(batch) and not self._close_call(drafting, limits, choice)
        return Plan(dict.fromkeys(ids, 0), skip, choice.emitted)

    def _explore(self, explorers: list[RequestView], drafting: list[RequestView], plain: Choice) -> Plan:
        """One draft for each warm explorer; the time it is expected to lose is taken from the credit."""
        chosen = {v.request_id for v in explorers}
        ids = [v.request_id for v in drafting]
        lengths = np.array([min(1, v.limit) if v.request_id in chosen else 0 for v in drafting], dtype=np.int64)
        base = _plain_step(drafting)
        tried = evaluate(lengths, self.acceptance.gains(ids), base, self.step_time)
        if drafting:
            self._credit_s -= max(0.0, tried.seconds - tried.emitted / plain.goodput)
        return Plan(dict(zip(ids, tried.lengths, strict=True)), False, tried.emitted)

    def _close_call(self, drafting: list[RequestView], limits: npt.NDArray[np.int64], plain: Choice) -> bool:
        """Whether one draft for each warm request would be nearly as good as none: then stay warm."""
        if not drafting or not limits.any():
            return False
        gains = self.acceptance.gains([v.request_id for v in drafting])
        one = evaluate(np.minimum(limits, 1), gains, _plain_step(drafting), self.step_time)
        return one.goodput * _SKIP_MARGIN >= plain.goodput

    def _expected(self, drafting: list[RequestView]) -> float:
        if not self.step_time.ready or self.fixed_k is None:
            return 0.0
        gains = self.acceptance.gains([v.request_id for v in drafting])
        lengths = np.array([min(self.fixed_k, v.limit) for v in drafting], dtype=np.int64)
        return evaluate(lengths, gains, _plain_step(drafting), self.step_time).emitted


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
