"""How likely is an n-gram draft to be accepted? Learned from what such drafts rest on.

Each draft is known to be right or wrong as soon as the target has spoken, whether it was verified or not, so the rates
are learned from every step and need no exploration. A step has a handful of drafts a request, so this is plain Python:
arrays of four would cost more than they save.
"""

from bisect import bisect_left
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
    """What n-gram drafts rest on; arrays of [n] (`drafters.ngram.Basis`)."""

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
    basis: DraftBasis | None = None  # that was asked for last
    cells: list[int] = field(default_factory=list)  # of it

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

    def rates(self, request_id: str, basis: DraftBasis) -> list[float]:
        """Conditional acceptance of n drafts in a row."""
        record = self._requests[request_id]
        record.basis, record.cells = basis, _cells(basis)
        scale = record.scale
        return [min(rate * scale, 1.0) for rate in self._cell_rates(record.domain, record.cells)]

    def observe(self, request_id: str, basis: DraftBasis, known: int, accepted: int) -> None:
        """The target's tokens are known for the first `known` of these drafts, and the first `accepted` equal them."""
        seen = min(accepted + 1, known)
        record = self._requests.get(request_id)
        if not seen or record is None:
            return
        cells = (record.cells if record.basis is basis else _cells(basis))[:seen]
        record.expected += sum(self._cell_rates(record.domain, cells))
        record.hits += accepted
        for j, cell in enumerate(cells):
            self._shared.observe(cell, j < accepted)
            self._domains[record.domain].observe(cell, j < accepted)

    def _cell_rates(self, domain: str, cells: list[int]) -> list[float]:
        shared, own = self._shared, self._domains[domain]
        priors = [shared.rate(cell, _CELL_PRIORS[cell], _PRIOR_WEIGHT) for cell in cells]
        return [own.rate(cell, prior, _SHARED_WEIGHT) for cell, prior in zip(cells, priors, strict=True)]


def _cells(basis: DraftBasis) -> list[int]:
    """Cell of each draft."""
    parts = zip(basis.orders.tolist(), basis.shares.tolist(), basis.votes.tolist(), strict=True)
    shares, votes = len(_SHARE_EDGES) + 1, len(_VOTE_EDGES) + 1
    return [
        ((min(order, len(_ORDER_PRIOR)) - 1) * shares + bisect_left(_SHARE_EDGES, share)) * votes
        + bisect_left(_VOTE_EDGES, vote)
        for order, share, vote in parts
    ]
