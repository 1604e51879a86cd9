"""How likely is an n-gram draft to be accepted? Learned from what such drafts rest on.

Each draft is known to be right or wrong as soon as the target has spoken, whether it was verified or not, so the rates
are learned from every step and need no exploration.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aurora.acceptance import Floats, PositionRates, shrunk

Ints = npt.NDArray[np.int64]

_ORDER_PRIOR = (0.15, 0.3, 0.45, 0.6, 0.7)  # rate of a unanimous draft by the length of the context that decided
_SHARE_EDGES = (0.5, 0.8, 0.999)
_VOTE_EDGES = (1.5, 3.0)
_CELL_MEMORY = 400.0
_CELL_PRIOR = 4.0
_DOMAIN_PRIOR = 8.0
_REQUEST_WEIGHT = 6.0


class DraftBasis(Protocol):
    """What n-gram drafts rest on; arrays of [n] (`drafters.ngram.Basis`)."""

    @property
    def orders(self) -> npt.NDArray[np.int64]: ...
    @property
    def shares(self) -> npt.NDArray[np.float32]: ...
    @property
    def votes(self) -> npt.NDArray[np.float32]: ...


def _prior_rates() -> Floats:
    """Before anything was seen: a rate by context length, times the middle of the share's range; [cells]."""
    shares = [(low + high) / 2 for low, high in pairwise((0.0, *_SHARE_EDGES, 1.0))]
    rates = [order * share for order in _ORDER_PRIOR for share in shares for _ in range(len(_VOTE_EDGES) + 1)]
    return np.array(rates)


_CELL_RATES = _prior_rates()
_CELLS = len(_CELL_RATES)


@dataclass
class ConfidenceModel:
    """Acceptance of n-gram drafts from what each rests on: context length, share of the votes, number of votes.

    The three are cut into cells; a cell's rate is shared, shrunk to a domain's own, and scaled by how the drafts of the
    request at hand have done against expectation so far.
    """

    _shared: PositionRates = field(default_factory=lambda: PositionRates.empty(_CELLS))
    _domains: dict[str, PositionRates] = field(default_factory=dict)
    _requests: dict[str, tuple[str, float, float]] = field(default_factory=dict)  # domain, hits, expected hits

    def start(self, request_id: str, domain: str = "") -> None:
        self._requests[request_id] = (domain, 0.0, 0.0)
        self._domains.setdefault(domain, PositionRates.empty(_CELLS))

    def finish(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def rates(self, request_id: str, basis: "DraftBasis") -> Floats:
        """Conditional acceptance of n drafts in a row, [n]."""
        domain, hits, expected = self._requests[request_id]
        scale = (hits + _REQUEST_WEIGHT) / (expected + _REQUEST_WEIGHT)
        return np.minimum(self._cell_rates(domain, _cells(basis)) * scale, 1.0)

    def observe(self, request_id: str, basis: "DraftBasis", known: int, accepted: int) -> None:
        """The target's tokens are known for the first `known` of these drafts, and the first `accepted` equal them."""
        seen = min(accepted + 1, known)
        if not seen or request_id not in self._requests:
            return
        domain, hits, expected = self._requests[request_id]
        cells = _cells(basis)[:seen]
        expected += float(self._cell_rates(domain, cells).sum())
        self._requests[request_id] = (domain, hits + accepted, expected)
        for j, cell in enumerate(cells):
            for rates in (self._shared, self._domains[domain]):
                rates.hits[cell] *= 1.0 - 1.0 / _CELL_MEMORY
                rates.trials[cell] *= 1.0 - 1.0 / _CELL_MEMORY
                rates.hits[cell] += float(j < accepted)
                rates.trials[cell] += 1.0

    def _cell_rates(self, domain: str, cells: Ints) -> Floats:
        shared = shrunk(self._shared, _CELL_RATES, _CELL_PRIOR)
        return shrunk(self._domains[domain], shared, _DOMAIN_PRIOR)[cells]


def _cells(basis: DraftBasis) -> Ints:
    """Cell of each draft, [n]."""
    order = np.minimum(basis.orders, len(_ORDER_PRIOR)) - 1
    share, votes = np.searchsorted(_SHARE_EDGES, basis.shares), np.searchsorted(_VOTE_EDGES, basis.votes)
    return (order * (len(_SHARE_EDGES) + 1) + share) * (len(_VOTE_EDGES) + 1) + votes
