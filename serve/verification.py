"""A cheaper way to verify drafts on a CPU: draw each token from the target and see whether it is the draft.

A draft whose drafter gave it all probability is accepted with the target's probability p of it, and where it is not the
rest of p is drawn from (rejection sampling, arXiv 2211.17192). Together that is a draw from p: the draft is right if it
was drawn, and whatever was drawn is said. vLLM computes the two apart, which on a CPU takes twice as long: 5.9 instead
of 2.5 ms for four requests with a draft each and 49,152 tokens to draw from (`scripts/verification_cost.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

_REJECTED = -1  # vLLM's PLACEHOLDER_TOKEN_ID
_SEEDS = 1 << 31


def install() -> None:
    """Let this process verify so. Raises RuntimeError when vLLM has moved the function that is replaced."""
    from vllm.v1.sample import rejection_sampler

    theirs = getattr(rejection_sampler, "rejection_sample", None)
    if theirs is None:
        raise RuntimeError("vllm.v1.sample.rejection_sampler has no rejection_sample: install vLLM 0.32 or 0.33")

    def rejection_sample(*arguments: Any, **options: Any) -> "Tensor":
        drafts, counts, longest, _, draft_probs, logits, bonus, sampling = arguments
        special = options.get("synthetic_mode") or options.get("use_fp64_gumbel")
        if draft_probs is not None or sampling.all_greedy or special:
            return cast("Tensor", theirs(*arguments, **options))
        return compare(draw(logits, counts, sampling), drafts, counts, bonus, longest + 1)

    rejection_sampler.rejection_sample = rejection_sample


def draw(logits: "Tensor", counts: Sequence[int], sampling: Any) -> "Tensor":
    """A token of each row of logits [drafts, V], to which temperature, top-k and top-p were applied: [drafts].

    Drawn as vLLM's sampler draws on a CPU, each with a seed of its own, which those of a request with a seed come from.
    counts: [requests] rows of each.
    """
    seeds = torch.randint(0, _SEEDS, (len(logits),), dtype=torch.long)
    ends = np.cumsum(counts)
    for request, generator in sampling.generators.items():
        own = slice(int(ends[request]) - counts[request], int(ends[request]))
        seeds[own] = torch.randint(0, _SEEDS, (counts[request],), generator=generator, dtype=torch.long)
    drawn: Tensor = torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), seeds).view(-1)
    if sampling.all_random:
        return drawn
    greedy = (sampling.temperature == 0).repeat_interleave(torch.tensor(counts), output_size=len(logits))
    return torch.where(greedy, logits.argmax(dim=-1), drawn)


def compare(drawn: "Tensor", drafts: "Tensor", counts: Sequence[int], bonus: "Tensor", width: int) -> "Tensor":
    """What each request says, [requests, width] int32: as drawn up to the first token that is not the draft.

    drawn, drafts: [sum of counts]. bonus: [requests, 1], said after drafts that are all right.
    """
    rows = torch.tensor(counts)
    said = torch.full((len(counts), width), _REJECTED, dtype=torch.int32)
    place = torch.arange(width)
    within = place < rows[:, None]  # as many places of each request as it has drafts, in the order of `drawn`
    said[within] = drawn.to(torch.int32)
    right = torch.zeros_like(within)
    right[within] = drawn == drafts
    accepted = right.long().cumprod(dim=1).sum(dim=1)
    said[place > accepted[:, None]] = _REJECTED
    whole = accepted == rows
    said[whole, rows[whole]] = bonus[whole, 0].to(torch.int32)
    return said
