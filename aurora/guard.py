"""Is the drafter version that was just swapped in worse than the one before it? Judged by live drafts.

The gate has compared them on held-back requests; this catches what the gate cannot see. Both are judged by the first
token of each draft, which is known to be right or wrong after the next step, verified or not. The newer one counts as
worse when its rate of right tokens lies below `_KEEP` times the older one's by `_SIGMAS` standard errors (one-sided
test of two proportions with one observation of each outcome added; Agresti & Caffo 2000).
"""

import math
from dataclasses import dataclass, field

from aurora.metrics import EngineReport
from aurora.proportion import Proportion

_KEEP = 0.9  # share of the older version's acceptance rate that a newer one may not fall below
_SIGMAS = 3.0
_LEAST = 20  # drafts of each before anything is said
_PROBATION = 1000  # drafts after which a version is trusted
_MEMORY = 1000  # drafts of a version that are remembered


def clearly_worse(old: Proportion, new: Proportion) -> bool:
    """Whether a drafter with the first tokens `new` has to give way to one with `old`."""
    return enough(old, new) and shortfall(old, new) >= _SIGMAS


def enough(old: Proportion, new: Proportion) -> bool:
    """Whether there are drafts enough of both to say anything."""
    return min(old.trials, new.trials) >= _LEAST


def shortfall(old: Proportion, new: Proportion) -> float:
    """Standard errors by which `new` lies below what it may not fall below; negative above it."""
    return (_KEEP * old.rate - new.rate) / math.sqrt(_KEEP**2 * old.variance + new.variance)


@dataclass
class VersionGuard:
    """Watches the version `live`; tell it of every report and of every swap.

    sign: -1 for the draft model, whose versions are negative in reports (`aurora.trace`).
    """

    live: int
    sign: int = 1
    _before: int | None = None
    _seen: dict[int, Proportion] = field(default_factory=dict)

    def swapped(self, version: int) -> None:
        """`version` drafts from now on and is on probation against the one before it."""
        self._before, self.live = self.live, version
        self._seen = {v: seen for v, seen in self._seen.items() if v == self._before}

    def observe(self, report: EngineReport) -> None:
        """Count the first drafts of a report."""
        for version, (drafts, right) in report.first_drafts.items():
            if self.sign * version in (self.live, self._before):
                new, seen = Proportion(drafts, right), self._seen.get(self.sign * version, Proportion())
                full = seen.trials + drafts > _MEMORY
                self._seen[self.sign * version] = new + seen.faded(max(0.0, 1.0 - drafts / _MEMORY) if full else 1.0)

    @property
    def worse(self) -> str:
        """Why the live version should go, or "" while there is no reason."""
        old, new = self._seen.get(self._before or 0), self._seen.get(self.live)
        if old is None or new is None or new.trials > _PROBATION or not clearly_worse(old, new):
            return ""
        return (
            f"{new.rate:.2f} of the first tokens of its {new.trials:.0f} drafts were right, "
            f"of version {self._before} {old.rate:.2f}"
        )
