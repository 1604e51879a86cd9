"""How many drafted tokens will the target accept? Estimates per request and draft position, shrunk to shared priors.

Position j's acceptance is conditional: P(draft j+1 accepted | drafts 1..j accepted). A verification of k drafts with a
accepted observes positions 0..a-1 as hits and position a as a miss when a < k; deeper positions stay unseen
(right-censored), and so does everything when k = 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SHARED_MEMORY = 1000.0  # observations of one position after which older ones have faded to 1/e
REQUEST_MEMORY = 24.0
SHARED_PRIOR = 4.0  # pseudo-observations behind the prior below
REQUEST_PRIOR = 12.0  # pseudo-observations with which a request starts at the shared rates
OPTIMISM = 0.6  # rate assumed of a drafter nobody has seen at work
_NEW_VERSION = 0.02  # weight that observations of an older drafter version keep
_GATE_PRIOR = 20.0  # pseudo-observations that a new version's gate result counts for


@dataclass
class PositionRates:
    """Decayed hits and trials per draft position, [k_max] each: a handful, for which lists are faster than arrays."""

    hits: list[float]
    trials: list[float]

    @classmethod
    def empty(cls, k_max: int) -> "PositionRates":
        return cls([0.0] * k_max, [0.0] * k_max)

    def observe(self, k: int, accepted: int, memory: float) -> None:
        """Count one verification of `k` drafts of which the first `accepted` were accepted."""
        fade = 1.0 - 1.0 / memory
        for j in range(min(accepted + 1, k)):
            self.hits[j] = fade * self.hits[j] + (j < accepted)
            self.trials[j] = fade * self.trials[j] + 1.0

    def scale(self, weight: float) -> None:
        """Keep the rates but trust them `weight` times as much."""
        self.hits = [weight * hits for hits in self.hits]
        self.trials = [weight * trials for trials in self.trials]


@dataclass
class AcceptanceModel:
    """Acceptance rates shared by all requests of a domain, and each live request's own, shrunk towards them."""

    k_max: int
    _prior: Floats | None = None
    _domains: dict[str, PositionRates] = field(default_factory=dict)
    _requests: dict[str, tuple[str, PositionRates]] = field(default_factory=dict)

    def start(self, request_id: str, domain: str = "") -> None:
        """Begin to follow a request; it starts at its domain's rates."""
        self._requests[request_id] = (domain, PositionRates.empty(self.k_max))
        self._domains.setdefault(domain, PositionRates.empty(self.k_max))

    def finish(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def observe(self, request_id: str, k: int, accepted: int) -> None:
        """Learn from one verification step; k = 0 teaches nothing."""
        if k == 0 or request_id not in self._requests:
            return
        domain, own = self._requests[request_id]
        own.observe(k, accepted, REQUEST_MEMORY)
        self._domains[domain].observe(k, accepted, SHARED_MEMORY)

    def drafter_changed(self, gated_rates: list[float]) -> None:
        """Another drafter version is live: what is known of the old one counts less.

        gated_rates: conditional acceptance per position that the version's gate measured; empty if there was no gate.
        """
        self._prior = None
        if gated_rates:
            known = np.clip(np.array(gated_rates[: self.k_max]), 0.0, 1.0)
            self._prior = np.concatenate([known, np.full(self.k_max - len(known), known[-1])])
        for rates in self._domains.values():
            rates.scale(_NEW_VERSION)
        for _, rates in self._requests.values():
            rates.scale(_NEW_VERSION)

    def shared_rates(self, domain: str = "") -> Floats:
        """Conditional acceptance per position for a new request of `domain`, [k_max]."""
        rates = self._domains.get(domain) or PositionRates.empty(self.k_max)
        if self._prior is not None:
            return _shrunk([rates], self._prior, _GATE_PRIOR).ravel()
        return _chained(rates, OPTIMISM, SHARED_PRIOR)

    def rates(self, request_id: str) -> Floats:
        """Conditional acceptance per position for a followed request, [k_max]."""
        domain, own = self._requests[request_id]
        return _shrunk([own], self.shared_rates(domain), REQUEST_PRIOR).ravel()

    def gains(self, request_ids: list[str]) -> Floats:
        """Expected extra tokens of each further draft position: cumulative products of the rates, [requests, k_max]."""
        if not request_ids:
            return np.zeros((0, self.k_max))
        followed = [self._requests[r] for r in request_ids]
        shared = {domain: self.shared_rates(domain) for domain in {domain for domain, _ in followed}}
        prior = np.array([shared[domain] for domain, _ in followed])
        return _shrunk([own for _, own in followed], prior, REQUEST_PRIOR).cumprod(axis=1)


def _shrunk(rates: Sequence[PositionRates], prior: Floats, weight: float) -> Floats:
    """Posterior mean of each position's rate under a Beta prior of that mean and weight, [rates, k_max]."""
    hits, trials = np.array([each.hits for each in rates]), np.array([each.trials for each in rates])
    posterior: Floats = (hits + weight * prior) / (trials + weight)
    return posterior


def _chained(rates: PositionRates, first: float, weight: float) -> Floats:
    """Posterior means where a position's prior is the estimate of the one before it."""
    estimate = np.empty(len(rates.hits))
    before = first
    for j in range(len(estimate)):
        before = (rates.hits[j] + weight * before) / (rates.trials[j] + weight)
        estimate[j] = before
    return estimate
