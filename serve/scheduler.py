"""vLLM's scheduler with a drafter and a speculation length for each request (seam: `--scheduler-cls`, vLLM 0.32-0.33,
synchronous).

`schedule` asks the controller what neural drafter and draft model shall draft at the end of the step it returns (for
the former `num_spec_tokens_to_schedule`); `update_draft_token_ids` sees what they drafted, adds the n-gram table's
drafts, and puts in place what the controller chooses for each request. Notes to and from the worker ride on the objects
that vLLM sends between the two anyway.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

from aurora.config import SpeculationConfig
from aurora.controller import Ahead, Plan, RequestView
from aurora.goodput import MODEL
from aurora.step_time import StepTimeModel, StepWork
from serve.calibration import Drill, is_calibration, keep_costs, known_costs
from serve.portfolio import Portfolio
from serve.request_options import RequestOptions
from serve.step_log import StepLog
from serve.token_sources import SourceNotes

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request

NOTES = "aurora_notes"


@dataclass(frozen=True)
class StepNotes:
    """Scheduler to worker: the plan for this step's drafting, who drafted what it verifies, how the last step went."""

    skip_drafter: bool
    one_hot: dict[str, int]  # who drafted (TABLE, MODEL) what requests verify that is not the neural drafter's
    model_cap: int  # tokens that the draft model drafts at the end of this step
    model_for: frozenset[str]  # for these requests
    predicted_s: float  # of the previous step; 0.0 if unknown
    predicted_tokens: float  # expected of the previous step, of its decoding requests
    measured_s: float  # of the previous step; 0.0 if there was none
    plain_s: float  # that its tokens would have taken without speculation; 0.0 if unknown
    step_error: float  # median absolute relative error of the step-time model
    step_costs: dict[str, float]  # seconds of each part of a step
    drafts_version: int  # drafter version that made the neural drafts of the previous step
    first_drafts: tuple[int, int]  # of them: how many there were, and how many had the right first token
    began: dict[str, str]  # requests whose first step this is -> domain; not those of the domain ""
    model_version: int  # draft model version that drafted in the previous step
    model_first_drafts: tuple[int, int]


@dataclass(frozen=True)
class DraftNotes:
    """Worker to scheduler, with the drafts."""

    version: int  # drafter version that made them
    gated_rates: list[float]  # conditional acceptance per position from that version's gate
    real: bool  # False: vLLM filled in placeholder drafts (sequence at the model's length limit)
    model: dict[str, list[int]]  # what the draft model drafted
    model_version: int  # that drafted it, or is live
    model_gated_rates: list[float]


class AuroraScheduler(Scheduler):
    """One drafter and draft length for each request and step, from 0 to k_max."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        speculation = SpeculationConfig.model_validate(self.vllm_config.additional_config["aurora"])
        self.portfolio = Portfolio(speculation, self.num_spec_tokens)
        self.controller = self.portfolio.controller
        costs = self.vllm_config.additional_config.get("aurora_step_costs")
        self._costs = Path(costs) if costs is not None else None
        self.controller.step_time = (self._costs and known_costs(self._costs)) or self.controller.step_time
        self._drill = Drill(self.num_spec_tokens, neural=self.controller.neural)
        self._drilling = False  # whether the step at hand calibrates
        self._drilled: list[tuple[StepWork, float]] = []  # steps that did, until they are kept
        self._plan = Plan(0, skip_drafter=False)
        self._work: StepWork | None = None
        self._decoding: list[str] = []  # requests that decode in the step at hand
        self._ended_s: float | None = None  # when the last step gave its tokens; None: nothing was left to do
        self._started_s = 0.0
        self._expected = 0.0  # tokens that the running step should emit
        self._last = (0.0, 0.0, 0.0)  # the last step: predicted seconds and tokens, measured seconds
        self._version: int | None = None
        self._began: dict[str, str] = {}  # as in `StepNotes`, of the step at hand
        self._model_version: int | None = None
        self._options: dict[str, RequestOptions] = {}
        self._token_deadline_ms = speculation.token_deadline_ms
        self._first_token_s: dict[str, float] = {}  # when each request emitted its first
        self._step_s = 0.0  # time of the last step
        self._plain_s = 0.0  # as in `StepNotes`
        self._sources = SourceNotes()
        self._log = StepLog(speculation.step_log) if speculation.step_log is not None else None

    def schedule(self, throttle_prefills: bool = False) -> "SchedulerOutput":
        # A step lasts from one output to the next: what the engine does in between is paid for by every step.
        self._started_s = time.perf_counter() if self._ended_s is None else self._ended_s
        output = super().schedule(throttle_prefills)
        self._finish(output.finished_req_ids)
        if not output.total_num_scheduled_tokens:
            return output
        self._expected = self.controller.expected_tokens
        self._begin(output.num_scheduled_tokens)
        self._drilling = any(map(is_calibration, output.num_scheduled_tokens))
        if self._drilled and not self._drilling:
            self._keep_costs()
        self._plan = self._drill.plan() if self._drilling else self._plan_for(output)
        output.num_spec_tokens_to_schedule = self._plan.cap
        self._work = self._work_of(output)
        setattr(output, NOTES, self._notes())
        return output

    def update_from_output(self, scheduler_output: "SchedulerOutput", model_runner_output: "ModelRunnerOutput") -> Any:
        self._ended_s = time.perf_counter()
        if self._work is not None:
            emitted_tokens = self._emitted(model_runner_output)
            self._observe_time(self._work, self._ended_s - self._started_s, emitted_tokens)
            if self._log is not None and not self._drilling:
                self._log.write(self._work, self._last, emitted_tokens)
            self._work = None
            for request_id, index in model_runner_output.req_id_to_index.items():
                verified = len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
                emitted = model_runner_output.sampled_token_ids[index]
                if request_id in self._sources:
                    self._sources.wrote(request_id, self.portfolio.drafter_of(request_id), len(emitted))
                self.portfolio.observe(request_id, verified, emitted)
                if emitted:
                    self._first_token_s.setdefault(request_id, self._ended_s)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._sources.attach(outputs)
        if not self.has_unfinished_requests():
            self._ended_s = None
        return outputs

    def update_draft_token_ids(self, draft_token_ids: "DraftTokenIds") -> None:
        notes: DraftNotes | None = getattr(draft_token_ids, NOTES, None)
        if notes is not None and notes.version != self._version:
            if self._version is not None:
                self.controller.drafter_changed(notes.gated_rates)
            self._version = notes.version
        if notes is not None and notes.model_version != self._model_version:
            if self._model_version is not None:
                self.controller.model_changed(notes.model_gated_rates)
            self._model_version = notes.model_version
        real = notes is None or notes.real
        pairs = zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True)
        neural = {r: tokens if real else [] for r, tokens in pairs if self._goes_on(r)}
        drafts = self._settle(neural, notes.model if notes is not None else {})
        draft_token_ids.draft_token_ids[:] = [drafts.get(r, []) for r in draft_token_ids.req_ids]
        super().update_draft_token_ids(draft_token_ids)

    def _emitted(self, ran: "ModelRunnerOutput") -> int:
        """Tokens of the requests that decoded in this step."""
        return sum(len(ran.sampled_token_ids[ran.req_id_to_index[r]]) for r in self._decoding)

    def _keep_costs(self) -> None:
        """The calibration is over."""
        self.controller.step_time = StepTimeModel.measured(self._drilled)
        if self._costs is not None:
            keep_costs(self._costs, self._drilled)
        self._drilled = []

    def _plan_for(self, output: "SchedulerOutput") -> Plan:
        views = [self._view(r, output) for r in output.num_scheduled_tokens]
        return self.portfolio.plan(views, self._ahead([v.request_id for v in views if v.drafting], emitting=2))

    def _settle(self, neural: dict[str, list[int]], model: dict[str, list[int]]) -> dict[str, list[int]]:
        """Tokens to verify of each request."""
        limits = {r: self._limit(self.requests[r], emitting=1) for r in neural}
        if self._drilling:
            return self._drill.settle(limits)
        settled = self.portfolio.settle(neural, limits, model, self._ahead(neural, emitting=1))
        return {r: drafts.tokens for r, drafts in settled.items()}

    def _goes_on(self, request_id: str) -> bool:
        """Whether the request emitted a token in this step and needs another one."""
        request = self.requests.get(request_id)
        return request is not None and not request.is_finished() and not request.is_prefill_chunk

    def _begin(self, request_ids: Iterable[str]) -> None:
        """Let the portfolio follow the requests that are new in this step."""
        self._began = {}
        for request_id in request_ids:
            if request_id in self.portfolio or is_calibration(request_id):
                continue
            request = self.requests[request_id]
            options = RequestOptions.of(request.sampling_params and request.sampling_params.extra_args)
            self._options[request_id] = options
            if options.aurora_token_sources:
                self._sources.begin(request_id, options.aurora_token_sources)
            tenant, tokens = request.cache_salt or "", request.all_token_ids
            domain = self.portfolio.begin(request_id, tenant, options.domain, tokens, request.max_tokens)
            if domain:
                self._began[request_id] = domain

    def _finish(self, request_ids: Iterable[str]) -> None:
        self.portfolio.finish([r for r in request_ids if r in self.portfolio])
        for request_id in request_ids:
            self._options.pop(request_id, None)
            self._first_token_s.pop(request_id, None)
            self._sources.finish(request_id)

    def _ahead(self, request_ids: Iterable[str], emitting: int) -> Ahead:
        """What is known of the step that verifies the drafts of these requests; `emitting` as in `_limit`."""
        decoding = sum(not request.is_prefill_chunk for request in self.running)
        left = max(self.max_num_scheduled_tokens - decoding, 0)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        # A request's next token may need a block of its own, and its drafts, which never fill one, another.
        room = left if free >= 2 * decoding else min(left, max(free - decoding, 0))
        needs = {r: self._need(r, emitting) for r in request_ids} if self.controller.objective == "slo" else {}
        return Ahead(min(self._unread_prompts(free), left), room, needs)

    def _unread_prompts(self, free: int) -> int:
        """Prompt tokens that the next step may read: of prompts half read, and of those that are next in the queue.

        What of the latter stands in the prefix cache is not known yet and counts as unread.
        """
        unread: int = sum(r.num_tokens - r.num_computed_tokens for r in self.running if r.is_prefill_chunk)
        fitting = free * self.block_size
        for request in islice(self.waiting, self.max_num_running_reqs - len(self.running)):
            fitting -= request.num_tokens
            if fitting < 0 or unread >= self.max_num_scheduled_tokens:
                break
            unread += request.num_tokens
        return unread

    def _need(self, request_id: str, emitting: int) -> float:
        """Tokens that the request must emit in the step that verifies its drafts to be on time at its end."""
        deadline_ms = self._options[request_id].token_deadline_ms or self._token_deadline_ms
        first = self._first_token_s.get(request_id)
        if deadline_ms is None or first is None:
            return 0.0
        due = (time.perf_counter() + emitting * self._step_s - first) * 1e3 / deadline_ms
        emitted: int = self.requests[request_id].num_output_tokens - 1 + emitting - 1  # after the first
        return due - emitted

    def _view(self, request_id: str, output: "SchedulerOutput") -> RequestView:
        request = self.requests[request_id]
        return RequestView(
            request_id=request_id,
            context_tokens=request.num_tokens,
            drafting=not request.is_prefill_chunk,
            limit=self._limit(request, emitting=2),
            prefill_tokens=0 if self._decodes(request_id, output) else output.num_scheduled_tokens[request_id],
            domain=self.portfolio.domain_of(request_id),
        )

    def _limit(self, request: "Request", emitting: int) -> int:
        """Longest draft that is of use; `emitting` tokens come without one: the bonus, and that of a step under way."""
        room = min(self.max_model_len - request.num_tokens, request.max_tokens - request.num_output_tokens)
        asked = self._options.get(request.request_id, RequestOptions()).max_speculation
        longest: int = min(self.num_spec_tokens if asked is None else min(asked, self.num_spec_tokens), room - emitting)
        return max(0, longest)

    def _work_of(self, output: "SchedulerOutput") -> StepWork:
        drafts = sum(len(d) for d in output.scheduled_spec_decode_tokens.values())
        self._decoding = [r for r in output.num_scheduled_tokens if self._decodes(r, output)]
        prefill = output.total_num_scheduled_tokens - drafts - len(self._decoding)
        return StepWork(
            requests=len(self._decoding),
            drafts=drafts,
            prefill_tokens=prefill,
            context_tokens=sum(self.requests[r].num_tokens for r in output.num_scheduled_tokens),
            draft_first=int(not self._plan.skip_drafter),
            draft_more=max(self._plan.cap - 1, 0),
            model_first=int(self._plan.model_cap > 0),
            model_read=self._plan.model_read,
            model_more=max(self._plan.model_cap - 1, 0),
        )

    def _decodes(self, request_id: str, output: "SchedulerOutput") -> bool:
        drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
        scheduled: int = output.num_scheduled_tokens[request_id]
        return scheduled == drafts + 1 and self.requests[request_id].num_output_tokens > 0

    def _notes(self) -> StepNotes:
        seconds, tokens, measured = self._last
        self._last = (0.0, 0.0, 0.0)
        return StepNotes(
            skip_drafter=self._plan.skip_drafter,
            one_hot=self._drill.one_hot if self._drilling else self.portfolio.one_hot,
            model_cap=self._plan.model_cap,
            model_for=self._plan.model_for,
            predicted_s=seconds,
            predicted_tokens=tokens,
            measured_s=measured,
            plain_s=self._plain_s,
            step_error=self.controller.step_time.median_error(),
            step_costs=self.controller.step_time.costs,
            drafts_version=self._version or 0,
            first_drafts=self.portfolio.take_first_drafts(),
            began=self._began,
            model_version=self._model_version or 0,
            model_first_drafts=self.portfolio.take_first_drafts(MODEL),
        )

    def _observe_time(self, work: StepWork, seconds: float, emitted: int) -> None:
        model = self.controller.step_time
        self._plain_s = model.predict_plain(work, emitted) if model.ready else 0.0
        self._last = (model.predict(work) if model.ready else 0.0, self._expected, seconds)
        self._step_s = seconds
        if self._drilling:
            self._drilled.append((work, seconds))
        self.controller.observe_step(work, seconds)
