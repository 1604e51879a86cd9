"""Continuous batching in modelled time over recorded requests: what `aurora replay` runs.

A draft is accepted when the recorded target said it, so acceptance is exact; each step takes what a step-time model
says.
"""

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aurora.controller import Plan, RequestView, SpeculationController
from aurora.goodput import NEURAL
from aurora.step_time import StepTimeModel, StepWork
from aurora.trace import TABLE_VERSION, encode_traces, pack_states
from trainer.recording import Verified, traces_of

if TYPE_CHECKING:
    from serve.portfolio import Portfolio
    from trainer.loop import TrainerLoop
    from trainer.sequence import Sequence as Recorded

_LOOKUP_DRAFTS, _LOOKUP_LONGEST, _LOOKUP_SHORTEST = 3, 4, 2
_PROMPT_ROWS = 256  # of each request that the trainer gets, as in serving


@dataclass
class Outcome:
    """What one request got."""

    domain: str
    emitted: int = 0
    steps: int = 0  # decode steps
    draft_steps: int = 0  # of these with drafts
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0  # its equal share of the steps it was in


@dataclass
class Live:
    """One request in the batch."""

    name: str
    request: "Recorded"
    drafted: "np.ndarray | None"  # neural drafts from each start (`greedy_drafts`); None: no neural drafter
    outcome: Outcome
    domain: str  # label that the portfolio is told; from its arrival on the domain that it is of
    version: int = TABLE_VERSION  # of the neural drafter
    model_drafted: "np.ndarray | None" = None  # drafts of the draft model from each start
    known: int = 0  # tokens that were read or emitted; 0: the prompt has not been read
    drafts: list[int] = field(default_factory=list)
    verified: list[Verified] = field(default_factory=list)  # neural drafts so far

    @property
    def done(self) -> bool:
        return self.known == len(self.request.ids)

    def drafted_now(self, drafted: "np.ndarray | None", cap: int) -> list[int]:
        """What the drafter of `drafted` drafts now: right tokens as far as it is right, a wrong one, unknown ones."""
        start = self.known - 2 - self.request.first_start
        if drafted is None or start >= len(drafted):
            return []
        drafts: list[int] = drafted[start, :cap].tolist()
        return drafts

    def view(self, k_max: int) -> RequestView:
        left = len(self.request.ids) - max(self.known, self.request.prompt_tokens + 1) - 1
        return RequestView(
            request_id=self.name,
            context_tokens=max(self.known, self.request.prompt_tokens),
            drafting=True,
            limit=max(0, min(k_max, left)),
            prefill_tokens=0 if self.known else self.request.prompt_tokens,
            domain=self.domain,
        )


class Clockwork:
    """Continuous batching in modelled time: the recorded requests, one step after the other."""

    def __init__(self, costs: StepTimeModel, speculator: "Speculator", concurrency: int) -> None:
        self.now_s = 0.0
        self._costs = costs
        self._speculator = speculator
        self._concurrency = concurrency
        self._batch: list[Live] = []

    def run(self, arrivals: Iterable[Live]) -> Iterator[Live]:
        """Serve everything; yields each request when it is done."""
        queue = iter(arrivals)
        while True:
            for live in islice(queue, self._concurrency - len(self._batch)):
                self._batch.append(live)
                self._speculator.begin(live)
            if not self._batch:
                return
            self._step()
            finished = [live for live in self._batch if live.done]
            self._batch = [live for live in self._batch if not live.done]
            self._speculator.finish(finished)
            yield from finished

    def _step(self) -> None:
        plan = self._speculator.plan(self._batch)
        work = self._work(plan)
        seconds = self._costs.predict(work)
        self.now_s += seconds
        for live in self._batch:
            verified, emitted = len(live.drafts), _emit(live)
            live.outcome.seconds += seconds / len(self._batch)
            self._speculator.observe(live, verified, emitted)
        self._speculator.stepped(work, seconds)
        self._speculator.settle([live for live in self._batch if not live.done])

    def _work(self, plan: Plan) -> StepWork:
        decoding = [live for live in self._batch if live.known]
        return StepWork(
            requests=len(decoding),
            drafts=sum(len(live.drafts) for live in decoding),
            prefill_tokens=sum(live.request.prompt_tokens for live in self._batch if not live.known),
            context_tokens=sum(max(live.known, live.request.prompt_tokens) for live in self._batch),
            draft_first=int(not plan.skip_drafter),
            draft_more=max(plan.cap - 1, 0),
            model_first=int(plan.model_cap > 0),
            model_read=plan.model_read,
            model_more=max(plan.model_cap - 1, 0),
        )


def _emit(live: Live) -> list[int]:
    """Advance one request by what the target says in this step; returns that."""
    ids = live.request.ids
    if not live.known:
        live.known = live.request.prompt_tokens + 1
        live.outcome.emitted += 1
        return [int(ids[live.known - 1])]
    truth = ids[live.known : live.known + len(live.drafts)].tolist()
    accepted = next((i for i, (a, b) in enumerate(zip(live.drafts, truth, strict=False)) if a != b), len(truth))
    emitted: list[int] = ids[live.known : live.known + accepted + 1].tolist()
    outcome = live.outcome
    outcome.steps += 1
    outcome.draft_steps += bool(live.drafts)
    outcome.drafted += len(live.drafts)
    outcome.accepted += accepted
    outcome.emitted += len(emitted)
    live.known += len(emitted)
    return emitted


class Speculator:
    """Decides what each request drafts. This one drafts nothing."""

    def begin(self, live: Live) -> None: ...

    def plan(self, batch: Sequence[Live]) -> Plan:
        """What the neural drafter does in the step of `batch` that comes."""
        assert batch
        return Plan(0, skip_drafter=True)

    def observe(self, live: Live, verified: int, emitted: list[int]) -> None: ...

    def stepped(self, work: StepWork, seconds: float) -> None:
        """The step took `seconds`."""

    def settle(self, batch: Sequence[Live]) -> None:
        """Put drafts into the requests that go on."""

    def finish(self, finished: Sequence[Live]) -> None: ...


class PromptLookup(Speculator):
    """vLLM's `ngram` method: the tokens after the first earlier place of the longest matching end of the text."""

    def settle(self, batch: Sequence[Live]) -> None:
        for live in batch:
            live.drafts = lookup(live.request.ids[: live.known])[: live.view(_LOOKUP_DRAFTS).limit]


def lookup(text: np.ndarray) -> list[int]:
    """Drafts of prompt lookup (Saxena 2023) with vLLM's choice among several matches: the longest, then the first."""
    for length in range(min(_LOOKUP_LONGEST, len(text) - 1), _LOOKUP_SHORTEST - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], length)
        found = np.flatnonzero((windows == text[-length:]).all(axis=1))
        if len(found):
            after = int(found[0]) + length
            return [int(t) for t in text[after : after + _LOOKUP_DRAFTS]]
    return []


class PortfolioSpeculator(Speculator):
    """The portfolio that serves live, and the trainer beside it."""

    def __init__(self, portfolio: "Portfolio", k_max: int, training: "Training | None" = None) -> None:
        self.training = training
        self.now_s = 0.0
        self._portfolio = portfolio
        self._k_max = k_max
        self._plan = Plan(0, skip_drafter=True)
        self._neural: set[str] = set()  # requests whose drafts are the neural drafter's

    def begin(self, live: Live) -> None:
        request = live.request
        prompt, answer = np.split(request.ids, [request.prompt_tokens])
        live.domain = self._portfolio.begin(live.name, "", live.domain, prompt, len(answer))

    def plan(self, batch: Sequence[Live]) -> Plan:
        self._plan = self._portfolio.plan([live.view(self._k_max) for live in batch])
        return self._plan

    def observe(self, live: Live, verified: int, emitted: list[int]) -> None:
        self._portfolio.observe(live.name, verified, emitted)
        if verified and live.name in self._neural:
            known = live.known - len(emitted)
            live.verified.append(Verified(known, live.drafts, len(emitted) - 1, live.version))

    def stepped(self, work: StepWork, seconds: float) -> None:
        self._portfolio.controller.observe_step(work, seconds)
        self.now_s += seconds
        if self.training is not None:
            self.training.advance(seconds)

    def settle(self, batch: Sequence[Live]) -> None:
        neural = {live.name: live.drafted_now(live.drafted, self._plan.cap) for live in batch}
        limits = {live.name: live.view(self._k_max).limit for live in batch}
        asked = [live for live in batch if live.name in self._plan.model_for]
        model = {live.name: live.drafted_now(live.model_drafted, self._plan.model_cap) for live in asked}
        drafts = self._portfolio.settle(neural, limits, model)
        for live in batch:
            live.drafts = drafts[live.name].tokens
        self._neural = {name for name, drafted in drafts.items() if drafted.chosen.drafter == NEURAL}

    def finish(self, finished: Sequence[Live]) -> None:
        self._portfolio.finish([live.name for live in finished])
        for live in finished:
            if self.training is not None:
                self.training.learn_from(live)


class Training:
    """The trainer beside a replay: it gets `share` core-seconds of work for each modelled second."""

    def __init__(self, loop: "TrainerLoop", share: float, controller: SpeculationController, codec: str) -> None:
        """controller: told of each version that becomes live; codec: of the traces that are learned from."""
        self.loop = loop
        self._codec = codec
        self.spent_s = 0.0
        self._share = share
        self._credit_s = 0.0
        self._controller = controller

    def advance(self, seconds: float) -> None:
        """`seconds` of modelled time have passed."""
        self._credit_s += self._share * seconds
        draft_model, controller = self.loop.draft_model, self._controller
        version, model_version = self.loop.version, draft_model.version if draft_model is not None else 0
        while self._credit_s > 0:
            began = time.process_time()
            idle = not self.loop.work()
            took = time.process_time() - began
            self.spent_s += took
            self._credit_s = 0.0 if idle else self._credit_s - took  # spare time does not keep
        if self.loop.version != version:
            controller.drafter_changed(self.loop.gated_rates)
        if draft_model is not None and draft_model.version != model_version:
            controller.model_changed(draft_model.gated_rates)

    def save(self, directory: Path) -> None:
        """Copy the live version into a new directory."""
        shutil.copytree(self.loop.live_directory, directory)

    def learn_from(self, live: Live) -> None:
        """Take a served request in, with the neural drafts that were verified for it."""
        request = replace(live.request, domain=live.domain)
        traces = traces_of(request, _PROMPT_ROWS, live.verified)
        self.loop.ingest(encode_traces([pack_states(trace, self._codec) for trace in traces]))
