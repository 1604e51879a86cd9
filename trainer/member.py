"""The helper's side of several workers (`trainer.crew`), and the work that every one of them does."""

import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from aurora.config import TrainerConfig
from drafters.config import Eagle3Config
from drafters.eagle3 import Eagle3
from drafters.target import TargetWeights
from trainer.learner import Learner, StepMetrics
from trainer.parallel import Group, Meeting, PeerLost, join
from trainer.rollout import Batch, build_batch
from trainer.sharded import ShardedLearner
from trainer.shares import Share

log = logging.getLogger(__name__)

_EVERY_ROW = 2**62  # of a share is context
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Member:
    """A learner that follows the leader's. Its methods are called one after another."""

    def __init__(self, settings: TrainerConfig, target: TargetWeights, device: str) -> None:
        self._settings, self._target, self._device = settings, target, device
        self._drafter: Eagle3Config | None = None
        self._working: Learner | None = None  # from the first copy of the leader's state on
        self._group: Group | None = None

    def ready(self) -> int:
        """Whoever gets this process's id knows that it is in no step."""
        return os.getpid()

    def join(self, meeting: Meeting, rank: int, drafter: Eagle3Config) -> bool:
        """Form a group to train a drafter of such sizes; False when the others did not come."""
        self.leave()
        self._drafter = drafter
        try:
            self._group = join(meeting, rank, self._device)
        except PeerLost as error:
            log.warning("no group: %s", error)
        return self._group is not None

    def step(self, share: Share, oldest_version: int, copy: bool) -> bool:
        """Take part in a step, with a copy of the leader's state first where it says so; False when one was lost."""
        if self._group is None:
            return False
        try:
            if copy:
                self._working = working_copy(self._whole(), self._group)
            assert self._working is not None, "a group begins with a copy"
            take_step(self._working, share, oldest_version, self._device)
        except PeerLost as error:
            log.warning("left the group: %s", error)
            self.leave()
        except BaseException:
            self.leave()  # the others need not wait for the time limit
            raise
        return self._group is not None

    def gather(self) -> bool:
        """Give the leader this worker's shards; False when one was lost."""
        if not isinstance(self._working, ShardedLearner):
            return False
        try:
            self._working.gather(None)
        except PeerLost as error:
            log.warning("left the group: %s", error)
            self.leave()
        return self._group is not None

    def leave(self) -> None:
        """Be in no group."""
        if self._group is not None:
            self._group.close()
        self._group = self._working = None

    def _whole(self) -> Learner:
        """A learner whose state is still to be filled in."""
        assert self._drafter is not None
        return Learner(Eagle3(self._drafter, self._target.embed_tokens), self._target, self._settings)


def take_step(learner: Learner, share: Share, oldest_version: int, device: str) -> tuple[StepMetrics, Batch]:
    """One worker's part of an optimiser step; returns what the whole batch showed, and the share's own batch."""
    settings = learner.config
    batch = build_batch(
        share.windows,
        settings.ttt_steps,
        oldest_version=oldest_version,
        rejected=settings.learns_rejected,
        device=device,
        max_context=_EVERY_ROW,
    )
    return learner.step(batch, share.place), batch


def working_copy(learner: Learner, group: Group) -> Learner:
    """What takes this worker's steps, in the leader's state: `learner` itself, or one with a shard of it."""
    copy_state(learner, group)
    if learner.config.sharded:
        return ShardedLearner(learner, group)
    learner.peers = group
    return learner


def copy_state(learner: Learner, group: Group) -> None:
    """Give every worker the leader's weights, vocabulary, moments and counters."""
    parameters = list(learner.model.parameters())
    moments = all(learner.optimizer.state.get(p) for p in parameters)
    counters = torch.tensor([learner.steps, learner.tokens, learner.warm_from, int(moments)])
    group.follow_leader([counters])
    learner.steps, learner.tokens, learner.warm_from, moments = counters.tolist()
    group.follow_leader(learner.model.state_dict().values())
    if group.rank:
        learner.optimizer.state.clear()
    if moments:
        group.follow_leader(_moments(learner, make=group.rank > 0))
    if group.rank:
        learner.reload()


def _moments(learner: Learner, make: bool) -> Iterator[Tensor]:
    """AdamW's state of every parameter in order; `make`: zeros first."""
    for parameter in learner.model.parameters():
        state = learner.optimizer.state[parameter]
        if make:
            fused_on_gpu = parameter.device.type == "cuda"
            step = torch.zeros((), dtype=torch.float32, device=parameter.device if fused_on_gpu else "cpu")
            state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter), step=step)
        yield from (state[name] for name in _MOMENTS)
