"""The optimiser step: the drafter learns along rollouts what `trainer.objective` asks for."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from aurora.config import TrainerConfig
from drafters.eagle3 import Eagle3
from drafters.rollout import run_rollouts
from drafters.target import TargetWeights
from drafters.vocab import move_rows, to_mask, to_offsets
from trainer.losses import target_probabilities
from trainer.objective import Judge
from trainer.rollout import Batch, Labels


@dataclass(frozen=True)
class StepMetrics:
    """What one optimiser step saw."""

    step: int
    loss: float
    loss_per_depth: tuple[float, ...]  # weighted mean over the nodes of each depth, nats
    acceptance_per_depth: tuple[float, ...]  # share of rollouts whose greedy drafts are right up to that depth
    grad_norm: float  # before clipping
    learning_rate: float
    rows: int  # rollout starts
    rejected_rows: int  # nodes on rejected paths
    seconds: float
    actions: int = 0  # verified drafted tokens in the policy's part
    rl_share: float = 0.0  # of the policy's part in the loss
    rl_loss: float = 0.0  # surrogate and anchor, mean over the actions; 0 without any
    rl_clipped: float = 0.0  # share of the actions whose ratio is outside the clip

    @property
    def acceptance_length(self) -> float:
        """Expected emitted tokens a verification on the training batch, greedy."""
        return 1.0 + sum(self.acceptance_per_depth)


class Learner:
    """A drafter in training: parameters, Adam moments (Kingma & Ba 2015; AdamW) and the step counter."""

    def __init__(self, model: Eagle3, target: TargetWeights, config: TrainerConfig) -> None:
        self.model = model
        self.target = target
        self.config = config
        self._judge = Judge(config)
        self.steps = 0
        self._warm_from = 0  # step at which the warm-up began
        self.tokens = 0  # rollout starts trained on, passes counted
        self.missed: list[float] = []  # of each sequence in the last batch: share of starts with a wrong first draft
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._draft_head = target.lm_head[model.draft_ids]  # [D, H], the frozen judge
        self._bf16 = uses_bf16(config.precision, self._draft_head.device.type)

    def step(self, batch: Batch) -> StepMetrics:
        """Roll out, measure the loss at every depth, go one step down its gradient."""
        began = time.perf_counter()
        rate = self._warm_up()
        with torch.autocast(self._draft_head.device.type, torch.bfloat16, enabled=self._bf16):
            logits, p, accepted = zip(*self._roll(batch), strict=True)
            objective = self._judge.measure(logits, p, batch, self.model.draft_ids, self.steps)
        self.optimizer.zero_grad()
        torch.autograd.backward(objective.loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.steps += 1
        self.tokens += batch.rows
        policy = objective.policy
        return StepMetrics(
            step=self.steps,
            loss=objective.loss.item(),
            loss_per_depth=objective.per_depth,
            acceptance_per_depth=accepted,
            grad_norm=grad_norm.item(),
            learning_rate=rate,
            rows=batch.rows,
            rejected_rows=sum(int(label.rejected.sum()) for label in batch.labels),
            actions=policy.actions if policy is not None else 0,
            rl_share=objective.share,
            rl_loss=policy.loss.item() if policy is not None else 0.0,
            rl_clipped=policy.clipped if policy is not None else 0.0,
            seconds=time.perf_counter() - began,
        )

    def _warm_up(self) -> float:
        """Set this step's learning rate: linear over the first steps, then constant."""
        rate = self.config.learning_rate * min(1.0, (self.steps - self._warm_from + 1) / self.config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _roll(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(logits [n, D], p [n, D], share of rollouts accepted so far) of each depth in turn."""
        p = target_probabilities(batch.target_hidden.to(torch.float32), self._draft_head)  # [R, D]
        right = torch.ones(0)
        states = run_rollouts(self.model, batch.context, batch.nodes)
        for nodes, label, state in zip(batch.nodes, batch.labels, states, strict=True):
            logits = self.model.logits(state).float()
            right, share = accepted_share(self.model, logits.detach(), label, right, nodes.parent)
            if nodes is batch.nodes[0]:
                self.missed = _missed(right, label.truth >= 0, nodes.bounds)
            yield logits, p.index_select(0, label.target), share

    def change_vocabulary(self, ids: Tensor) -> None:
        """Let the drafter propose the target tokens `ids` [D]: kept tokens keep their learned rows and Adam moments."""
        old, head = self.model.draft_ids, self.model.lm_head.weight
        fresh = self.target.lm_head[ids]
        with torch.no_grad():
            head.copy_(move_rows(old, ids, head, fresh))
            state = self.optimizer.state[head]
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name].copy_(move_rows(old, ids, state[name], torch.zeros_like(fresh)))
            self.model.d2t.copy_(to_offsets(ids))
            self.model.t2d.copy_(to_mask(ids, len(self.model.t2d)))
        self._draft_head = fresh

    def restart(self, model: Eagle3) -> None:
        """Go on from another drafter's weights, with empty Adam moments and a new warm-up."""
        self.model.load_state_dict(model.state_dict())
        self.optimizer.state.clear()
        self._warm_from = self.steps
        self.reload()

    def reload(self) -> None:
        """Follow a vocabulary that was written into the model from outside (a checkpoint)."""
        self._draft_head = self.target.lm_head[self.model.draft_ids]


def uses_bf16(precision: str, device: str) -> bool:
    """Whether matrix products run in bfloat16; `auto`: where the device computes them natively."""
    if precision == "auto":
        return device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16"


def accepted_share(
    model: Eagle3, logits: Tensor, label: Labels, before: Tensor, parent: Tensor
) -> tuple[Tensor, float]:
    """Which nodes [n] end a greedy draft that is right so far, and their share among those whose truth is known.

    `before` holds the same of the previous depth ([0] at depth 0). Along a right draft the rollout reads the
    drafter's own tokens, so this is what greedy drafting and greedy acceptance would give.
    """
    right = model.draft_ids[logits.argmax(-1)] == label.truth
    if len(before):
        right = right & before[parent]
    known = label.truth >= 0
    return right, float(right[known].float().mean()) if bool(known.any()) else 0.0


def _missed(right: Tensor, known: Tensor, bounds: tuple[int, ...]) -> list[float]:
    """Share of wrong drafts among those whose truth is known, of each sequence; 1.0 where none is."""
    wrong = (known & ~right).tolist()
    asked = known.tolist()
    return [sum(wrong[a:b]) / sum(asked[a:b]) if any(asked[a:b]) else 1.0 for a, b in pairwise(bounds)]
