"""vLLM's scheduler with a speculation length for each request (seam: `--scheduler-cls`, vLLM 0.32-0.33, synchronous).

`schedule` asks the controller what to draft at the end of the step it returns; `num_spec_tokens_to_schedule` caps the
drafter at the longest; `update_draft_token_ids` cuts each request's drafts to its own length before they are verified.
Notes to and from the worker ride on the objects that vLLM sends between the two anyway.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

from aurora.controller import Plan, RequestView, SpeculationController
from aurora.goodput import StepWork

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

NOTES = "aurora_notes"


@dataclass(frozen=True)
class StepNotes:
    """Scheduler to worker: the plan for this step's drafting, and how the step before it went."""

    skip_drafter: bool
    predicted_s: float  # of the previous step; 0.0 if unknown
    predicted_tokens: float  # expected of the previous step, of its decoding requests
    measured_s: float  # of the previous step; 0.0 if there was none
    step_error: float  # median absolute relative error of the step-time model


@dataclass(frozen=True)
class DraftNotes:
    """Worker to scheduler, with the drafts."""

    version: int  # drafter version that made them
    gated_rates: list[float]  # conditional acceptance per position from that version's gate
    real: bool  # False: vLLM filled in placeholder drafts (sequence at the model's length limit)


class AuroraScheduler(Scheduler):
    """One draft length for each request and step, from 0 to k_max."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.vllm_config.additional_config["aurora"]
        self.controller = SpeculationController(
            k_max=self.num_spec_tokens, fixed_k=settings["fixed_k"], exploration=settings["exploration"]
        )
        self._plan = Plan({}, False, 0.0)
        self._work: StepWork | None = None
        self._started_s = 0.0
        self._expected = 0.0  # tokens that the running step should emit
        self._last = (0.0, 0.0, 0.0)  # the last step: predicted seconds and tokens, measured seconds
        self._version: int | None = None

    def schedule(self, throttle_prefills: bool = False) -> "SchedulerOutput":
        output = super().schedule(throttle_prefills)
        self.controller.finish(output.finished_req_ids)
        if not output.total_num_scheduled_tokens:
            return output
        self._expected = self._plan.expected_tokens
        self._plan = self.controller.plan([self._view(r, output) for r in output.num_scheduled_tokens])
        output.num_spec_tokens_to_schedule = self._plan.cap
        self._work = self._work_of(output)
        setattr(output, NOTES, self._notes())
        self._started_s = time.perf_counter()
        return output

    def update_from_output(self, scheduler_output: "SchedulerOutput", model_runner_output: "ModelRunnerOutput") -> Any:
        if self._work is not None:
            self._observe_time(self._work, time.perf_counter() - self._started_s)
            self._observe_acceptance(scheduler_output, model_runner_output)
            self._work = None
        return super().update_from_output(scheduler_output, model_runner_output)

    def update_draft_token_ids(self, draft_token_ids: "DraftTokenIds") -> None:
        notes: DraftNotes | None = getattr(draft_token_ids, NOTES, None)
        if notes is not None and notes.version != self._version:
            if self._version is not None:
                self.controller.drafter_changed(notes.gated_rates)
            self._version = notes.version
        real = notes is None or notes.real
        for i, request_id in enumerate(draft_token_ids.req_ids):
            length = self._plan.lengths.get(request_id, 0) if real else 0
            draft_token_ids.draft_token_ids[i] = draft_token_ids.draft_token_ids[i][:length]
        super().update_draft_token_ids(draft_token_ids)

    def _view(self, request_id: str, output: "SchedulerOutput") -> RequestView:
        request = self.requests[request_id]
        room = self.max_model_len - request.num_tokens - 2
        left = request.max_tokens - request.num_output_tokens - 2  # the token of this step and the bonus need no draft
        return RequestView(
            request_id=request_id,
            context_tokens=request.num_tokens,
            drafting=not request.is_prefill_chunk,
            limit=max(0, min(self.num_spec_tokens, room, left)),
            prefill_tokens=0 if self._decodes(request_id, output) else output.num_scheduled_tokens[request_id],
        )

    def _work_of(self, output: "SchedulerOutput") -> StepWork:
        drafts = sum(len(d) for d in output.scheduled_spec_decode_tokens.values())
        decoding = [r for r in output.num_scheduled_tokens if self._decodes(r, output)]
        prefill = output.total_num_scheduled_tokens - drafts - len(decoding)
        cap = output.num_spec_tokens_to_schedule
        return StepWork(
            requests=len(decoding),
            drafts=drafts,
            prefill_tokens=prefill,
            context_tokens=sum(self.requests[r].num_tokens for r in output.num_scheduled_tokens),
            draft_first=int(not self._plan.skip_drafter),
            draft_more=max(cap - 1, 0),
        )

    def _decodes(self, request_id: str, output: "SchedulerOutput") -> bool:
        drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
        scheduled: int = output.num_scheduled_tokens[request_id]
        return scheduled == drafts + 1 and self.requests[request_id].num_output_tokens > 0

    def _notes(self) -> StepNotes:
        seconds, tokens, measured = self._last
        self._last = (0.0, 0.0, 0.0)
        error = self.controller.step_time.median_error()
        return StepNotes(self._plan.skip_drafter, seconds, tokens, measured, error)

    def _observe_time(self, work: StepWork, seconds: float) -> None:
        model = self.controller.step_time
        self._last = (model.predict(work) if model.ready else 0.0, self._expected, seconds)
        self.controller.observe_step(work, seconds)

    def _observe_acceptance(self, output: "SchedulerOutput", result: "ModelRunnerOutput") -> None:
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            index = result.req_id_to_index.get(request_id)
            if index is not None and drafts:
                accepted = max(len(result.sampled_token_ids[index]) - 1, 0)
                self.controller.observe_verification(request_id, len(drafts), accepted)
