"""What of a server's reports a person should hear of at once, each kind at most once in a while.

Pure: it is told of reports and of the time, and answers with what to say. The conditions that Prometheus watches are
beside them in `aurora/deploy/prometheus/alerts.yml`; these reach people who have W&B only.
"""

from collections.abc import Iterator
from typing import NamedTuple

from aurora.metrics import EngineReport

_DROPPED = 0.01  # share of the traces of a report that may be lost
# Acceptance collapsed when what drafts gain, over about the last _FAST verifications, is below _COLLAPSED times what
# they gained over about the last _SLOW; it is over when it is back above _RECOVERED times that.
_FAST, _SLOW = 1000, 10_000
_COLLAPSED, _RECOVERED = 0.5, 0.7


class Alert(NamedTuple):
    """Something to tell people."""

    kind: str
    text: str
    error: bool  # else a warning


class AlertRules:
    """Watches one server; each kind is told at most once in `every_s`, and what was held back is counted."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._told_s: dict[str, float] = {}
        self._held_back: dict[str, int] = {}
        self._raised: set[str] = set()  # conditions of the last report
        self._gain = _Collapse()

    def observe(self, report: EngineReport, rows_dropped: int, now_s: float) -> list[Alert]:
        """What the latest report gives to say. rows_dropped: by the reporter, since the last call."""
        self._gain.add(report)
        conditions = dict(_conditions(report, self._gain))
        new = [Alert(kind, *what) for kind, what in conditions.items() if kind not in self._raised]
        self._raised = set(conditions)
        return [told for alert in (*new, *_events(report, rows_dropped)) for told in self._limited(alert, now_s)]

    def _limited(self, alert: Alert, now_s: float) -> Iterator[Alert]:
        last_s = self._told_s.get(alert.kind)
        if last_s is not None and now_s - last_s < self._every_s:
            self._held_back[alert.kind] = self._held_back.get(alert.kind, 0) + 1
            return
        self._told_s[alert.kind] = now_s
        more = self._held_back.pop(alert.kind, 0)
        yield alert._replace(text=f"{alert.text} ({more} more since the last message)") if more else alert


def _conditions(report: EngineReport, gain: "_Collapse") -> Iterator[tuple[str, tuple[str, bool]]]:
    """What holds for a while: told when it begins."""
    if report.drift:
        yield "drift", (f"version {report.drafter_version} drafts worse on the newest traffic than before", False)
    if gain.collapsed:
        yield "acceptance_collapse", (f"{gain.fast:.2f} accepted drafts a verification, {gain.slow:.2f} before", True)
    for kind in report.alarms:
        yield kind, (f"alarm {kind}; see docs/runbook.md", True)


def _events(report: EngineReport, rows_dropped: int) -> Iterator[Alert]:
    """What happened since the last report."""
    if report.rollbacks:
        yield Alert("rollback", f"{report.rollbacks} drafter versions were taken back", True)
    if report.swap_failures:
        yield Alert("swap_failure", f"{report.swap_failures} drafter versions were refused by the engine", True)
    if report.traces_dropped > _DROPPED * (report.traces + report.traces_dropped):
        yield Alert("traces_dropped", f"{report.traces_dropped} traces were lost on the way to the trainer", False)
    if rows_dropped:
        yield Alert("rows_dropped", f"{rows_dropped} rows were not taken by the reporter's sink", False)


class _Collapse:
    """Accepted drafts a verification, over a short and a long time, each step of which fades what was before."""

    def __init__(self) -> None:
        self._steps = 0
        self.fast = self.slow = 0.0
        self.collapsed = False

    def add(self, report: EngineReport) -> None:
        steps, accepted = sum(report.draft_steps.values()), sum(report.accepted_tokens.values())
        if not steps:
            return
        mean = accepted / steps
        first = self._steps == 0
        self._steps += steps
        self.fast = mean if first else self.fast + (mean - self.fast) * min(1.0, steps / _FAST)
        self.slow = mean if first else self.slow + (mean - self.slow) * min(1.0, steps / min(self._steps, _SLOW))
        bound = _RECOVERED if self.collapsed else _COLLAPSED
        self.collapsed = self._steps >= _SLOW and self.fast < bound * self.slow
