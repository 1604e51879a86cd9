"""The plain numbers of an optimiser step, as sums over rows: what workers with a share of the batch each add up."""

from dataclasses import dataclass

import torch
from torch import Tensor

_BY_DEPTH, _IN_ALL, _BY_WINDOW = 4, 5, 2


@dataclass(frozen=True)
class Tally:
    """Of one worker's rows or, added up, of the whole batch of W windows. Depths that have no node count 0."""

    loss: tuple[float, ...]  # by depth: weighted imitation losses of the nodes
    weight: tuple[float, ...]  # their weights
    right: tuple[float, ...]  # rollouts whose greedy drafts are right up to that depth
    known: tuple[float, ...]  # rollouts whose true token there is known
    rows: int  # rollout starts
    rejected: int  # nodes on rejected paths
    actions: int  # verified drafted tokens in the policy's part
    policy_loss: float  # their surrogate and anchor
    outside: int  # of them with a ratio outside the clip
    wrong: tuple[float, ...]  # by window: first drafts that are wrong
    asked: tuple[float, ...]  # first drafts whose true token is known

    @property
    def missed(self) -> list[float]:
        """Share of wrong first drafts of each window; 1.0 where none is known."""
        return [wrong / asked if asked else 1.0 for wrong, asked in zip(self.wrong, self.asked, strict=True)]

    def vector(self) -> Tensor:
        """All numbers, [4 depths + 5 + 2 W] float64: addition of vectors adds tallies."""
        whole = (self.rows, self.rejected, self.actions, self.policy_loss, self.outside)
        parts = (self.loss, self.weight, self.right, self.known, whole, self.wrong, self.asked)
        return torch.tensor([value for part in parts for value in part], dtype=torch.float64)

    @classmethod
    def of(cls, vector: Tensor, depths: int) -> "Tally":
        """The tally that `vector` holds."""
        values = vector.tolist()
        loss, weight, right, known = (tuple(values[i * depths : (i + 1) * depths]) for i in range(_BY_DEPTH))
        rows, rejected, actions, policy_loss, outside = values[_BY_DEPTH * depths :][:_IN_ALL]
        windows = values[_BY_DEPTH * depths + _IN_ALL :]
        half = len(windows) // _BY_WINDOW
        return cls(
            loss,
            weight,
            right,
            known,
            int(rows),
            int(rejected),
            int(actions),
            policy_loss,
            int(outside),
            tuple(windows[:half]),
            tuple(windows[half:]),
        )
