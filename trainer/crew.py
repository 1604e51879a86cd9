"""Several workers behind one learner: the leader's side (`Crew`) and the helpers' (`Member`).

The leader owns everything; a helper is told its share of each step and answers nothing but that it is done. So the
helpers compute exactly while the leader does, within its budget. Which helpers take part is settled between steps: one
that is ready is admitted and gets the leader's weights, moments and counters; when a step fails for want of a worker
(it died, or a collective ran into its time limit) the group forms anew from those that answer and the same step is
taken again. The leader's state is the truth: it changes only after all that has to be added up has been. A helper that
comes back later joins again. With none left the leader trains alone; nobody waits without a limit.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import torch
from torch import Tensor

from aurora.config import TrainerConfig
from drafters.config import Eagle3Config
from drafters.eagle3 import Eagle3
from drafters.target import TargetWeights
from trainer.learner import Learner, StepMetrics
from trainer.parallel import ALONE, Group, Host, Meeting, PeerLost, join, use_interface
from trainer.rollout import Batch, build_batch
from trainer.shares import Share, Windows, split

log = logging.getLogger(__name__)

_ANSWER_S = 3.0  # in which those that are left say so after one was lost; later ones join later
_TRIES = 2  # of a step with others before the leader takes it alone
_STEPS_A_COPY = 500  # after which weights are sent again: machines that differ round differently
_EVERY_ROW = 2**62  # of a share is context
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Helper(Protocol):
    """A process with a `Member`. Calls are executed in order; that of a dead process has an exception."""

    def submit(self, method: str, *args: Any) -> Future[Any]: ...
    def close(self) -> None: ...


class Member:
    """The helper's side: a learner that follows the leader's."""

    def __init__(self, settings: TrainerConfig, target: TargetWeights, device: str) -> None:
        self._settings, self._target, self._device = settings, target, device
        self._learner: Learner | None = None
        self._group: Group | None = None

    def ready(self) -> int:
        """Whoever gets this process's id knows that it is in no step."""
        return os.getpid()

    def join(self, meeting: Meeting, rank: int, drafter: Eagle3Config) -> bool:
        """Form a group; False when the others did not come."""
        self.leave()
        if self._learner is None:
            self._learner = Learner(Eagle3(drafter, self._target.embed_tokens), self._target, self._settings)
        try:
            self._group = join(meeting, rank, self._device)
        except PeerLost as error:
            log.warning("no group: %s", error)
        return self._group is not None

    def step(self, share: Share, oldest_version: int, copy: bool) -> bool:
        """Take part in a step, with a copy of the leader's state first where it says so; False when one was lost."""
        if self._group is None or self._learner is None:
            return False
        try:
            if copy:
                copy_state(self._learner, self._group)
            self._learner.peers = self._group
            take_step(self._learner, share, oldest_version, self._device)
        except PeerLost as error:
            log.warning("left the group: %s", error)
            self.leave()
        except BaseException:
            self.leave()  # the others need not wait for the time limit
            raise
        return self._group is not None

    def leave(self) -> None:
        """Be in no group."""
        if self._group is not None:
            self._group.close()
        self._group = None


class Crew:
    """The leader's side. One thread calls everything here; `helpers` may still be starting, or die."""

    def __init__(
        self, learner: Learner, helpers: Sequence[Helper], address: str, device: str, timeout_s: float
    ) -> None:
        """address: of this machine, where the group meets; timeout_s: of a collective."""
        self._learner, self._device = learner, device
        self._helpers = list(helpers)
        use_interface(address)
        self._host = Host(address, timeout_s)
        self._group: Group | None = None
        self._members: list[Helper] = []  # of the group, in order of rank from 1 on
        self._ready = {helper: helper.submit("ready") for helper in self._helpers}  # of those in no group
        self._process: dict[Helper, int] = {}  # as each said when it was last ready
        self._copied = (-1, -1)  # revision and step that all members have
        self.lost = 0  # times that a group broke

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers that take part, the leader's first."""
        return [os.getpid(), *(self._process[helper] for helper in self._members)]

    @property
    def size(self) -> int:
        """Workers that take part, the leader included."""
        return 1 + len(self._members)

    def step(self, windows: Windows, oldest_version: int) -> tuple[StepMetrics, Batch]:
        """One optimiser step on the batch of `windows`; also returns the leader's share of it."""
        for _ in range(_TRIES):
            self._admit()
            if self._group is None:
                break
            try:
                return self._step(self._group, windows, oldest_version)
            except PeerLost as error:
                self.lost += 1
                log.warning("a training worker was lost, the step is taken again: %s", error)
                self.part()
        self._learner.peers = ALONE
        alone = split(windows, 1, self._learner.config.ttt_steps)[0]
        return take_step(self._learner, alone, oldest_version, self._device)

    def _step(self, group: Group, windows: Windows, oldest_version: int) -> tuple[StepMetrics, Batch]:
        learner = self._learner
        shares = split(windows, group.world, learner.config.ttt_steps)
        revision, steps = self._copied
        copy = revision != learner.revision or learner.steps >= steps + _STEPS_A_COPY
        for helper, share in zip(self._members, shares[1:], strict=True):
            helper.submit("step", share, oldest_version, copy)
        if copy:
            copy_state(learner, group)
            self._copied = learner.revision, learner.steps
        learner.peers = group
        return take_step(learner, shares[0], oldest_version, self._device)

    def gather(self, limit_s: float) -> bool:
        """Wait until all helpers take part; False when they do not within `limit_s`."""
        end_s = time.monotonic() + limit_s
        while self.size <= len(self._helpers) and (left_s := end_s - time.monotonic()) > 0:
            wait(list(self._ready.values()), left_s)
            self._admit()
        return self.size > len(self._helpers)

    def _admit(self) -> None:
        """Form a larger group when helpers have become ready."""
        for helper, ready in self._ready.items():
            if ready.done() and ready.exception() is not None:
                self._ready[helper] = helper.submit("ready")
        new = [helper for helper, ready in self._ready.items() if ready.done() and ready.exception() is None]
        if not new:
            return
        self._close_group()
        members = [*self._members, *new]
        meeting = self._host.call(1 + len(members))
        for rank, helper in enumerate(members, 1):
            if helper in self._ready:
                self._process[helper] = self._ready.pop(helper).result()
            helper.submit("join", meeting, rank, self._learner.model.config)
        self._members = members
        try:
            self._group = join(meeting, 0, self._device, self._host.store)
            log.info("training with %d workers", self._group.world)
        except PeerLost as error:
            log.warning("no group of training workers formed: %s", error)
            self.part()

    def part(self) -> None:
        """End the group; those that answer soon are ready for the next one."""
        self._close_group()
        self._ready |= {helper: helper.submit("ready") for helper in self._members}
        self._members = []
        wait(list(self._ready.values()), _ANSWER_S)

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._copied = None, (-1, -1)

    def close(self) -> None:
        """End the helpers."""
        self._close_group()
        for helper in self._helpers:
            helper.close()


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
