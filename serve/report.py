"""Counts what the engine does, in the worker, between two collections."""

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from aurora.metrics import EngineReport
from aurora.trace import TARGET, source_of

if TYPE_CHECKING:
    from serve.capture import StepFact, TraceSink
    from serve.scheduler import StepNotes


class StepCounter:
    """Folds engine steps into an `EngineReport`."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._dropped_before = 0
        self._reset()

    def _reset(self) -> None:
        self._steps = self._request_steps = self._emitted = self._prefill = self._skipped = self._swaps = 0
        self._busy_s = self._predicted_s = self._measured_s = self._step_error = self._predicted_tokens = 0.0
        self._swap_s = self._plain_s = self._capture_s = 0.0
        self._step_costs: dict[str, float] = {}
        self._first_drafts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self._by_domain: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._by_source: Counter[str] = Counter()
        self._k: Counter[int] = Counter()
        self._draft_steps: Counter[int] = Counter()
        self._drafted: Counter[int] = Counter()
        self._accepted: Counter[int] = Counter()
        self._accepted_at: dict[int, Counter[int]] = defaultdict(Counter)
        self._verified_at: dict[int, Counter[int]] = defaultdict(Counter)

    def step(self, facts: "list[StepFact]", notes: "StepNotes | None", capture_s: float = 0.0) -> None:
        """One engine step, of whose time `capture_s` went into recording it."""
        self._capture_s += capture_s
        self._steps += 1
        for rows, k, emitted, version, domain in facts:
            self._emitted += emitted
            self._by_source[TARGET] += min(emitted, 1)
            if rows > k + 1 or not emitted:
                self._prefill += rows
                continue
            self._request_steps += 1
            self._k[k] += 1
            if k:
                self._verification(version, k, emitted - 1)
                self._by_source[source_of(version)] += emitted - 1
                counted = self._by_domain[domain]
                counted[0] += k
                counted[1] += emitted - 1
        if notes is not None:
            self._skipped += notes.skip_drafter
            self._busy_s += notes.measured_s
            self._step_error, self._step_costs = notes.step_error, notes.step_costs
            self._add_first_drafts(notes.drafts_version, *notes.first_drafts)
            self._add_first_drafts(-notes.model_version, *notes.model_first_drafts)
            if notes.predicted_s:
                self._predicted_s += notes.predicted_s
                self._predicted_tokens += notes.predicted_tokens
                self._measured_s += notes.measured_s
                self._plain_s += notes.plain_s

    def _add_first_drafts(self, version: int, drafts: int, right: int) -> None:
        if drafts:
            counted = self._first_drafts[version]
            counted[0] += drafts
            counted[1] += right

    def swapped(self, version: int, seconds: float) -> None:
        """Count a swap; `version` of the neural drafter is live."""
        self._version, self._swaps, self._swap_s = version, self._swaps + 1, seconds

    def take(self, traces: int, trace_bytes: int, sink: "TraceSink | None") -> EngineReport:
        """The report since the last call, `traces` of `trace_bytes` having been taken from the sink."""
        dropped = sink.dropped if sink is not None else 0
        report = EngineReport(
            steps=self._steps,
            request_steps=self._request_steps,
            emitted_tokens=self._emitted,
            prefill_tokens=self._prefill,
            busy_s=self._busy_s,
            draft_steps=dict(self._draft_steps),
            drafted_tokens=dict(self._drafted),
            accepted_tokens=dict(self._accepted),
            accepted_at={v: _dense(c) for v, c in self._accepted_at.items()},
            verified_at={v: _dense(c) for v, c in self._verified_at.items()},
            accepted_by_domain=dict(self._by_domain),
            tokens_by_source={source: count for source, count in self._by_source.items() if count},
            k_histogram=_dense(self._k),
            predicted_s=self._predicted_s,
            measured_s=self._measured_s,
            plain_s=self._plain_s,
            step_error=self._step_error,
            step_costs=self._step_costs,
            first_drafts=dict(self._first_drafts),
            predicted_goodput=self._predicted_tokens / self._predicted_s if self._predicted_s else 0.0,
            capture_s=self._capture_s,
            traces=traces,
            trace_bytes=trace_bytes,
            traces_dropped=dropped - self._dropped_before,
            traces_waiting=len(sink) if sink is not None else 0,
            drafter_version=self._version,
            swaps=self._swaps,
            swap_s=self._swap_s,
            skipped_draft_steps=self._skipped,
        )
        self._dropped_before = dropped
        self._reset()
        return report

    def _verification(self, version: int, k: int, accepted: int) -> None:
        self._draft_steps[version] += 1
        self._drafted[version] += k
        self._accepted[version] += accepted
        self._verified_at[version].update(range(k))
        self._accepted_at[version].update(range(accepted))


def _dense(counts: Counter[int]) -> list[int]:
    return [counts[i] for i in range(max(counts, default=-1) + 1)]
