"""Distillation losses: pure; one value a row, or one a node of a rollout.

Each takes the drafter's logits [n, D] and the target's probabilities p [n, D] over the draft vocabulary of D tokens,
and returns [n]. q is the softmax of the logits. p is the target's distribution at temperature 1, restricted to the
draft vocabulary and renormalised there (`target_probabilities`): tokens that the drafter cannot propose cost acceptance
whatever it learns, and leaving them out saves the target's head over the full vocabulary, a third of a step's work.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def target_probabilities(hidden: Tensor, head: Tensor) -> Tensor:
    """p [n, D] of the target's last hidden states [n, H] under the head rows [D, H] of the draft vocabulary."""
    return (hidden @ head.T).float().softmax(-1)


def forward_kl(logits: Tensor, p: Tensor) -> Tensor:
    """KL(p || q): covers all that the target might say (Hinton et al. 2015)."""
    return (p * _log(p)).sum(-1) + F.cross_entropy(logits, p, reduction="none")


def reverse_kl(logits: Tensor, p: Tensor) -> Tensor:
    """KL(q || p): seeks the target's mode (Gu et al. 2024, MiniLLM)."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - _log(p))).sum(-1)


def jensen_shannon(logits: Tensor, p: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; between 0 and log 2 (Agarwal et al. 2024, GKD at 0.5)."""
    q = logits.softmax(-1)
    log_m = _log((p + q) / 2)
    to_p = torch.xlogy(p, p) - p * log_m
    to_q = q * (logits.log_softmax(-1) - log_m)
    return (to_p + to_q).sum(-1) / 2


def total_variation(logits: Tensor, p: Tensor) -> Tensor:
    """1 - sum min(p, q): how often rejection sampling rejects a draft (Leviathan et al. 2023, theorem 3.5)."""
    return 1.0 - torch.minimum(p, logits.softmax(-1)).sum(-1)


def _log(p: Tensor) -> Tensor:
    """Logarithm that stays finite where float32 has rounded a probability to 0."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


LOSSES: dict[str, Loss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}


def lump(logits: Tensor, p: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Logits and target over m + 1 events, [n, m + 1] each: the target's m likeliest tokens, and all others as one.

    Any loss above of the result is at most that of the whole (data processing: merging events brings distributions no
    further apart), is 0 at q = p and asks for the target's own mass on the rest. Renormalising p over its m tokens
    would ask for none there: its optimum is not the target. m of D or more gives `logits` and `p` back.
    """
    if m >= p.shape[-1]:
        return logits, p
    kept_p, kept = p.topk(m, dim=-1)
    rest = logits.scatter(-1, kept, float("-inf")).logsumexp(-1, keepdim=True)
    rest_p = (1.0 - kept_p.sum(-1, keepdim=True)).clamp_min(0.0)
    return torch.cat([logits.gather(-1, kept), rest], -1), torch.cat([kept_p, rest_p], -1)


def accepted_length(logits: Sequence[Tensor], p: Sequence[Tensor], parents: Sequence[Tensor]) -> Iterator[Tensor]:
    """How likely the draft that ends at each node is not accepted to its end: [n_j] for each depth j in turn.

    logits, p: [n_j, D]; parents: [n_j], the node of the depth before (not read at depth 0). At a node a sampled draft
    is accepted with probability alpha = sum min(p, q), so a draft of j + 1 tokens with the product of alpha along its
    nodes, and the sum over the depths of one rollout is its depth minus E[accepted tokens] (Leviathan et al. 2023). It
    is exact where alpha does not depend on which tokens were accepted before; a rollout knows alpha along the recorded
    text only. Unlike the losses above it has no gradient at a depth that is never reached.
    """
    reached: Tensor | None = None
    for logit, target, parent in zip(logits, p, parents, strict=True):
        alpha = 1.0 - total_variation(logit, target)
        reached = alpha if reached is None else alpha * reached[parent]
        yield 1.0 - reached
