"""What the server process counts beside its engine: latencies, rollbacks, refusals, alarms.

All of it is in the process's Prometheus registry already, latencies from vLLM itself; here it is read back as the
difference since the last look, for the reporter.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from prometheus_client import CollectorRegistry

from serve.feedback import Report

LATENCIES = {
    "first_token": "vllm:time_to_first_token_seconds",
    "token": "vllm:inter_token_latency_seconds",
    "request": "vllm:e2e_request_latency_seconds",
}
_COUNTS = {
    "rollbacks": "aurora_rollbacks_total",
    "swap_failures": "aurora_swap_failures_total",
    "refused": "aurora_requests_refused_total",
}
_ALARM = "aurora_alarm"
_QUANTILES = {"p50": 0.5, "p99": 0.99}


class Vitals:
    """Looks at a registry; each look tells of the time since the last one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._before = self._counts()

    def take(self) -> dict[str, Any]:
        """Fields of an `EngineReport`."""
        now, before = self._counts(), self._before
        self._before = now
        new = {key: value - before.get(key, 0.0) for key, value in now.items()}
        counts = {field: int(new.get((name, ""), 0)) for field, name in _COUNTS.items()}
        latencies = {
            f"{what}_{name}": seconds
            for what, metric in LATENCIES.items()
            for name, seconds in _summary(
                {float(edge): count for (n, edge), count in new.items() if n == f"{metric}_bucket"},
                new.get((f"{metric}_sum", ""), 0.0),
            ).items()
        }
        return {**counts, "latency_s": latencies, "alarms": self._alarms()}

    def completed(self, report_to: Report) -> Report:
        """A `report_to` that adds to the engine's counters what is known here."""

        def report(counters: dict[str, Any], time_s: float) -> None:
            report_to(counters | self.take(), time_s)

        return report

    def _counts(self) -> dict[tuple[str, str], float]:
        """(sample, its bucket's edge or "") -> count, summed over all other labels."""
        wanted = [
            *_COUNTS.values(),
            *(f"{metric}{end}" for metric in LATENCIES.values() for end in ("_bucket", "_sum")),
        ]
        found: dict[tuple[str, str], float] = {}
        for family in self._registry.restricted_registry(wanted).collect():
            for sample in family.samples:
                key = sample.name, sample.labels.get("le", "")
                found[key] = found.get(key, 0.0) + sample.value
        return found

    def _alarms(self) -> list[str]:
        families = self._registry.restricted_registry([_ALARM]).collect()
        return sorted(s.labels["kind"] for family in families for s in family.samples if s.value)


def _summary(cumulative: Mapping[float, float], total_s: float) -> dict[str, float]:
    """Mean and quantiles of a histogram, {upper edge: observations up to it}; empty without observations."""
    edges = sorted(cumulative)
    if not edges or not cumulative[edges[-1]]:
        return {}
    counts = [cumulative[edge] for edge in edges]
    summary = {"mean": total_s / counts[-1]}
    return summary | {name: quantile(edges, counts, share) for name, share in _QUANTILES.items()}


def quantile(edges: Sequence[float], cumulative: Sequence[float], share: float) -> float:
    """As PromQL's `histogram_quantile`: linear within a bucket, the last finite edge beyond all of them.

    edges: ascending, the last one infinite; cumulative: observations up to each, the last one above 0.
    """
    rank = share * cumulative[-1]
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *zip(edges, cumulative, strict=True)]):
        if count >= rank and count > below:
            return low if high == float("inf") else low + (high - low) * (rank - below) / (count - below)
    return edges[-2]
