"""What a drafter drafts along a known text, from every position of it, and how much of that verification accepts.

Drafts of a text are rows [starts, k], one for each row `first_start` .. `end_start - 1` of its sequence: row t drafts
after token t + 1, and reads its own tokens, as when it serves. Entries that the target did not accept differ from the
text's token; those after the first of them are `NOTHING`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafters.eagle3 import Eagle3
from drafters.rollout import run_rollouts
from trainer.rollout import Labels, build_batch
from trainer.sequence import Sequence

NOTHING = -1  # after the first wrong draft: what followed it is not known
_ROWS = 256  # of the target's distribution at a time: bounds memory at large vocabularies

_Propose = Callable[[Tensor, Labels], tuple[Tensor, Tensor]]  # (logits [n, D], labels) -> drafts [n], accepted [n]


@dataclass(frozen=True)
class Sampling:
    """How the target's tokens were sampled."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0  # 0: unlimited


@torch.no_grad()
def greedy_drafts(model: Eagle3, sequence: Sequence, k: int) -> npt.NDArray[np.int64]:
    """Greedy drafts [starts, k]: one-hot, so accepted as far as they are what the text says, if it was sampled too."""

    def propose(logits: Tensor, label: Labels) -> tuple[Tensor, Tensor]:
        drafts = model.draft_ids[logits.argmax(-1)]
        return drafts, drafts == label.truth

    return _drafts(model, sequence, k, propose)


@dataclass(frozen=True, eq=False)
class TextLaw:
    """The target's distribution along a text of T rows, after temperature, top-k and top-p."""

    said: Tensor  # [T] probability of the text's next token; 1 where it is not known
    drafted: Tensor  # [T, D] probabilities of the draft vocabulary's tokens


@torch.no_grad()
def sampled_drafts(
    model: Eagle3, sequence: Sequence, k: int, law: TextLaw, *, temperature: float, generator: torch.Generator
) -> npt.NDArray[np.int64]:
    """Drafts [starts, k] sampled from q at `temperature` and verified by rejection sampling.

    Rejection sampling emits x with probability p(x), of which min(p(x), q(x)) comes from an accepted draft (Leviathan
    et al. 2023, theorem 3.5): given that x was said, the draft was accepted with probability min(1, q(x) / p(x)), and
    otherwise was a token from (q - p)+, whatever x. Both are drawn at each position of the recorded text until the
    first rejection, which is exact: over texts sampled from p it is what serving drafts and accepts.
    """
    first = sequence.first_start + 1  # row of the batch's first target
    row_of = torch.full((len(model.t2d),), -1, dtype=torch.int64)
    row_of[model.draft_ids.cpu()] = torch.arange(len(model.draft_ids))

    def propose(logits: Tensor, label: Labels) -> tuple[Tensor, Tensor]:
        q, target = (logits.float() / temperature).softmax(-1).cpu(), label.target.cpu() + first
        truth = label.truth.cpu()
        row = row_of[truth.clamp_min(0)]
        possible = (row >= 0) & (truth >= 0)
        said = torch.where(possible, q.gather(1, row.clamp_min(0)[:, None])[:, 0], 0.0)
        chance = acceptance_chance(law.said[target], said)
        accepted = torch.rand(len(chance), generator=generator) < chance
        excess = (q - law.drafted[target]).clamp_min(torch.finfo(q.dtype).tiny)
        rejected = model.draft_ids.cpu()[excess.multinomial(1, generator=generator)[:, 0]]
        return torch.where(accepted, truth, rejected), accepted

    return _drafts(model, sequence, k, propose)


def accepted_drafts(drafts: npt.NDArray[np.int64], sequence: Sequence) -> npt.NDArray[np.int64]:
    """How many drafts [starts, k] of each start are what the text says, up to the first that is not; [starts]."""
    starts, k = drafts.shape
    ids = np.concatenate([sequence.ids, np.full(k + 1, NOTHING - 1)])
    truth = ids[sequence.first_start + 2 + np.arange(starts)[:, None] + np.arange(k)]
    counts: npt.NDArray[np.int64] = np.cumprod(drafts == truth, axis=1).sum(axis=1)
    return counts


def acceptance_chance(p: Tensor, q: Tensor) -> Tensor:
    """Chance that a token which was said with probability p > 0 was an accepted draft from q: min(1, q / p)."""
    return (q / p).clamp_max(1.0)


@torch.no_grad()
def text_law(sequence: Sequence, head: Tensor, draft_ids: Tensor, sampling: Sampling) -> TextLaw:
    """The target's distribution along a text, by its head [V, H].

    A token of the text that rounding (the states are bf16) puts just outside of top-k or top-p counts as the least
    likely one inside.
    """
    truth = torch.from_numpy(sequence.ids[1 : len(sequence.hidden) + 1])
    said, drafted = torch.ones(len(sequence.hidden)), []
    for first in range(0, len(sequence.hidden), _ROWS):
        logits = sequence.hidden[first : first + _ROWS].to(torch.float32) @ head.T / sampling.temperature
        kept = _kept(logits, sampling)
        log_p = logits.masked_fill(~kept, float("-inf")).log_softmax(-1)
        drafted.append(log_p[:, draft_ids].exp())
        ids = truth[first : first + _ROWS]
        least = log_p.masked_fill(~kept, 0.0).amin(-1)[: len(ids)]
        said[first : first + len(ids)] = torch.maximum(log_p[: len(ids)].gather(1, ids[:, None])[:, 0], least).exp()
    return TextLaw(said, torch.cat(drafted))


def _kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """Tokens that top-k, then top-p leave [n, V]."""
    ordered, order = logits.sort(-1, descending=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = float("-inf")
    p = ordered.softmax(-1)
    inside = (p.cumsum(-1) - p < sampling.top_p) & ordered.isfinite()
    return torch.zeros_like(inside).scatter(1, order, inside)


def _drafts(model: Eagle3, sequence: Sequence, k: int, propose: _Propose) -> npt.NDArray[np.int64]:
    """What `propose` drafts from each start, depth by depth for as long as it is accepted."""
    starts = range(sequence.first_start, sequence.end_start)
    drafts = np.full((len(starts), k), NOTHING, np.int64)
    if not starts:
        return drafts
    batch = build_batch([(sequence, starts)], k, device=str(model.inv_freq.device))
    reached, accepted, origin = torch.ones(0, dtype=torch.bool), torch.ones(0, dtype=torch.bool), torch.arange(0)
    states = run_rollouts(model, batch.context, batch.nodes)
    for depth, (nodes, label, state) in enumerate(zip(batch.nodes, batch.labels, states, strict=True)):
        tokens, yes = (found.cpu() for found in propose(model.logits(state), label))
        parent = nodes.parent.cpu()
        origin = origin[parent] if depth else torch.arange(len(starts))
        reached = (reached & accepted)[parent] if depth else torch.ones(len(starts), dtype=torch.bool)
        drafts[origin[reached].numpy(), depth] = tokens[reached].numpy()
        accepted = yes
    return drafts
