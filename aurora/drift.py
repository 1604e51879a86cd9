"""Has the traffic moved away from what the live drafter knows? Short against long average of its first drafts.

The first token of a neural draft is known to be right or wrong after the next step, verified or not, so drafts that the
n-gram table's replaced count as well. Time is counted in drafts, taken in blocks: the newest blocks are the short
average, all older ones fade into the long one. It is drift when the short average lies below the long one by `_SIGMAS`
standard errors of their difference (one-sided test of two proportions with one observation of each outcome added,
Agresti & Caffo 2000) and below `_KEEP` times of it.

Drafts of one request resemble each other, so averages vary more than independent drafts would. By how much is measured:
the design effect (Kish 1965) is the mean of the squared deviations of past short averages over what independence
predicts, and widens the standard error by its root.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from aurora.metrics import EngineReport
from aurora.proportion import Proportion

_BLOCK = 50  # drafts
_SHORT = 8  # blocks
_LEAST = 2  # short averages' worth of older drafts before anything is said
_MEMORY = 8000.0  # drafts of the long average
_SIGMAS = 4.5
_ENDED = 2.0  # standard errors below which drift is over
_KEEP = 0.8  # share of the long average that a short one without drift may fall to
_EFFECT = 4.0  # design effect before any was measured ...
_EFFECT_WEIGHT = 1000.0  # ... which counts as much as this many drafts do
_MOST_EFFECT = 16.0


@dataclass
class DriftDetector:
    """Watches the drafts of whatever version is live; a new version begins anew. Tell it of every report."""

    version: int
    drifted: bool = False
    _growing: Proportion = field(default_factory=Proportion)  # the block that is not full yet
    _short: deque[Proportion] = field(default_factory=deque)
    _shown: deque[float] = field(default_factory=deque)  # design effects of the short averages that ended with these
    _long: Proportion = field(default_factory=Proportion)
    _effect: Proportion = field(default_factory=Proportion)  # drafts, and these times their design effect

    def observe(self, report: EngineReport) -> None:
        """Count the live version's first drafts."""
        if report.drafter_version != self.version:
            self._begin_anew(report.drafter_version)
        drafts, right = report.first_drafts.get(self.version, (0, 0))
        self._growing += Proportion(drafts, right)
        if self._growing.trials >= _BLOCK:
            self._take(self._growing)
            self._growing = Proportion()

    def __str__(self) -> str:
        new, usual = self._sum(), self._long
        if not usual.trials:
            return f"little is known of version {self.version}'s drafts yet"
        return (
            f"of the first tokens of version {self.version}'s drafts {new.rate:.2f} of the last {new.trials:.0f} were "
            f"right, {usual.rate:.2f} before"
        )

    def _begin_anew(self, version: int) -> None:
        self.version, self.drifted = version, False
        self._growing = self._long = self._effect = Proportion()
        self._short.clear()
        self._shown.clear()

    def _take(self, block: Proportion) -> None:
        self._short.append(block)
        if len(self._short) > _SHORT:
            self._retire(self._short.popleft())
        if self._long.trials >= _LEAST * _SHORT * _BLOCK:
            self._shown.append(self._show_effect())
            below = self._below()
            self.drifted = below > (_ENDED if self.drifted else _SIGMAS)

    def _retire(self, old: Proportion) -> None:
        """The oldest block becomes past: part of the long average. What it showed counts unless it was drift."""
        self._long = self._long.faded(_keep(old.trials)) + old
        if len(self._shown) >= _SHORT:
            shown = self._shown.popleft()
            if not self.drifted:
                self._effect = self._effect.faded(_keep(old.trials)) + Proportion(old.trials, old.trials * shown)

    def _show_effect(self) -> float:
        """Squared deviation of the short average from the long one, over what independence predicts."""
        short, rate = self._sum(), self._long.rate
        expected = rate * (1 - rate) * (1 / short.trials + 1 / self._long.trials)
        return min((short.right / short.trials - rate) ** 2 / expected, _MOST_EFFECT**2)

    def _sum(self) -> Proportion:
        return sum(self._short, Proportion())

    @property
    def design_effect(self) -> float:
        """Variance of a short average over that of as many independent drafts; between 1 and `_MOST_EFFECT`."""
        seen = self._effect
        mean = (_EFFECT * _EFFECT_WEIGHT + seen.right) / (_EFFECT_WEIGHT + seen.trials)
        return min(max(mean, 1.0), _MOST_EFFECT)

    def _below(self) -> float:
        """Standard errors by which the short average lies below the long one; 0.0 where that does not matter."""
        short, long = self._sum(), self._long
        if short.rate >= _KEEP * long.rate:
            return 0.0
        return (long.rate - short.rate) / math.sqrt(self.design_effect * (short.variance + long.variance))


def _keep(drafts: float) -> float:
    """What a long average keeps of its weight while so many drafts are added to it."""
    return math.exp(-drafts / _MEMORY)
