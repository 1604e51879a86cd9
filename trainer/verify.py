"""What a drafter drafts greedily along a known text, from every position of it."""

import numpy as np
import numpy.typing as npt
import torch

from drafters.eagle3 import Eagle3
from drafters.rollout import run_rollouts
from trainer.learner import accepted_share
from trainer.rollout import build_batch
from trainer.sequence import Sequence

NOTHING = -1  # after the first wrong draft: what followed it is not known


@torch.no_grad()
def greedy_drafts(model: Eagle3, sequence: Sequence, k: int) -> npt.NDArray[np.int64]:
    """Greedy drafts from each row `first_start` .. `end_start - 1`, up to the first wrong one; [starts, k].

    Row t drafts after token t + 1. Up to the first wrong draft the drafter reads its own tokens, as when it serves, so
    for drafts that are one-hot this is what verification accepts, sampled texts included: a draft is accepted when the
    target happens to say it. The entries after the first wrong draft are `NOTHING`.
    """
    starts = range(sequence.first_start, sequence.end_start)
    drafts = np.full((len(starts), k), NOTHING, np.int64)
    if not starts:
        return drafts
    batch = build_batch([(sequence, starts)], k, device=str(model.inv_freq.device))
    right, origin = torch.ones(0), torch.arange(0)
    states = run_rollouts(model, batch.context, batch.nodes)
    for depth, (nodes, label, state) in enumerate(zip(batch.nodes, batch.labels, states, strict=True)):
        logits = model.logits(state)
        parent = nodes.parent.cpu()
        origin = origin[parent] if depth else torch.arange(len(starts))
        reached = right.cpu()[parent] if depth else torch.ones(len(starts), dtype=torch.bool)
        drafts[origin[reached].numpy(), depth] = model.draft_ids[logits.argmax(-1)].cpu()[reached].numpy()
        right, _ = accepted_share(model, logits, label, right, nodes.parent)
    return drafts
