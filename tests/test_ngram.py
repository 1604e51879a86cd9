"""N-gram drafting against a plain dictionary that never forgets; what a table forgets when it is full."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.ngram import ORDER, Basis, NgramTable, Pool, Proposals, Turn

_DECAY = 0.8


class _Dictionary:
    """The specification: context -> token -> decayed votes, without bounds."""

    def __init__(self) -> None:
        self.votes: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)

    def learn(self, text: list[int], begin: int) -> None:
        for i in range(begin, len(text)):
            for order in range(1, min(ORDER, i) + 1):
                seen = self.votes[tuple(text[i - order : i])]
                for token in seen:
                    seen[token] *= _DECAY
                seen[text[i]] = seen.get(text[i], 0.0) + 1.0

    def votes_after(self, context: tuple[int, ...]) -> dict[int, float]:
        return self.votes.get(context, {})


def _best(own: _Dictionary, shared: _Dictionary, text: list[int]) -> tuple[int, dict[int, float]] | None:
    """(length of the deciding context, votes of both) or None."""
    for order in range(min(ORDER, len(text)), 0, -1):
        context = tuple(text[-order:])
        votes = dict(own.votes_after(context))
        for token, vote in shared.votes_after(context).items():
            votes[token] = votes.get(token, 0.0) + vote
        if votes:
            return order, votes
    return None


_texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)  # four tokens: a context never has more than it can keep


def _array(text: list[int]) -> np.ndarray:
    return np.array(text, np.int32)


def propose(own: NgramTable, shared: NgramTable, text: np.ndarray, k: int) -> tuple[list[int], Basis]:
    """What two tables draft together after a text that they may know or not: tokens, and what each rests on."""
    pool = Pool()
    turn = Turn(pool.put(own, text), pool.put(shared), learned=len(text), length=len(text))
    return _of(pool.propose([turn], k), 0)


def _of(proposals: Proposals, i: int) -> tuple[list[int], Basis]:
    """Of one of the requests."""
    tokens = proposals.tokens[i]
    return tokens, Basis(*(part[i, : len(tokens)] for part in proposals.basis))


@settings(max_examples=200, deadline=None)
@given(_texts, _texts, st.integers(0, 6))
def test_drafts_are_those_of_an_unbounded_dictionary(served, text, k):
    own, shared = NgramTable(4096), NgramTable(4096)
    own_votes, shared_votes = _Dictionary(), _Dictionary()
    shared.learn(_array(served), 0)
    shared_votes.learn(served, 0)
    own.learn(_array(text), 0)
    own_votes.learn(text, 0)
    tokens, basis = propose(own, shared, _array(text), k)
    for i, token in enumerate(tokens):
        found = _best(own_votes, shared_votes, text + tokens[:i])
        assert found is not None
        order, votes = found
        assert basis.orders[i] == order
        assert votes[token] == pytest.approx(max(votes.values()), rel=1e-5)  # ties may fall either way
        assert basis.votes[i] == pytest.approx(sum(votes.values()), rel=1e-5)
        assert basis.shares[i] == pytest.approx(votes[token] / sum(votes.values()), rel=1e-5)
    if len(tokens) < k:
        assert _best(own_votes, shared_votes, text + tokens) is None


@given(_texts, st.data())
def test_learning_in_pieces_is_learning_at_once(text, data):
    cut = data.draw(st.integers(0, len(text)))
    whole, pieces = NgramTable(4096), NgramTable(4096)
    whole.learn(_array(text), 0)
    pieces.learn(_array(text[:cut]), 0)
    pieces.learn(_array(text), cut)
    for a, b in zip(whole.slots, pieces.slots, strict=True):
        assert np.array_equal(a, b)


def test_a_full_table_keeps_its_size_and_forgets_the_oldest_first():
    table, rng = NgramTable(256), np.random.default_rng(0)
    size = table.nbytes
    table.learn(_array([7, 8, 9, 10]), 0)
    for _ in range(50):
        table.learn(rng.integers(1000, 30000, 40).astype(np.int32), 0)
    table.learn(_array([17, 18, 19, 20]), 0)
    empty = NgramTable(8)
    assert table.nbytes == size
    assert propose(table, empty, _array([7, 8, 9]), 1)[0] == []
    assert propose(table, empty, _array([17, 18, 19]), 1)[0] == [20]


def test_newer_votes_outweigh_older_ones():
    table = NgramTable(256)
    for token in (5, 5, 6, 6):
        table.learn(_array([1, token]), 1)
    tokens, basis = propose(table, NgramTable(8), _array([1]), 1)
    assert tokens == [6]
    assert 0.5 < basis.shares[0] < 0.8


def test_nothing_known_drafts_nothing():
    empty = NgramTable(8)
    assert propose(empty, empty, _array([1, 2, 3]), 4)[0] == []
    assert propose(empty, empty, _array([]), 4)[0] == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(_texts, st.integers(0, 40)), min_size=1, max_size=5), _texts)
def test_a_pool_drafts_for_each_as_if_it_were_alone(requests, served):
    """Places that were freed and given again included; what is new in a text is learned on the way."""
    shared, pool = NgramTable(4096), Pool()
    shared.learn(_array(served), 0)
    common = pool.put(shared)
    for place in [pool.put(NgramTable(64), _array([1, 2, 3])) for _ in range(3)]:
        pool.remove(place)
    turns, alone = [], []
    for text, known in requests:
        learned = min(known, len(text))
        own, same = NgramTable(4096), NgramTable(4096)
        own.learn(_array(text[:learned]), 0)
        turns.append(Turn(pool.put(own, _array(text)), common, learned, len(text)))
        same.learn(_array(text), 0)
        alone.append(propose(same, shared, _array(text), 3))
    proposals = pool.propose(turns, 3)
    for i, (tokens, basis) in enumerate(alone):
        mine, mine_basis = _of(proposals, i)
        assert mine == tokens
        assert [part.tolist() for part in mine_basis] == [part.tolist() for part in basis]


def test_a_pool_with_nobody_to_draft_for_drafts_nothing():
    assert Pool().propose([], 3).tokens == []
