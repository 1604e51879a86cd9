"""How far a drafter's drafts along a known text are accepted, from every position of it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafters.eagle3 import Eagle3
from drafters.rollout import run_rollouts
from trainer.rollout import MAX_CONTEXT, Labels, build_batch
from trainer.sequence import Sequence

_ROWS = 256  # of the target's distribution at a time: bounds memory at large vocabularies


@dataclass(frozen=True)
class Sampling:
    """How the target's tokens were sampled."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0  # 0: unlimited


_Accepted = Callable[[Tensor, Labels], Tensor]  # (logits [n, D], labels of n nodes) -> [n] bool


@torch.no_grad()
def right_drafts(model: Eagle3, sequence: Sequence, k: int) -> npt.NDArray[np.int64]:
    """Leading right drafts, 0 to k, when drafting greedily from each row `first_start` .. `end_start - 1`; [starts].

    Row t drafts after token t + 1. Up to the first wrong draft the drafter reads its own tokens, as when it serves.
    Greedy drafts are one-hot, so this is what verification accepts, of sampled texts too: a draft is accepted when the
    target happens to say it.
    """

    def said(logits: Tensor, label: Labels) -> Tensor:
        return model.draft_ids[logits.argmax(-1)] == label.truth

    return _leading(model, sequence, k, said)


@torch.no_grad()
def sampled_drafts(
    model: Eagle3, sequence: Sequence, k: int, said: Tensor, *, temperature: float, generator: torch.Generator
) -> npt.NDArray[np.int64]:
    """Leading accepted drafts, 0 to k, when the drafts are sampled from q and verified by rejection sampling; [starts].

    said: [T] probability of the text's next token after each row (`said_probabilities`).

    Rejection sampling emits x with probability p(x), of which min(p(x), q(x)) comes from an accepted draft (Leviathan
    et al. 2023, theorem 3.5): given that x was said, the draft was accepted with probability min(1, q(x) / p(x)). That
    chance is drawn at each position of the recorded text until the first failure, which is exact: its mean over texts
    sampled from p is what serving accepts.
    """

    said = said[max(0, sequence.first_start - MAX_CONTEXT) :]  # the rows of the batch

    def accepted(logits: Tensor, label: Labels) -> Tensor:
        row_of = torch.full((len(model.t2d),), -1, dtype=torch.int64, device=logits.device)
        row_of[model.draft_ids] = torch.arange(len(model.draft_ids), device=logits.device)
        row = row_of[label.truth.clamp_min(0)]
        q = (logits.float() / temperature).softmax(-1).gather(1, row.clamp_min(0)[:, None])[:, 0]
        q = torch.where((row >= 0) & (label.truth >= 0), q, 0.0)
        chance = acceptance_chance(said[label.target], q)
        return torch.rand(len(chance), generator=generator, device=chance.device) < chance

    return _leading(model, sequence, k, accepted)


def acceptance_chance(p: Tensor, q: Tensor) -> Tensor:
    """Chance that a token which was said with probability p > 0 was an accepted draft from q: min(1, q / p)."""
    return (q / p).clamp_max(1.0)


@torch.no_grad()
def said_probabilities(sequence: Sequence, head: Tensor, sampling: Sampling) -> Tensor:
    """p of the recorded next token after each row under the target's head [V, H] and the sampling; [T], 1 at the end.

    A token that rounding (the states are bf16) puts just outside of top-k or top-p counts as the least likely one in.
    """
    truth = torch.from_numpy(sequence.ids[1 : len(sequence.hidden) + 1])
    said = torch.ones(len(sequence.hidden))
    for first in range(0, len(truth), _ROWS):
        ids = truth[first : first + _ROWS]
        logits = sequence.hidden[first : first + len(ids)].to(torch.float32) @ head.T / sampling.temperature
        kept = _kept(logits, sampling)
        log_p = logits.masked_fill(~kept, float("-inf")).log_softmax(-1)
        least = log_p.masked_fill(~kept, 0.0).amin(-1)
        said[first : first + len(ids)] = torch.maximum(log_p.gather(1, ids[:, None])[:, 0], least).exp()
    return said


def _kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """Tokens that top-k, then top-p leave [n, V]."""
    ordered, order = logits.sort(-1, descending=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = float("-inf")
    p = ordered.softmax(-1)
    inside = (p.cumsum(-1) - p < sampling.top_p) & ordered.isfinite()
    return torch.zeros_like(inside).scatter(1, order, inside)


def _leading(model: Eagle3, sequence: Sequence, k: int, accepts: _Accepted) -> npt.NDArray[np.int64]:
    """For each start, how many depths in a row `accepts` says yes to."""
    starts = range(sequence.first_start, sequence.end_start)
    depths = np.zeros(len(starts), np.int64)
    if not starts:
        return depths
    batch = build_batch([(sequence, starts)], k, device=str(model.inv_freq.device))
    open_, origin = torch.ones(0, dtype=torch.bool), torch.arange(0)
    states = run_rollouts(model, batch.context, batch.nodes)
    for depth, (nodes, label, state) in enumerate(zip(batch.nodes, batch.labels, states, strict=True)):
        yes = accepts(model.logits(state), label).cpu()
        parent = nodes.parent.cpu()
        open_ = yes if depth == 0 else yes & open_[parent]
        origin = torch.arange(len(starts)) if depth == 0 else origin[parent]
        depths[origin[open_].numpy()] += 1
    return depths
