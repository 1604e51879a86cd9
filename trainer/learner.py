"""The optimiser step: the drafter learns along rollouts what `trainer.objective` asks for.

Several workers take it together, each with its share of the batch: they add up the tallies of their rows, then their
gradients, and each goes the same step. Until both are added up nothing of a learner has changed, so that a step which
failed for want of a worker can be taken again.
"""

import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aurora.config import TrainerConfig
from drafters.eagle3 import Eagle3
from drafters.rollout import Context, Nodes, run_rollouts
from drafters.target import TargetWeights
from drafters.vocab import move_rows, to_mask, to_offsets
from trainer.losses import target_probabilities
from trainer.objective import Judge, Sums
from trainer.parallel import ALONE, Peers
from trainer.rollout import Batch, Labels
from trainer.shares import Place
from trainer.tally import Tally


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
        self.warm_from = 0  # step at which the warm-up began
        self.tokens = 0  # rollout starts trained on, passes counted
        self.missed: list[float] = []  # of each sequence in the last batch: share of starts with a wrong first draft
        self.peers: Peers = ALONE
        self.revision = 0  # grows whenever something other than a step changes parameters or moments
        self._rollouts = Rollouts(model)
        self.optimizer = make_optimizer(model, config)
        self._draft_head = target.lm_head[model.draft_ids]  # [D, H], the frozen judge
        self._bf16 = uses_bf16(config.precision, self._draft_head.device.type)

    def step(self, batch: Batch, place: Place | None = None) -> StepMetrics:
        """Roll out, measure the loss at every depth, go one step down its gradient.

        place: of `batch` in the whole batch, where it is a worker's share. Raises PeerLost, with nothing changed.
        """
        began = time.perf_counter()
        rate = self._warm_up()
        with torch.autocast(self._draft_head.device.type, torch.bfloat16, enabled=self._bf16):
            logits = self._rollouts(batch.context, batch.nodes)
            p = target_probabilities(batch.target_hidden.to(torch.float32), self._draft_head)  # [R, D]
            wanted = [p.index_select(0, label.target) for label in batch.labels]
            sums = self._judge.sums(logits, wanted, batch, self.model.draft_ids, self.steps)
        place = place or Place.whole(len(batch.nodes[0].bounds) - 1)
        whole = self._add_up(self._tally(batch, logits, sums, place), place)
        weights = self._judge.weigh(whole, self.steps)
        self.optimizer.zero_grad()
        torch.autograd.backward(self._judge.loss(sums, weights) * (1.0 if place.counts else 0.0))
        self.peers.add_gradients(self.model)
        grad_norm = self._clip()
        self.optimizer.step()
        self.steps += 1
        self.tokens += whole.rows
        self.missed = whole.missed
        return StepMetrics(
            step=self.steps,
            loss=self._judge.value(whole, weights),
            loss_per_depth=tuple(_ratios(whole.loss, whole.weight)),
            acceptance_per_depth=tuple(_ratios(whole.right, whole.known)),
            grad_norm=grad_norm.item(),
            learning_rate=rate,
            rows=whole.rows,
            rejected_rows=whole.rejected,
            actions=whole.actions,
            rl_share=weights.share,
            rl_loss=whole.policy_loss / whole.actions if whole.actions else 0.0,
            rl_clipped=whole.outside / whole.actions if whole.actions else 0.0,
            seconds=time.perf_counter() - began,
        )

    def _clip(self) -> Tensor:
        """Bound the norm of the gradient; returns what it was."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _add_up(self, own: Tally, place: Place) -> Tally:
        """The tally of the whole batch."""
        return Tally.of(self.peers.total(own.vector() * (1.0 if place.counts else 0.0)), len(own.loss))

    def _warm_up(self) -> float:
        """Set this step's learning rate: linear over the first steps, then constant."""
        rate = self.config.learning_rate * min(1.0, (self.steps - self.warm_from + 1) / self.config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _tally(self, batch: Batch, logits: list[Tensor], sums: Sums, place: Place) -> Tally:
        """What the rows of `batch` add up to."""
        right, known = torch.ones(0), list[Tensor]()
        found: list[Tensor] = []
        for nodes, label, logit in zip(batch.nodes, batch.labels, logits, strict=True):
            right = still_right(self.model, logit.detach(), label, right, nodes.parent)
            known.append(label.truth >= 0)
            found.append(right & known[-1])
        wrong, asked = place.spread(_firsts(found[0], known[0], batch.nodes[0].bounds))
        policy, missing = sums.policy, [0.0] * (self.config.ttt_steps - len(logits))
        return Tally(
            loss=(*sums.imitation.detach().tolist(), *missing),
            weight=(*sums.weights.tolist(), *missing),
            right=(*(float(level.sum()) for level in found), *missing),
            known=(*(float(level.sum()) for level in known), *missing),
            rows=batch.rows,
            rejected=sum(int(label.rejected.sum()) for label in batch.labels),
            actions=policy.actions if policy is not None else 0,
            policy_loss=policy.total.item() if policy is not None else 0.0,
            outside=int(policy.outside) if policy is not None else 0,
            wrong=wrong,
            asked=asked,
        )

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
        self.revision += 1

    def restart(self, model: Eagle3) -> None:
        """Go on from another drafter's weights, with empty Adam moments and a new warm-up."""
        self.model.load_state_dict(model.state_dict())
        self.optimizer.state.clear()
        self.warm_from = self.steps
        self.reload()

    def reload(self) -> None:
        """Follow a vocabulary that was written into the model from outside (a checkpoint, another worker)."""
        self._draft_head = self.target.lm_head[self.model.draft_ids]
        self.revision += 1


class Rollouts(nn.Module):
    """All depths of a batch in one forward pass of one module, which is what FSDP gathers its shards for."""

    def __init__(self, model: Eagle3) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Context, depths: list[Nodes]) -> list[Tensor]:
        """Logits [n, D] of the nodes of each depth, float32."""
        return [self.model.logits(state).float() for state in run_rollouts(self.model, context, depths)]


def make_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW without any moments yet."""
    return torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


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
    right = still_right(model, logits, label, before, parent)
    known = label.truth >= 0
    return right, float(right[known].float().mean()) if bool(known.any()) else 0.0


def still_right(model: Eagle3, logits: Tensor, label: Labels, before: Tensor, parent: Tensor) -> Tensor:
    """Which nodes [n] end a greedy draft that is right so far; see `accepted_share`."""
    right = model.draft_ids[logits.argmax(-1)] == label.truth
    return right & before[parent] if len(before) else right


def _firsts(right: Tensor, known: Tensor, bounds: tuple[int, ...]) -> list[tuple[int, int]]:
    """(wrong drafts, drafts whose truth is known) of each sequence."""
    hits, asked = right.tolist(), known.tolist()
    return [(sum(asked[a:b]) - sum(hits[a:b]), sum(asked[a:b])) for a, b in pairwise(bounds)]


def _ratios(sums: tuple[float, ...], weights: tuple[float, ...]) -> list[float]:
    return [total / weight if weight else 0.0 for total, weight in zip(sums, weights, strict=True)]
