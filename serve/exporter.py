"""The `aurora_*` metrics of one server process, in a Prometheus registry."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from aurora.metrics import METRICS, EngineReport, tokens_per_s

MAX_VERSIONS = 64  # drafter versions that keep series of their own

_COUNTERS = {
    "aurora_steps_total": "steps",
    "aurora_request_steps_total": "request_steps",
    "aurora_emitted_tokens_total": "emitted_tokens",
    "aurora_prefill_tokens_total": "prefill_tokens",
    "aurora_busy_seconds_total": "busy_s",
    "aurora_skipped_draft_steps_total": "skipped_draft_steps",
    "aurora_predicted_seconds_total": "predicted_s",
    "aurora_measured_seconds_total": "measured_s",
    "aurora_plain_seconds_total": "plain_s",
    "aurora_capture_seconds_total": "capture_s",
    "aurora_traces_total": "traces",
    "aurora_trace_bytes_total": "trace_bytes",
    "aurora_traces_dropped_total": "traces_dropped",
    "aurora_swaps_total": "swaps",
}
_BY_VERSION = {
    "aurora_draft_steps_total": "draft_steps",
    "aurora_drafted_tokens_total": "drafted_tokens",
    "aurora_accepted_tokens_total": "accepted_tokens",
}
_BY_POSITION = {"aurora_accepted_at_total": "accepted_at", "aurora_verified_at_total": "verified_at"}


class PrometheusExporter:
    """Collectors for every name in `METRICS`, filled from engine reports and by the server itself.

    Series of the versions that drafted longest ago are removed beyond `MAX_VERSIONS`, so a server that learns for weeks
    does not grow its /metrics page without bound.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Raises ValueError if `registry` already holds one of the names."""
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._versions: dict[int, None] = {}  # in order of their last draft
        self._positions = 0
        for name, metric in METRICS.items():
            if metric.kind == "gauge":
                self._gauges[name] = Gauge(
                    name, metric.help, metric.labels, registry=registry, multiprocess_mode="mostrecent"
                )
            else:
                self._counters[name] = Counter(name, metric.help, metric.labels, registry=registry)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of `METRICS`; `labels` names all of its labels."""
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def inc(self, name: str, labels: Mapping[str, object], value: float = 1) -> None:
        """Add `value` (>= 0) to a counter of `METRICS`; `labels` names all of its labels."""
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(value)

    def update(self, report: EngineReport) -> None:
        """Add what happened since the previous report."""
        for name, field in _COUNTERS.items():
            self.inc(name, {}, getattr(report, field))
        self._add_speculation(report)
        self._set_gauges(report)
        self._forget_old(report)

    def _add_speculation(self, report: EngineReport) -> None:
        for k, count in enumerate(report.k_histogram):
            self.inc("aurora_k_total", {"k": k}, count)
        for name, field in _BY_VERSION.items():
            for version, count in getattr(report, field).items():
                self.inc(name, {"version": version}, count)
        for name, field in _BY_POSITION.items():
            for version, counts in getattr(report, field).items():
                self._positions = max(self._positions, len(counts))
                for position, count in enumerate(counts):
                    self.inc(name, {"version": version, "position": position}, count)

    def _set_gauges(self, report: EngineReport) -> None:
        self.set("aurora_drafter_version", report.drafter_version)
        self.set("aurora_traces_waiting", report.traces_waiting)
        if report.steps:
            self.set("aurora_step_time_error", report.step_error)
        for part, seconds in report.step_costs.items():
            self.set("aurora_step_cost_seconds", seconds, part=part)
        if report.swaps:
            self.set("aurora_swap_seconds", report.swap_s)
        if report.predicted_goodput:
            self.set("aurora_predicted_goodput_tokens_per_s", report.predicted_goodput)
        goodput = tokens_per_s(report)
        if goodput is not None:
            self.set("aurora_goodput_tokens_per_s", goodput)

    def _forget_old(self, report: EngineReport) -> None:
        for version in report.draft_steps:
            self._versions.pop(version, None)
            self._versions[version] = None
        while len(self._versions) > MAX_VERSIONS:
            version = next(iter(self._versions))
            del self._versions[version]
            for name in _BY_VERSION:
                self._counters[name].remove(version)
            for name in _BY_POSITION:
                for position in range(self._positions):
                    self._counters[name].remove(version, position)
