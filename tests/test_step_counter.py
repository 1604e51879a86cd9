"""What an engine report says of who wrote the tokens, and of each domain's drafts."""

from types import SimpleNamespace

import pytest

from aurora.metrics import speed_up
from serve.capture import StepFact
from serve.report import StepCounter


def test_tokens_are_counted_by_who_wrote_them_and_drafts_by_domain() -> None:
    counter = StepCounter(2)
    facts = [
        StepFact(rows=4, k=3, emitted=3, version=2, domain="sql"),
        StepFact(rows=3, k=2, emitted=3, version=0, domain="sql"),
        StepFact(rows=3, k=2, emitted=1, version=-1),
        StepFact(rows=1, k=0, emitted=1, version=2, domain="sql"),
        StepFact(rows=30, k=0, emitted=1, version=2),  # the end of a prompt
        StepFact(rows=30, k=0, emitted=0, version=2),
    ]
    counter.step(facts, None)
    report = counter.take(0, 0, None)
    assert report.tokens_by_source == {"target": 5, "eagle3": 2, "ngram": 2}
    assert sum(report.tokens_by_source.values()) == report.emitted_tokens
    assert report.accepted_by_domain == {"sql": [5, 4], "": [2, 0]}
    assert counter.take(0, 0, None).tokens_by_source == {}


@pytest.mark.parametrize(("predicted_s", "expected"), [(0.05, 1.5), (0.0, None)])
def test_plain_time_counts_over_the_steps_that_were_predicted(predicted_s: float, expected: float | None) -> None:
    notes = SimpleNamespace(
        skip_drafter=False,
        predicted_s=predicted_s,
        predicted_tokens=2.0,
        measured_s=0.06,
        plain_s=0.09,
        step_error=0.1,
        step_costs={},
        drafts_version=1,
        first_drafts=(0, 0),
        model_version=0,
        model_first_drafts=(0, 0),
    )
    counter = StepCounter(1)
    counter.step([], notes)
    assert speed_up(counter.take(0, 0, None)) == (expected and pytest.approx(expected))
