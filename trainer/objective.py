"""What one optimiser step minimises: imitation of the target, and the policy's part as the schedule has it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aurora.config import TrainerConfig
from trainer.losses import LOSSES, accepted_length, lump
from trainer.policy import Policy, policy_gradient, share_at
from trainer.rollout import Batch


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of one batch and what it consists of."""

    loss: Tensor  # scalar
    per_depth: tuple[float, ...]  # imitation: weighted mean over the nodes of each depth
    policy: Policy | None
    share: float  # of the policy in `loss`


class Judge:
    """Measures the losses that a configuration asks for."""

    def __init__(self, config: TrainerConfig) -> None:
        self.config = config

    def measure(
        self, logits: Sequence[Tensor], p: Sequence[Tensor], batch: Batch, draft_ids: Tensor, step: int
    ) -> Objective:
        """The objective of optimiser step `step`. logits, p: [n, D] of the nodes of each depth of `batch`."""
        imitation, means = self._imitation(logits, p, batch)
        share = share_at(self.config.rl, step)
        policy = policy_gradient(logits, p, batch.actions, draft_ids, self.config.rl) if share > 0 else None
        share = share if policy is not None else 0.0  # a batch without actions teaches by imitation alone
        loss = (1.0 - share) * imitation + share * policy.loss if policy is not None else imitation
        return Objective(loss, tuple(mean.item() for mean in means), policy, share)

    def _imitation(self, logits: Sequence[Tensor], p: Sequence[Tensor], batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Loss of the batch, and its mean at each depth."""
        config = self.config
        if config.target_top_m:
            logits, p = zip(*map(lambda x, y: lump(x, y, config.target_top_m), logits, p), strict=True)
        if config.loss == "accepted_length":
            return _of_rollouts(logits, p, batch)
        means = []
        for x, y, label in zip(logits, p, batch.labels, strict=True):
            weight = torch.where(label.rejected, config.rejected_weight, config.accepted_weight)
            means.append((weight * LOSSES[config.loss](x, y)).sum() / weight.sum().clamp_min(1e-9))
        return torch.stack([config.depth_decay**depth * mean for depth, mean in enumerate(means)]).sum(), means


def _of_rollouts(logits: Sequence[Tensor], p: Sequence[Tensor], batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Mean over rollouts of their depth minus the expected accepted tokens, and the mean over the nodes of each depth.

    Neither `depth_decay` nor the rows' weights apply: the weight of a depth is how likely it is reached.
    """
    lost = accepted_length(logits, p, [nodes.parent for nodes in batch.nodes])
    along_text = [value[~label.rejected] for value, label in zip(lost, batch.labels, strict=True)]
    return torch.cat(along_text).sum() / batch.rows, [value.sum() / max(len(value), 1) for value in along_text]
