"""How much of the time the trainer may compute, and how much it did.

While requests are open it is `trainer.duty` of wall time, while the server is idle all of it. When the server sees
drift it is `trainer.drift_duty` until the gate shows that the drafter has caught up (`_CAUGHT_UP` gates in a row with
no gain worth mentioning), for `trainer.drift_limit_s` at most. A server silent for `SILENCE_S` counts as loaded.

Time is kept as credit, which grows with the share and falls while the trainer computes. Work may begin at credit 0,
and credit never exceeds it: what was not used is gone. So over any time with requests open the trainer computes no more
than the share of it and one unit of work. Times are in seconds of the caller's clock; the budget has none of its own.
"""

import math
from dataclasses import dataclass

from aurora.config import TrainerConfig

SILENCE_S = 30.0
_MEMORY_S = 60.0  # of the measured share
_RESOLUTION_S = 1e-6  # credit that is missed by less is there: sums of floats are not exact
_GAIN = 0.01  # of the acceptance length: less is no gain
_CAUGHT_UP = 2


@dataclass(frozen=True)
class Load:
    """What the server says of itself."""

    busy: bool  # requests are open
    drift: bool  # the live drafter is worse on the newest traffic than it was


class Loads:
    """What several servers say of themselves, as one load; one that was silent for `SILENCE_S` is forgotten."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[float, Load]] = {}

    def told(self, server: str, load: Load, now_s: float) -> Load:
        """The load of all, `server` having said its own."""
        self._of[server] = (now_s, load)
        self._of = {name: (at, said) for name, (at, said) in self._of.items() if now_s - at < SILENCE_S}
        return Load(any(said.busy for _, said in self._of.values()), any(said.drift for _, said in self._of.values()))


class Budget:
    """Keeps one trainer within its share. Bracket each unit of work by `begin` and `end`."""

    def __init__(self, settings: TrainerConfig, now_s: float) -> None:
        self._settings = settings
        self._at_s = now_s  # up to where time is accounted for
        self._load = Load(busy=True, drift=False)
        self._heard_s = -math.inf
        self._raised_until_s = -math.inf
        self._gates = 0  # in a row without gain since drift began
        self._working = False
        self._credit_s = 0.0
        self._computed = 0.0
        self.loaded_s = 0.0  # with requests open
        self.computed_loaded_s = 0.0  # of them spent computing

    def hear(self, load: Load, now_s: float) -> None:
        """The server has said how it is."""
        self._account(now_s)
        if load.drift and not self._load.drift:
            self._raised_until_s, self._gates = now_s + self._settings.drift_limit_s, 0
        self._load, self._heard_s = load, now_s

    def gated(self, candidate: float, live: float, now_s: float) -> None:
        """A gate measured the acceptance lengths of the candidate and of the live drafter."""
        self._account(now_s)
        self._gates = 0 if candidate >= (1 + _GAIN) * live else self._gates + 1
        if self._gates >= _CAUGHT_UP:
            self._raised_until_s = min(self._raised_until_s, now_s)

    def share(self, now_s: float) -> float:
        """Share of the time that may be spent computing; `now_s` is no earlier than what was said last."""
        if self._idle(now_s):
            return 1.0
        return self._settings.drift_duty if self.raised(now_s) else self._settings.duty

    def raised(self, now_s: float) -> bool:
        """Whether drift has raised the share."""
        return now_s < self._raised_until_s

    def begin(self, now_s: float) -> None:
        """A unit of work begins."""
        self._account(now_s)
        self._working = True

    def end(self, now_s: float) -> None:
        """The unit has ended."""
        self._account(now_s)
        self._working = False

    def rest_s(self, now_s: float) -> float:
        """How long the trainer must rest if nothing changes; 0.0 when it may begin."""
        self._account(now_s)
        return -self._credit_s / self.share(now_s) if self._credit_s < -_RESOLUTION_S else 0.0

    def computed_share(self, now_s: float) -> float:
        """Share of wall time that was spent computing, about the last minute's."""
        self._account(now_s)
        return self._computed

    def _idle(self, now_s: float) -> bool:
        return not self._load.busy and now_s < self._heard_s + SILENCE_S

    def _account(self, now_s: float) -> None:
        """Account for the time up to `now_s`; within a stretch between two edges the share is constant."""
        edges = [self._heard_s + SILENCE_S, self._raised_until_s]
        for end_s in [*sorted(edge for edge in edges if self._at_s < edge < now_s), now_s]:
            self._stretch(max(end_s - self._at_s, 0.0))
            self._at_s = end_s

    def _stretch(self, seconds: float) -> None:
        spent = seconds if self._working else 0.0
        self._credit_s = min(self._credit_s + self.share(self._at_s) * seconds - spent, 0.0)
        self._computed = self._working + math.exp(-seconds / _MEMORY_S) * (self._computed - self._working)
        if not self._idle(self._at_s):
            self.loaded_s += seconds
            self.computed_loaded_s += spent
