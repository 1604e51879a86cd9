"""What one optimiser step minimises: imitation of the target, and the policy's part as the schedule has it.

Every mean in it is a sum over nodes or actions divided by a sum of weights. Of several workers each has the sums of its
share of the batch (`Judge.sums`); what they divide by is the whole batch's (`Judge.weigh`), so that the workers' losses
add up to the loss of one worker with all of it, and so do their gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aurora.config import TrainerConfig
from trainer.losses import LOSSES, accepted_length, lump
from trainer.policy import Policy, policy_gradient, share_at
from trainer.rollout import Batch
from trainer.tally import Tally

_LEAST_WEIGHT = 1e-9  # of a depth that has no node that counts: its mean is 0


@dataclass(frozen=True, eq=False)
class Sums:
    """What the nodes and actions of one worker's rows add up to."""

    imitation: Tensor  # [depths]: weighted losses of the nodes of each depth
    weights: Tensor  # [depths]: weights of the nodes of each depth
    policy: Policy | None


@dataclass(frozen=True)
class Weights:
    """The objective is linear in the sums; these are its coefficients."""

    imitation: tuple[float, ...]  # of each depth's weighted losses
    policy: float  # of the actions' summed losses
    share: float  # of the policy in the loss


class Judge:
    """Measures the losses that a configuration asks for."""

    def __init__(self, config: TrainerConfig) -> None:
        self.config = config

    def sums(self, logits: Sequence[Tensor], p: Sequence[Tensor], batch: Batch, draft_ids: Tensor, step: int) -> Sums:
        """What `batch` adds to optimiser step `step`. logits, p: [n, D] of the nodes of each depth of `batch`."""
        losses, weights = self._imitation(logits, p, batch)
        rl = self.config.rl
        policy = policy_gradient(logits, p, batch.actions, draft_ids, rl) if share_at(rl, step) > 0 else None
        return Sums(torch.stack(losses), torch.stack(weights), policy)

    def weigh(self, whole: Tally, step: int) -> Weights:
        """How optimiser step `step` weighs the sums of a batch of which `whole` is the tally."""
        share = share_at(self.config.rl, step) if whole.actions else 0.0  # without actions imitation teaches alone
        if self.config.loss == "accepted_length":  # `depth_decay` is not of use: a depth weighs as it is reached
            imitation = [1.0 / whole.rows] * len(whole.weight)
        else:
            decay = self.config.depth_decay
            imitation = [decay**depth / max(weight, _LEAST_WEIGHT) for depth, weight in enumerate(whole.weight)]
        policy = share / whole.actions if whole.actions else 0.0
        return Weights(tuple((1.0 - share) * weight for weight in imitation), policy, share)

    def loss(self, sums: Sums, weights: Weights) -> Tensor:
        """The scalar to differentiate: what these sums add to the objective."""
        by_depth = torch.tensor(weights.imitation[: len(sums.imitation)], device=sums.imitation.device)
        loss = (by_depth * sums.imitation).sum()
        return loss if sums.policy is None or not weights.share else loss + weights.policy * sums.policy.total

    def value(self, whole: Tally, weights: Weights) -> float:
        """The objective of the whole batch."""
        imitation = sum(weight * loss for weight, loss in zip(weights.imitation, whole.loss, strict=True))
        return imitation + weights.policy * whole.policy_loss

    def _imitation(
        self, logits: Sequence[Tensor], p: Sequence[Tensor], batch: Batch
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Weighted losses and weights of each depth's nodes, summed."""
        config = self.config
        if config.target_top_m:
            logits, p = zip(*map(lambda x, y: lump(x, y, config.target_top_m), logits, p), strict=True)
        if config.loss == "accepted_length":
            return _of_rollouts(logits, p, batch)
        losses, weights = [], []
        for x, y, label in zip(logits, p, batch.labels, strict=True):
            weight = torch.where(label.rejected, config.rejected_weight, config.accepted_weight)
            losses.append((weight * LOSSES[config.loss](x, y)).sum())
            weights.append(weight.sum())
        return losses, weights


def _of_rollouts(logits: Sequence[Tensor], p: Sequence[Tensor], batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Depth minus the expected accepted tokens, summed over the rollouts, and the nodes along the text, by depth.

    The rows' weights do not apply: the weight of a depth is how likely it is reached.
    """
    lost = accepted_length(logits, p, [nodes.parent for nodes in batch.nodes])
    along_text = [value[~label.rejected] for value, label in zip(lost, batch.labels, strict=True)]
    return [value.sum() for value in along_text], [value.new_tensor(len(value)) for value in along_text]
