import torch
from hypothesis import given
from hypothesis import strategies as st

from drafters.vocab import choose, coverage, move_rows, prior, rechoose, to_mask, to_offsets

V = 40
COUNTS = st.lists(st.integers(0, 10_000), min_size=V, max_size=V).map(torch.tensor)


def test_the_prior_prefers_early_merges() -> None:
    weights = prior(V)
    assert (weights.diff() < 0).all()
    assert choose(torch.zeros(V), 5, required=(39,)).tolist() == [0, 1, 2, 3, 39]


@given(COUNTS, st.integers(2, V), st.sets(st.integers(0, V - 1), max_size=2))
def test_a_choice_is_sorted_unique_and_holds_what_is_required(
    counts: torch.Tensor, size: int, required: set[int]
) -> None:
    ids = choose(counts, size, tuple(required))
    assert len(ids) == size
    assert (ids.diff() > 0).all()
    assert required <= set(ids.tolist())


@given(COUNTS, st.integers(1, V - 1))
def test_offsets_and_mask_describe_the_same_ids(counts: torch.Tensor, size: int) -> None:
    ids = choose(counts, size)
    assert torch.equal(to_offsets(ids) + torch.arange(size), ids)
    assert torch.equal(to_mask(ids, V).nonzero().flatten(), ids)


def test_a_new_choice_must_be_worth_it() -> None:
    ids = torch.arange(10)
    counts = torch.zeros(V, dtype=torch.int64)
    counts[:9], counts[30] = 100_000, 3_000
    assert rechoose(ids, counts, gain=0.01) is None
    counts[30] = 30_000
    new = rechoose(ids, counts, gain=0.01)
    assert new is not None
    assert new.tolist() == [*range(9), 30]
    assert coverage(new, counts) == 1.0


def test_coverage_of_no_traffic_is_whole() -> None:
    assert coverage(torch.arange(3), torch.zeros(V)) == 1.0


@given(st.sets(st.integers(0, V - 1), min_size=6, max_size=6), st.sets(st.integers(0, V - 1), min_size=6, max_size=6))
def test_moving_keeps_learned_rows_and_fills_the_rest(old: set[int], new: set[int]) -> None:
    old_ids, new_ids = torch.tensor(sorted(old)), torch.tensor(sorted(new))
    learned, fresh = old_ids[:, None].float() + 0.5, -new_ids[:, None].float()
    moved = move_rows(old_ids, new_ids, learned, fresh).flatten().tolist()
    assert moved == [t + 0.5 if t in old else -float(t) for t in sorted(new)]
