"""Policy gradient from verified drafts: pure, one value an action.

The drafter is the policy, a drafted token the action, verification the environment, reward the accepted tokens. Only
actions that had an effect count: the accepted tokens of a draft and its first rejected one (`trainer.rollout.Actions`).

- *Return* of an action: discounted accepted tokens from it on.
- *Baseline*: what the return would be if each of the draft's remaining tokens were accepted with alpha = sum min(p, q)
  of the action's node, the chance of rejection sampling. It depends on the node and not on the action, so it leaves
  the gradient unbiased, and it needs no running statistics. p is the target's at temperature 1.
- *Importance ratio*: pi(token) now over the q with which the token was drafted, clipped as in PPO (Schulman et al.
  2017), pi at the temperature at which it was drafted. Greedy drafts are logged with q = 1, since the drafter could say
  nothing else; the softmax pi that is trained is then another policy than the argmax that drafted, and the ratio is
  pi(token) itself: how likely the softmax repeats what the argmax said. An accepted token is raised the more the surer
  the drafter is of it; a rejected one is lowered only while pi(token) > 1 - clip: where greedy drafting errs with
  confidence.
- What verification accepts is taken as given. That is so for greedy drafts, which are accepted when the target says
  them. A sampled draft is accepted with probability min(1, p / q), which changes with q: there `accepted_length`
  (`trainer.losses`) has the exact gradient, and this one goes on raising tokens that already have more than p.
- *Anchor*: KL(drafter || target) at the actions' nodes, against the target's p there: the direction in which a policy
  is usually kept near a reference (Ziegler et al. 2019); it forbids tokens that the target would not say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aurora.config import RLConfig
from trainer.losses import reverse_kl, total_variation
from trainer.rollout import Actions

_LEAST_Q = 1e-6  # of a drafted token: rounding must not make its ratio infinite


@dataclass(frozen=True, eq=False)
class Policy:
    """The policy's part of one optimiser step."""

    total: Tensor  # scalar: surrogate and anchor, summed over the actions
    actions: int
    outside: Tensor  # scalar: actions whose ratio is outside of 1 - clip .. 1 + clip

    @property
    def loss(self) -> Tensor:
        """Mean over the actions."""
        return self.total / self.actions

    @property
    def clipped(self) -> float:
        """Share of the actions whose ratio is outside of the clip."""
        return self.outside.item() / self.actions


def share_at(config: RLConfig, step: int) -> float:
    """Share of the policy gradient in the loss of optimiser step `step`; imitation has the rest.

    0 up to `after_steps`, then linear over `ramp_steps` to `weight`.
    """
    return config.weight * min(max((step - config.after_steps) / config.ramp_steps, 0.0), 1.0)


def discounted_return(accepted: Tensor, discount: float) -> Tensor:
    """Sum of discount ** i over i < accepted, [m], of the tokens accepted from each action on, [m] int64."""
    gains = discount ** torch.arange(_longest(accepted), device=accepted.device, dtype=torch.float32)
    return torch.cat([gains.new_zeros(1), gains.cumsum(0)])[accepted]


def expected_return(alpha: Tensor, left: Tensor, discount: float) -> Tensor:
    """Expected discounted return [m] when each of `left` [m] tokens is accepted with probability alpha [m]."""
    steps = torch.arange(1, _longest(left) + 1, device=left.device)
    terms = discount ** (steps - 1) * alpha[:, None] ** steps  # [m, longest]
    return terms.where(steps <= left[:, None], 0.0).sum(-1)


def clipped_surrogate(log_pi: Tensor, q: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(r A, clip(r, 1 - clip, 1 + clip) A), [m], with r = pi / q; all arguments [m]."""
    ratio = log_pi.exp() / q
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def policy_gradient(
    logits: Sequence[Tensor], p: Sequence[Tensor], actions: Sequence[Actions], draft_ids: Tensor, config: RLConfig
) -> Policy | None:
    """Surrogate and anchor over all actions of a batch's depths; None without any.

    logits, p: [n, D] of the nodes of each depth; draft_ids [D]: ascending ids of the draft vocabulary. An action whose
    token has left the draft vocabulary does not count.
    """
    losses, ratios = [], []
    for logit, target, taken in zip(logits, p, actions, strict=True):
        column = torch.searchsorted(draft_ids, taken.token).clamp_max(len(draft_ids) - 1)
        known = draft_ids[column] == taken.token
        node, column = taken.node[known], column[known]
        here, said = logit[node], target[node]
        log_q = (here / taken.temperature[known, None]).log_softmax(-1)
        log_pi = log_q.gather(-1, column[:, None]).squeeze(-1)
        alpha = 1.0 - total_variation(here.detach(), said)
        gained = discounted_return(taken.accepted[known], config.discount)
        advantage = gained - expected_return(alpha, taken.left[known], config.discount)
        q = taken.q[known].clamp_min(_LEAST_Q)
        losses.append(clipped_surrogate(log_pi, q, advantage, config.clip) + config.anchor * reverse_kl(here, said))
        ratios.append(log_pi.detach().exp() / q)
    loss = torch.cat(losses)
    if len(loss) == 0:
        return None
    outside = (torch.cat(ratios) - 1.0).abs() > config.clip
    return Policy(loss.sum(), len(loss), outside.sum())


def _longest(counts: Tensor) -> int:
    return int(counts.max()) if len(counts) else 0
