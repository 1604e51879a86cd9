"""A new drafter version is tried by one replica, the canary, before the others take it.

The canary drafts with the version on trial while all others go on with the one approved before, on the same traffic at
the same time, so that a shift of the traffic is not mistaken for a worse drafter. The first token of each draft is
known to be right or wrong after the next step. The version is refused when its rate is clearly worse than the others'
as `aurora.guard` judges it, and approved when both have drafts enough, some of them right, and it is not below what it
has to keep. What is undecided after the longest trial is refused if it lies more than a standard error below, else
approved: the gate has compared the two before, on held-back traces. While one is on trial newer ones wait; only the
newest is tried next, at once where the canary's own guard (`aurora.guard`) has taken this one back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from aurora.guard import clearly_worse, enough, shortfall
from aurora.proportion import Proportion

_ENOUGH = 100  # drafts of each side
_RIGHT = 10  # of one side: where next to nothing is right yet, the two rates are the prior's


@dataclass
class Rollout:
    """Decides for one kind of drafter which version each replica may use. Times: seconds of the caller's clock."""

    limit_s: float  # longest trial
    approved: int = 0  # the newest version that every replica may use
    _trial: int = 0  # 0: none
    _since_s: float = 0.0
    _canary: str = ""  # who was given the version on trial
    _drafted: str = ""  # who has drafted with it
    _refused: set[int] = field(default_factory=set)
    _new: Proportion = field(default_factory=Proportion)
    _old: Proportion = field(default_factory=Proportion)

    def allowed(self, replica: str, replicas: Iterable[str], live: int, latest: int, now_s: float) -> int:
        """The newest version that `replica` may use, one of `replicas` that are up.

        live: what it uses now; 0: nothing yet. latest: the store's newest that is not rejected.
        """
        names = sorted(replicas)
        self.approved = self.approved or live
        if not self.approved or latest <= self.approved or len(names) < 2:
            self.approved, self._trial = latest, 0  # the first one, a way back, or nobody to compare with
            return latest
        if replica != names[0]:
            self._settle(now_s)
            return self.approved
        if self._drafted == replica and 0 < live != self._trial:
            self._refused.add(self._trial)  # its own guard took it back
        if not self._trial or self._trial in self._refused or self._trial > latest:
            self._trial, self._since_s = (0, 0.0) if latest in self._refused else (latest, now_s)
            self._new = self._old = Proportion()
            self._drafted = ""
        self._canary = replica
        self._settle(now_s)
        return self._trial or self.approved

    def observe(self, live: int, first_drafts: Mapping[int, tuple[int, int]]) -> None:
        """A replica whose live version is `live` says (drafts, right ones) of first tokens, by version."""
        for version, (drafts, right) in first_drafts.items():
            if version == self._trial:
                self._new += Proportion(drafts, right)
                self._drafted = self._canary
            elif version == live == self.approved:
                self._old += Proportion(drafts, right)

    def refuses(self, version: int, now_s: float) -> str:
        """Why the version on trial has to go, or ""."""
        if version != self._trial or not self._fails(now_s):
            return ""
        self._refused.add(version)
        return (
            f"canary: {self._new.rate:.2f} of the first tokens of its {self._new.trials:.0f} drafts were right, of "
            f"version {self.approved}'s at the same time {self._old.rate:.2f}"
        )

    def _fails(self, now_s: float) -> bool:
        doubtful = enough(self._old, self._new) and shortfall(self._old, self._new) > 1
        return clearly_worse(self._old, self._new) or (doubtful and self._late(now_s))

    def _late(self, now_s: float) -> bool:
        return now_s - self._since_s >= self.limit_s

    def _settle(self, now_s: float) -> None:
        """Approve what has passed."""
        if not self._trial or self._trial in self._refused or self._fails(now_s):
            return
        right = max(self._new.right, self._old.right) >= _RIGHT
        seen = right and min(self._new.trials, self._old.trials) >= _ENOUGH
        if self._late(now_s) or (seen and shortfall(self._old, self._new) <= 0):
            self.approved, self._trial = self._trial, 0
