import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.metrics import METRICS, EngineReport, acceptance_length, merge, per_position_acceptance, tokens_per_s

counts = st.integers(0, 1000)
seconds = st.integers(0, 1 << 20).map(lambda n: n / 1024)  # sums of these are exact
versions = st.integers(0, 3)
by_kind = {
    int: counts,
    float: seconds,
    dict[str, float]: st.dictionaries(st.sampled_from(["draft", "request"]), seconds),
    dict[str, int]: st.dictionaries(st.sampled_from(["target", "ngram"]), counts),
    dict[str, list[int]]: st.dictionaries(st.sampled_from(["", "sql"]), st.lists(counts, min_size=2, max_size=2)),
    list[str]: st.lists(st.sampled_from(["speculation_off", "training_unsaved"]), max_size=2),
    dict[int, int]: st.dictionaries(versions, counts),
    dict[int, list[int]]: st.dictionaries(versions, st.lists(counts, max_size=4)),
    list[int]: st.lists(counts, max_size=5),
}
reports = st.builds(EngineReport, **{f.name: by_kind[f.type] for f in msgspec.structs.fields(EngineReport)})


@given(reports, reports, reports)
def test_merge_is_associative(a, b, c):
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


@given(reports)
def test_an_empty_report_before_changes_nothing(report):
    assert merge(EngineReport(), report) == report


@given(reports)
def test_a_report_survives_transport(report):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=EngineReport) == report
    assert msgspec.convert(msgspec.to_builtins(report), EngineReport) == report


def test_merge_adds_counters_and_keeps_the_latest_readings():
    a = EngineReport(
        steps=2,
        draft_steps={1: 3},
        accepted_at={1: [2]},
        k_histogram=[1],
        step_error=0.5,
        step_costs={"draft": 1.0},
        swaps=1,
        swap_s=2.0,
    )
    b = EngineReport(steps=1, draft_steps={1: 1, 2: 4}, accepted_at={1: [1, 1]}, k_histogram=[0, 2], step_error=0.25)
    merged = merge(a, msgspec.structs.replace(b, drafter_version=2))
    assert merged == EngineReport(
        steps=3,
        draft_steps={1: 4, 2: 4},
        accepted_at={1: [3, 1]},
        k_histogram=[1, 2],
        step_error=0.25,
        step_costs={"draft": 1.0},
        swaps=1,
        swap_s=2.0,
        drafter_version=2,
    )


def test_merge_leaves_its_arguments_alone():
    a, b = (
        EngineReport(k_histogram=[1], accepted_at={1: [1]}),
        EngineReport(k_histogram=[1, 1], accepted_at={1: [2, 3]}),
    )
    merge(a, b)
    assert (a.k_histogram, b.accepted_at) == ([1], {1: [2, 3]})


def test_acceptance_length_of_all_versions_and_of_one():
    report = EngineReport(draft_steps={1: 4, 2: 6}, accepted_tokens={1: 2, 2: 9})
    assert acceptance_length(report) == pytest.approx(2.1)
    assert acceptance_length(report, 1) == pytest.approx(1.5)
    assert acceptance_length(report, 3) is None
    assert acceptance_length(EngineReport()) is None


def test_per_position_acceptance():
    report = EngineReport(verified_at={1: [4, 2], 2: [4, 0, 0]}, accepted_at={1: [2, 1], 2: [4]})
    assert per_position_acceptance(report) == [0.75, 0.5, None]
    assert per_position_acceptance(report, 2) == [1.0, None, None]
    assert per_position_acceptance(report, 3) == []


def test_tokens_per_s():
    report = EngineReport(emitted_tokens=30, busy_s=2.0)
    assert tokens_per_s(report) == pytest.approx(15)
    assert tokens_per_s(report, elapsed_s=10.0) == pytest.approx(3)
    assert tokens_per_s(EngineReport()) is None


def test_metric_names_follow_prometheus_custom():
    for name, metric in METRICS.items():
        assert name.startswith("aurora_")
        assert name.endswith("_total") == (metric.kind == "counter")
        assert metric.help
