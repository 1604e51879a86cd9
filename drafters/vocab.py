"""The reduced draft vocabulary: which target tokens the drafter can propose, and how its head follows a new choice.

A choice is a sorted int64 tensor of target token ids, [D]. Before any traffic it rests on a prior: BPE ids are given in
merge order, frequent first, so token id r gets the Zipf-Mandelbrot weight 1 / (r + 2.7) (Mandelbrot 1953).
"""

import torch
from torch import Tensor

PRIOR_TOKENS = 2000.0  # the prior weighs as much as this many observed tokens
_ZIPF_SHIFT = 2.7


def prior(vocab_size: int) -> Tensor:
    """Expected token counts before any traffic, [vocab_size], summing to PRIOR_TOKENS."""
    weight = 1.0 / (torch.arange(vocab_size, dtype=torch.float64) + _ZIPF_SHIFT)
    return weight * (PRIOR_TOKENS / weight.sum())


def choose(counts: Tensor, size: int, required: tuple[int, ...] = ()) -> Tensor:
    """The `size` likeliest tokens under prior plus `counts` [V], always with `required`; sorted ids [size]."""
    score = prior(len(counts)) + counts.to(torch.float64)
    score[list(required)] = float("inf")
    return score.topk(size).indices.sort().values


def coverage(ids: Tensor, counts: Tensor) -> float:
    """Share of the counted tokens that `ids` contains; 1.0 when nothing was counted."""
    total = float(counts.sum())
    return float(counts[ids].sum()) / total if total else 1.0


def rechoose(ids: Tensor, counts: Tensor, gain: float, required: tuple[int, ...] = ()) -> Tensor | None:
    """A new choice of the same size if it covers at least `gain` more of the traffic than `ids`, else None."""
    candidate = choose(counts, len(ids), required)
    better = coverage(candidate, counts) - coverage(ids, counts)
    return candidate if better >= gain else None


def move_rows(old_ids: Tensor, new_ids: Tensor, learned: Tensor, fresh: Tensor) -> Tensor:
    """Head rows of `new_ids` [D]: from `learned` [D, ...] for kept tokens, from `fresh` [D, ...] for newcomers."""
    place = torch.searchsorted(old_ids, new_ids).clamp(max=len(old_ids) - 1)
    kept = old_ids[place] == new_ids
    moved = fresh.clone()
    moved[kept] = learned[place[kept]]
    return moved


def to_offsets(ids: Tensor) -> Tensor:
    """`d2t` of the speculators format: target id of draft row i is i + d2t[i]; int64 [D]."""
    return ids - torch.arange(len(ids), device=ids.device)


def to_mask(ids: Tensor, vocab_size: int) -> Tensor:
    """`t2d` of the speculators format: whether a target token can be drafted; bool [V]."""
    mask = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device)
    mask[ids] = True
    return mask
