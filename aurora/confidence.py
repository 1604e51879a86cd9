"""How likely is an n-gram draft to be accepted? Learned from what such drafts rest on.

Each draft is known to be right or wrong as soon as the target has spoken, whether it was verified or not, so the rates
are learned from every step and need no exploration. What drafts rest on is cut into cells for all requests at once;
the rest is plain Python: a request has a handful of drafts, and arrays of four would cost more than they save.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

_ORDER_PRIOR = (0.15, 0.3, 0.45, 0.6, 0.7)  # rate of a unanimous draft by the length of the context that decided
_SHARE_EDGES = (0.5, 0.8, 0.999)
_VOTE_EDGES = (1.5, 3.0)
_MEMORY = 1.0 - 1.0 / 400.0  # of a cell's older observations at each new one
_PRIOR_WEIGHT = 4.0  # observations that a cell's prior counts for
_SHARED_WEIGHT = 8.0  # observations that the rate of all domains counts for in one
_REQUEST_WEIGHT = 6.0  # expected hits after which a request's own record weighs half


class DraftBasis(Protocol):
    """What n-gram drafts rest on; arrays of [requests, n] (`drafters.ngram.Basis`)."""

    @property
    def orders(self) -> npt.NDArray[np.int64]: ...
    @property
    def shares(self) -> npt.NDArray[np.float32]: ...
    @property
    def votes(self) -> npt.NDArray[np.float32]: ...


def _cell_priors() -> list[float]:
    """Before anything was seen: a rate by context length, times the middle of the share's range."""
    shares = [(low + high) / 2 for low, high in pairwise((0.0, *_SHARE_EDGES, 1.0))]
    return [order * share for order in _ORDER_PRIOR for share in shares for _ in range(len(_VOTE_EDGES) + 1)]


_CELL_PRIORS = _cell_priors()


@dataclass
class _Cells:
    """Decayed hits and trials of every cell."""

    hits: list[float] = field(default_factory=lambda: [0.0] * len(_CELL_PRIORS))
    trials: list[float] = field(default_factory=lambda: [0.0] * len(_CELL_PRIORS))

    def observe(self, cell: int, hit: bool) -> None:
        self.hits[cell] = _MEMORY * self.hits[cell] + hit
        self.trials[cell] = _MEMORY * self.trials[cell] + 1.0

    def rate(self, cell: int, prior: float, weight: float) -> float:
        """Posterior mean under a Beta prior of that mean and weight."""
        return (self.hits[cell] + weight * prior) / (self.trials[cell] + weight)


@dataclass
class _Record:
    """How the drafts of one request did."""

    domain: str
    hits: float = 0.0
    expected: float = 0.0  # hits

    @property
    def scale(self) -> float:
        return (self.hits + _REQUEST_WEIGHT) / (self.expected + _REQUEST_WEIGHT)


@dataclass
class ConfidenceModel:
    """Acceptance of n-gram drafts from what each rests on: context length, share of the votes, number of votes.

    The three are cut into cells; a cell's rate is shared, shrunk to a domain's own, and scaled by how the drafts of the
    request at hand have done against expectation so far.
    """

    _shared: _Cells = field(default_factory=_Cells)
    _domains: dict[str, _Cells] = field(default_factory=dict)
    _requests: dict[str, _Record] = field(default_factory=dict)

    def start(self, request_id: str, domain: str = "") -> None:
        self._requests[request_id] = _Record(domain)
        self._domains.setdefault(domain, _Cells())

    def finish(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def rates(self, request_id: str, cells: Sequence[int]) -> list[float]:
        """Conditional acceptance of n drafts in a row, given the cell of each."""
        record = self._requests[request_id]
        scale = record.scale
        return [min(rate * scale, 1.0) for rate in self._cell_rates(record.domain, cells)]

    def observe(self, request_id: str, cells: Sequence[int], known: int, accepted: int) -> None:
        """The target's tokens are known for the first `known` of these drafts, and the first `accepted` equal them."""
        seen = min(accepted + 1, known)
        record = self._requests.get(request_id)
        if not seen or record is None:
            return
        cells = cells[:seen]
        record.expected += sum(self._cell_rates(record.domain, cells))
        record.hits += accepted
        for j, cell in enumerate(cells):
            self._shared.observe(cell, j < accepted)
            self._domains[record.domain].observe(cell, j < accepted)

    def _cell_rates(self, domain: str, cells: Sequence[int]) -> list[float]:
        shared, own = self._shared, self._domains[domain]
        priors = [shared.rate(cell, _CELL_PRIORS[cell], _PRIOR_WEIGHT) for cell in cells]
        return [own.rate(cell, prior, _SHARED_WEIGHT) for cell, prior in zip(cells, priors, strict=True)]


def cells_of(basis: DraftBasis) -> list[list[int]]:
    """Cell of each draft, [requests][n]."""
    orders = np.minimum(basis.orders, len(_ORDER_PRIOR)) - 1
    shares, votes = np.searchsorted(_SHARE_EDGES, basis.shares), np.searchsorted(_VOTE_EDGES, basis.votes)
    cells: list[list[int]] = ((orders * (len(_SHARE_EDGES) + 1) + shares) * (len(_VOTE_EDGES) + 1) + votes).tolist()
    return cells
