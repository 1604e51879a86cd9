import pytest
from prometheus_client import CollectorRegistry, generate_latest

from aurora.metrics import METRICS, EngineReport
from aurora.scrape import acceptance_length, parse_scrape
from serve.exporter import MAX_VERSIONS, PrometheusExporter

REPORT = EngineReport(
    steps=5,
    request_steps=9,
    emitted_tokens=20,
    busy_s=2.0,
    draft_steps={3: 4},
    drafted_tokens={3: 12},
    accepted_tokens={3: 6},
    accepted_at={3: [3, 2, 1]},
    verified_at={3: [4, 4, 4]},
    k_histogram=[5, 0, 0, 4],
    step_error=0.125,
    step_costs={"draft": 0.01},
    predicted_goodput=12.0,
    traces=9,
    traces_dropped=1,
    drafter_version=3,
    swaps=1,
    swap_s=0.25,
)


@pytest.fixture
def registry():
    return CollectorRegistry()


def test_every_metric_is_there_once_it_has_a_value(registry):
    exporter = PrometheusExporter(registry)
    exporter.update(REPORT)
    exporter.inc("aurora_responses_total", {"code": 200})
    exporter.set("aurora_alarm", 0, kind="x")
    for what in ("bytes_total", "failures_total"):
        exporter.inc(f"aurora_store_mirror_{what}", {"kind": "eagle3"})
    for what in ("seconds", "source_alive"):
        exporter.set(f"aurora_store_mirror_{what}", 1, kind="eagle3")
    page = generate_latest(registry).decode()
    for name in METRICS:
        assert f"\n{name}" in page, name


def test_a_report_appears_under_the_names_of_the_table(registry):
    exporter = PrometheusExporter(registry)
    exporter.update(REPORT)
    value = registry.get_sample_value
    assert value("aurora_steps_total") == 5
    assert value("aurora_draft_steps_total", {"version": "3"}) == 4
    assert value("aurora_accepted_at_total", {"version": "3", "position": "2"}) == 1
    assert value("aurora_k_total", {"k": "3"}) == 4
    assert value("aurora_drafter_version") == 3
    assert value("aurora_goodput_tokens_per_s") == 10
    assert value("aurora_predicted_goodput_tokens_per_s") == 12
    assert value("aurora_swap_seconds") == 0.25
    assert value("aurora_step_time_error") == 0.125


def test_an_idle_report_keeps_the_last_readings(registry):
    exporter = PrometheusExporter(registry)
    exporter.update(REPORT)
    exporter.update(EngineReport(drafter_version=4))
    value = registry.get_sample_value
    assert value("aurora_drafter_version") == 4
    assert value("aurora_swap_seconds") == 0.25
    assert value("aurora_goodput_tokens_per_s") == 10
    assert value("aurora_steps_total") == 5


def test_set_and_inc(registry):
    exporter = PrometheusExporter(registry)
    exporter.set("aurora_trainer_alive", 1)
    exporter.inc("aurora_swap_failures_total", {}, 1)
    exporter.inc("aurora_k_total", {"k": 2}, 5)
    value = registry.get_sample_value
    assert value("aurora_trainer_alive") == 1
    assert value("aurora_swap_failures_total") == 1
    assert value("aurora_k_total", {"k": "2"}) == 5


def test_a_second_exporter_in_one_registry_is_refused(registry):
    PrometheusExporter(registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusExporter(registry)


def test_old_versions_leave_the_page_and_the_live_one_stays(registry):
    exporter = PrometheusExporter(registry)
    for version in range(MAX_VERSIONS + 10):
        drafts = {0: 1, version: 1}  # version 0 drafts all the time
        positions = {v: [1, 1] for v in drafts}
        report = EngineReport(
            draft_steps=drafts,
            drafted_tokens=drafts,
            accepted_tokens=drafts,
            accepted_at=positions,
            verified_at=positions,
        )
        exporter.update(report)
    page = generate_latest(registry).decode()
    assert page.count("\naurora_draft_steps_total{") == MAX_VERSIONS
    assert page.count("\naurora_verified_at_total{") == 2 * MAX_VERSIONS
    assert 'aurora_draft_steps_total{version="0"}' in page
    assert 'aurora_draft_steps_total{version="1"}' not in page


def test_what_traffic_reads_is_what_the_exporter_wrote(registry):
    exporter = PrometheusExporter(registry)
    before = parse_scrape(generate_latest(registry).decode())
    exporter.update(REPORT)
    exporter.update(EngineReport(draft_steps={4: 2}, accepted_tokens={4: 6}, drafter_version=4))
    after = parse_scrape(generate_latest(registry).decode())
    assert acceptance_length(before, after) == pytest.approx(1 + 12 / 6)
    assert after.live_version == 4
    assert (after.request_steps, after.emitted) == (9, 20)
