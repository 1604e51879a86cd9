"""How far a drafter's greedy drafts along a known text are right, from every position of it."""

import numpy as np
import numpy.typing as npt
import torch

from drafters.eagle3 import Eagle3
from drafters.rollout import run_rollouts
from trainer.learner import accepted_share
from trainer.rollout import build_batch
from trainer.sequence import Sequence


@torch.no_grad()
def right_drafts(model: Eagle3, sequence: Sequence, k: int) -> npt.NDArray[np.int64]:
    """Leading right drafts, 0 to k, when drafting from each row `first_start` .. `end_start - 1`; [starts].

    Row t drafts after token t + 1. Up to the first wrong draft the drafter reads its own tokens, as when it serves, so
    for drafts that are one-hot this is what verification accepts, sampled texts included: a draft is accepted when the
    target happens to say it.
    """
    starts = range(sequence.first_start, sequence.end_start)
    depths = np.zeros(len(starts), np.int64)
    if not starts:
        return depths
    batch = build_batch([(sequence, starts)], k, device=str(model.inv_freq.device))
    right, origin = torch.ones(0), torch.arange(0)
    states = run_rollouts(model, batch.context, batch.nodes)
    for depth, (nodes, label, state) in enumerate(zip(batch.nodes, batch.labels, states, strict=True)):
        right, _ = accepted_share(model, model.logits(state), label, right, nodes.parent)
        origin = torch.arange(len(starts)) if depth == 0 else origin[nodes.parent.cpu()]
        depths[origin[right.cpu()].numpy()] += 1
    return depths
