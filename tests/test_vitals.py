import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from aurora.metrics import EngineReport
from serve.exporter import PrometheusExporter
from serve.vitals import LATENCIES, Vitals, quantile

INFINITE = float("inf")


@pytest.fixture
def registry():
    return CollectorRegistry()


def test_it_tells_of_the_time_since_the_last_look(registry):
    exporter = PrometheusExporter(registry)
    latency = Histogram(LATENCIES["first_token"], "d", ["engine"], buckets=(0.1, 1.0), registry=registry)
    exporter.inc("aurora_rollbacks_total", {}, 2)
    latency.labels("0").observe(50.0)
    vitals = Vitals(registry)
    for seconds in (0.05, 0.05, 0.5, 0.5):
        latency.labels("1").observe(seconds)
    exporter.inc("aurora_rollbacks_total", {}, 1)
    exporter.inc("aurora_requests_refused_total", {}, 3)
    exporter.set("aurora_alarm", 1, kind="speculation_off")
    exporter.set("aurora_alarm", 0, kind="training_unsaved")
    taken = vitals.take()
    assert EngineReport(**taken) == EngineReport(
        rollbacks=1,
        refused=3,
        alarms=["speculation_off"],
        latency_s={
            "first_token_mean": pytest.approx(0.275),
            "first_token_p50": pytest.approx(0.1),
            "first_token_p99": pytest.approx(0.1 + 0.9 * 0.98),
        },
    )
    assert vitals.take() == {
        "rollbacks": 0, "swap_failures": 0, "refused": 0, "latency_s": {}, "alarms": ["speculation_off"]
    }  # fmt: skip


def test_a_report_is_completed_with_it(registry):
    PrometheusExporter(registry).inc("aurora_swap_failures_total", {}, 0)
    rows = []
    Vitals(registry).completed(lambda counters, time_s: rows.append((counters, time_s)))({"steps": 4}, 7.0)
    ((counters, time_s),) = rows
    assert (counters["steps"], counters["swap_failures"], time_s) == (4, 0, 7.0)


def test_an_empty_registry_says_nothing(registry):
    assert EngineReport(**Vitals(registry).take()) == EngineReport()


@given(st.lists(st.floats(0, 3), min_size=1, max_size=50), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(seconds, share):
    edges = [0.5, 1.0, 2.0, INFINITE]
    cumulative = [sum(s <= edge for s in seconds) for edge in edges]
    found = quantile(edges, cumulative, share)
    rank = share * len(seconds)
    true = next(s for n, s in enumerate(sorted(seconds), 1) if n >= rank)
    bucket = next(i for i, edge in enumerate(edges) if true <= edge)
    low = edges[bucket - 1] if bucket else 0.0
    assert low <= found <= min(edges[bucket], 2.0) or found == 2.0 == edges[-2] < true
