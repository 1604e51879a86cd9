from aurora.alerts import Alert, AlertRules
from aurora.metrics import EngineReport

QUIET = EngineReport()


def kinds(alerts: list[Alert]) -> list[str]:
    return [alert.kind for alert in alerts]


def test_a_condition_is_told_when_it_begins():
    rules = AlertRules(every_s=1.0)
    drifting = EngineReport(drift=1, drafter_version=3, alarms=["training_unsaved"])
    first = rules.observe(drifting, 0, 0.0)
    assert kinds(first) == ["drift", "training_unsaved"]
    assert "version 3" in first[0].text
    assert [alert.error for alert in first] == [False, True]
    assert rules.observe(drifting, 0, 10.0) == []
    assert rules.observe(QUIET, 0, 20.0) == []
    assert kinds(rules.observe(EngineReport(drift=1), 0, 30.0)) == ["drift"]


def test_events_are_told_once_in_a_while_and_what_was_held_back_is_counted():
    rules = AlertRules(every_s=100.0)
    worse = EngineReport(rollbacks=1)
    assert kinds(rules.observe(worse, 0, 0.0)) == ["rollback"]
    assert rules.observe(worse, 0, 50.0) == rules.observe(worse, 0, 99.0) == []
    assert kinds(rules.observe(EngineReport(swap_failures=1), 0, 99.5)) == ["swap_failure"], "kinds do not share"
    (told,) = rules.observe(worse, 0, 100.0)
    assert told.text.endswith("(2 more since the last message)")


def test_a_few_lost_traces_are_no_news():
    rules = AlertRules(every_s=1.0)
    assert rules.observe(EngineReport(traces=999, traces_dropped=1), 0, 0.0) == []
    assert kinds(rules.observe(EngineReport(traces=900, traces_dropped=100), 2, 1.0)) == [
        "traces_dropped",
        "rows_dropped",
    ]


def drafting(accepted_per_step: float, steps: int = 100) -> EngineReport:
    return EngineReport(draft_steps={1: steps}, accepted_tokens={1: int(steps * accepted_per_step)})


def test_an_acceptance_that_collapses_is_told_once():
    rules = AlertRules(every_s=1.0)
    told = [alert for at in range(300) for alert in rules.observe(drafting(1.5), 0, float(at))]
    assert told == []
    told = [(at, alert) for at in range(300, 330) for alert in rules.observe(drafting(0.5), 0, float(at))]
    assert kinds([alert for _, alert in told]) == ["acceptance_collapse"]
    assert 305 <= told[0][0] < 325, "after about a thousand verifications"


def test_a_small_fall_and_a_young_server_are_left_alone():
    rules = AlertRules(every_s=1.0)
    values = [1.5] * 20 + [0.2] * 20 + [1.5] * 400 + [1.1] * 200
    assert [alert for at, value in enumerate(values) for alert in rules.observe(drafting(value), 0, float(at))] == []
