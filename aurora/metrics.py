"""What an engine counted between two reports, how reports add up, and the Prometheus names they appear under.

Positions count from 0: position j is the (j+1)-th drafted token of a verification step. Times are in seconds.
"""

from typing import Any, Literal, NamedTuple

import msgspec


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one engine since its previous report; made in the vLLM worker, added up by everyone else."""

    steps: int = 0
    request_steps: int = 0  # decode steps summed over requests, those with k = 0 included
    emitted_tokens: int = 0  # the first of each answer, which the end of its prompt emits, included
    prefill_tokens: int = 0
    busy_s: float = 0.0  # engine time spent in steps
    draft_steps: dict[int, int] = {}  # by drafter version: verification steps with at least one draft
    drafted_tokens: dict[int, int] = {}  # by drafter version
    accepted_tokens: dict[int, int] = {}  # by drafter version
    accepted_at: dict[int, list[int]] = {}  # by drafter version, by position: times the draft was accepted
    verified_at: dict[int, list[int]] = {}  # by drafter version, by position: times it was verified
    first_drafts: dict[int, list[int]] = {}  # by drafter version: drafts made, and those whose first token was right
    accepted_by_domain: dict[str, list[int]] = {}  # by domain: drafted tokens verified, and those accepted
    tokens_by_source: dict[str, int] = {}  # emitted tokens by who wrote them, in the names of `aurora.trace.SOURCES`
    k_histogram: list[int] = []  # [k]: request steps with a draft of length k
    predicted_s: float = 0.0  # step time that the model predicted, over the steps that it predicted
    measured_s: float = 0.0  # what the same steps took
    plain_s: float = 0.0  # what the model predicts for the same tokens without speculation, over these steps
    predicted_goodput: float = 0.0  # tokens/s of engine time that the goodput rule expects; 0 while it cannot tell
    step_error: float = 0.0  # median |predicted - measured| / measured; the latest window's
    step_costs: dict[str, float] = {}  # seconds of each part of a step, as last fitted (`aurora.step_time.COSTS`)
    capture_s: float = 0.0  # engine time spent recording traces
    traces: int = 0
    trace_bytes: int = 0
    traces_dropped: int = 0
    traces_waiting: int = 0  # in the sink after the report's own were taken; the latest
    drafter_version: int = 0  # live at the time of the report
    swaps: int = 0
    swap_s: float = 0.0  # engine stall of the last swap
    skipped_draft_steps: int = 0  # steps in which the drafter did not run
    # What the server process knows beside its engine, the latest unless it is a count:
    drift: int = 0  # 1 while the newest traffic is drafted worse than before
    training_share: float = 0.0  # of wall time that the trainer computes
    latency_s: dict[str, float] = {}  # WHAT_MEAN of the requests since the last report (`serve.vitals`)
    alarms: list[str] = []  # kinds that are raised
    rollbacks: int = 0  # live versions taken back
    swap_failures: int = 0  # versions refused by the engine
    refused: int = 0  # requests answered 503


_LATEST = ("drafter_version", "traces_waiting", "drift", "training_share", "alarms")


def merge(earlier: EngineReport, later: EngineReport) -> EngineReport:
    """One report for two consecutive ones. Associative; `EngineReport()` is its left identity.

    Counters add up. Version, waiting traces, drift, training share and alarms are the later one's; `step_error`,
    `step_costs`, `swap_s`, `predicted_goodput` and `latency_s` are those of the last report that had a step, a fit, a
    swap, a prediction or an answer.
    """
    added = [f for f in EngineReport.__struct_fields__ if f not in _LATEST]
    merged = {f: _add(getattr(earlier, f), getattr(later, f)) for f in added}
    merged |= {f: getattr(later, f) for f in _LATEST}
    merged["step_error"] = (earlier if earlier.steps and not later.steps else later).step_error
    merged["step_costs"] = later.step_costs or earlier.step_costs
    merged["latency_s"] = later.latency_s or earlier.latency_s
    merged["swap_s"] = (earlier if earlier.swaps and not later.swaps else later).swap_s
    merged["predicted_goodput"] = later.predicted_goodput or earlier.predicted_goodput
    return EngineReport(**merged)


def _add(a: Any, b: Any) -> Any:
    """a + b for numbers, element by element for lists (the shorter one padded with 0) and dicts."""
    if isinstance(a, dict):
        return {key: _add(a[key], b[key]) if key in a and key in b else (a | b)[key] for key in a | b}
    if isinstance(a, list):
        short, long = sorted((a, b), key=len)
        return [x + y for x, y in zip(long, short + [0] * (len(long) - len(short)), strict=True)]
    return a + b


def _count(by_version: dict[int, int], version: int | None) -> int:
    return sum(by_version.values()) if version is None else by_version.get(version, 0)


def acceptance_length(report: EngineReport, version: int | None = None) -> float | None:
    """Tokens emitted per verification step that had drafts: 1 + accepted / draft steps; None without such steps.

    version: drafter version to look at; None for all of them.
    """
    steps = _count(report.draft_steps, version)
    return 1 + _count(report.accepted_tokens, version) / steps if steps else None


def per_position_acceptance(report: EngineReport, version: int | None = None) -> list[float | None]:
    """Share of the drafts verified at each position that were accepted; None at positions never verified."""
    verified = _positions(report.verified_at, version)
    accepted = _add(_positions(report.accepted_at, version), [0] * len(verified))
    return [a / v if v else None for a, v in zip(accepted, verified, strict=False)]


def _positions(by_version: dict[int, list[int]], version: int | None) -> list[int]:
    if version is not None:
        return by_version.get(version, [])
    total: list[int] = []
    for counts in by_version.values():
        total = _add(total, counts)
    return total


def tokens_per_s(report: EngineReport, elapsed_s: float | None = None) -> float | None:
    """Emitted tokens per second: of engine time (the measured goodput), or of `elapsed_s`. None if no time passed."""
    seconds = report.busy_s if elapsed_s is None else elapsed_s
    return report.emitted_tokens / seconds if seconds > 0 else None


def speed_up(report: EngineReport) -> float | None:
    """Estimated speed against no speculation: predicted plain time over measured time of the same tokens, or None."""
    return report.plain_s / report.measured_s if report.plain_s > 0 and report.measured_s > 0 else None


class Metric(NamedTuple):
    """One Prometheus metric."""

    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


_VERSION = ("version",)
_POSITION = ("version", "position")
_KIND = ("kind",)

METRICS: dict[str, Metric] = {
    "aurora_steps_total": Metric("counter", "Engine steps"),
    "aurora_request_steps_total": Metric("counter", "Decode steps summed over requests, undrafted ones included"),
    "aurora_emitted_tokens_total": Metric("counter", "Tokens emitted, the first of each answer included"),
    "aurora_prefill_tokens_total": Metric("counter", "Prompt tokens computed"),
    "aurora_busy_seconds_total": Metric("counter", "Engine time spent in steps"),
    "aurora_draft_steps_total": Metric("counter", "Verification steps with at least one draft", _VERSION),
    "aurora_drafted_tokens_total": Metric("counter", "Drafted tokens verified", _VERSION),
    "aurora_accepted_tokens_total": Metric("counter", "Drafted tokens accepted", _VERSION),
    "aurora_accepted_at_total": Metric("counter", "Drafts accepted, by position from 0", _POSITION),
    "aurora_verified_at_total": Metric("counter", "Drafts verified, by position from 0", _POSITION),
    "aurora_k_total": Metric("counter", "Request steps by speculation length", ("k",)),
    "aurora_skipped_draft_steps_total": Metric("counter", "Steps in which the drafter did not run"),
    "aurora_predicted_seconds_total": Metric("counter", "Step time predicted by the step-time model"),
    "aurora_measured_seconds_total": Metric("counter", "Step time measured over the predicted steps"),
    "aurora_plain_seconds_total": Metric("counter", "Step time predicted for the same tokens without speculation"),
    "aurora_step_time_error": Metric("gauge", "Median relative error of the step-time model"),
    "aurora_step_cost_seconds": Metric("gauge", "Fitted seconds of each part of a step", ("part",)),
    "aurora_goodput_tokens_per_s": Metric("gauge", "Emitted tokens per second of engine time, last report"),
    "aurora_predicted_goodput_tokens_per_s": Metric("gauge", "The same as the goodput rule predicted it"),
    "aurora_capture_seconds_total": Metric("counter", "Engine time spent recording traces"),
    "aurora_traces_total": Metric("counter", "Traces captured"),
    "aurora_trace_bytes_total": Metric("counter", "Bytes of traces captured"),
    "aurora_traces_dropped_total": Metric("counter", "Traces dropped because too many waited for the trainer"),
    "aurora_traces_unlogged_total": Metric("counter", "Traces that `capture.log_dir` did not take"),
    "aurora_traces_waiting": Metric("gauge", "Traces that wait in the sink"),
    "aurora_trace_bytes_waiting": Metric("gauge", "Bytes of traces that have left the sink and wait for the trainer"),
    "aurora_drafter_version": Metric("gauge", "Drafter version that is live"),
    "aurora_draft_model_version": Metric("gauge", "Draft model version that is live"),
    "aurora_swaps_total": Metric("counter", "Drafter versions swapped in"),
    "aurora_swap_failures_total": Metric("counter", "Swaps refused or rolled back"),
    "aurora_rollbacks_total": Metric("counter", "Live versions taken back because they drafted worse"),
    "aurora_store_mirror_bytes_total": Metric("counter", "Bytes of drafters that came from the trainer's node", _KIND),
    "aurora_store_mirror_failures_total": Metric("counter", "Tries to fetch drafters from there that failed", _KIND),
    "aurora_store_mirror_seconds": Metric("gauge", "Time in which the last drafter came from there", _KIND),
    "aurora_store_mirror_source_alive": Metric("gauge", "1 while the trainer's drafter store answers, else 0", _KIND),
    "aurora_swap_seconds": Metric("gauge", "Engine stall of the last swap"),
    "aurora_learning": Metric("gauge", "1 if a trainer belongs to this server, else 0"),
    "aurora_trainer_alive": Metric("gauge", "1 while the trainer answers, else 0"),
    "aurora_training_share": Metric("gauge", "Share of wall time that the trainer computed, about the last minute's"),
    "aurora_alarm": Metric("gauge", "1 while something is wrong that does not right itself, else 0", ("kind",)),
    "aurora_report_rows_dropped_total": Metric("counter", "Rows that W&B or a dead reporter did not take"),
    "aurora_requests_refused_total": Metric("counter", "Requests answered 503: too many are open, or a stop"),
    "aurora_responses_total": Metric(
        "counter", "HTTP answers by status, those that never reach vLLM included", ("code",)
    ),
    "aurora_drift": Metric("gauge", "1 while the live drafter is worse on the newest traffic than it was, else 0"),
}
