"""Several workers behind one learner: the leader's side. The helpers' is `trainer.member`.

The leader owns everything; a helper is told its share of each step and answers nothing but that it is done. So the
helpers compute exactly while the leader does, within its budget. Which helpers take part is settled between steps: one
that is ready is admitted and gets the leader's weights, moments and counters; when a step fails for want of a worker
(it died, or a collective ran into its time limit) the group forms anew from those that answer and the same step is
taken again. The leader's state is the truth: it changes only after all that has to be added up has been. A helper that
comes back later joins again. With none left the leader trains alone; nobody waits without a limit.

With `trainer.sharded` the steps are taken by a `ShardedLearner`, and the leader's own is brought up to date (`settle`)
before it is judged, published, saved or sent to a larger group. A worker that is lost takes its shards along: then
training goes back to that state.
"""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

from trainer.learner import Learner, StepMetrics
from trainer.member import take_step, working_copy
from trainer.parallel import ALONE, Group, Host, PeerLost, join, use_interface
from trainer.rollout import Batch
from trainer.sharded import ShardedLearner
from trainer.shares import Windows, split

log = logging.getLogger(__name__)

_ANSWER_S = 3.0  # in which those that are left say so after one was lost; later ones join later
_AGAIN_S = 5.0  # between two tries to reach helpers that failed
_TRIES = 2  # of a step with others before the leader takes it alone
_STEPS_A_COPY = 500  # after which weights are sent again: machines that differ round differently


class Helper(Protocol):
    """A process with a `Member`. Calls are executed in order; that of a dead process has an exception."""

    def submit(self, method: str, *args: Any) -> Future[Any]: ...
    def close(self) -> None: ...


class Crew:
    """The leader's side. One thread calls everything here; `helpers` may still be starting, or die."""

    def __init__(
        self, learner: Learner, helpers: Sequence[Helper], address: str, device: str, timeout_s: float
    ) -> None:
        """address: of this machine, where the group meets; timeout_s: of a collective."""
        self._learner, self._device = learner, device
        self.working = learner  # what takes the steps
        self._settled = learner.steps, learner.tokens  # when `learner` was last up to date
        self._helpers = list(helpers)
        use_interface(address)
        self._host = Host(address, timeout_s)
        self._group: Group | None = None
        self._members: list[Helper] = []  # of the group, in order of rank from 1 on
        self._ready = {helper: helper.submit("ready") for helper in self._helpers}  # of those in no group
        self._asked_s = time.monotonic()  # those that had failed
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
                self._lose(error)
        self._learner.peers = ALONE
        alone = split(windows, 1, self._learner.config.ttt_steps)[0]
        return take_step(self._learner, alone, oldest_version, self._device)

    def _step(self, group: Group, windows: Windows, oldest_version: int) -> tuple[StepMetrics, Batch]:
        learner = self._learner
        shares = split(windows, group.world, learner.config.ttt_steps)
        revision, steps = self._copied
        drifts = not learner.config.sharded and learner.steps >= steps + _STEPS_A_COPY
        copy = revision != learner.revision or drifts
        for helper, share in zip(self._members, shares[1:], strict=True):
            helper.submit("step", share, oldest_version, copy)
        if copy:
            self.working = working_copy(learner, group)
            self._copied = learner.revision, learner.steps
            self._settled = learner.steps, learner.tokens
        metrics, batch = take_step(self.working, shares[0], oldest_version, self._device)
        learner.steps, learner.tokens, learner.missed = metrics.step, self.working.tokens, self.working.missed
        return metrics, batch

    def settle(self) -> None:
        """Bring the leader's learner up to date, as far as its workers are there to ask."""
        working = self.working
        if not isinstance(working, ShardedLearner) or self._settled == (working.steps, working.tokens):
            return
        for helper in self._members:
            helper.submit("gather")
        try:
            working.gather(self._learner)
            self._settled = working.steps, working.tokens
        except PeerLost as error:
            self._lose(error)

    def _lose(self, error: PeerLost) -> None:
        """End a group that broke."""
        self.lost += 1
        log.warning("a training worker was lost at step %d: %s", self._learner.steps, error)
        if isinstance(self.working, ShardedLearner):
            self._learner.steps, self._learner.tokens = self._settled
            log.warning("its shards went with it: training goes back to step %d", self._learner.steps)
        self.part()

    def wait_for_all(self, limit_s: float) -> bool:
        """Wait until all helpers take part; False when they do not within `limit_s`."""
        end_s = time.monotonic() + limit_s
        while self.size <= len(self._helpers) and (left_s := end_s - time.monotonic()) > 0:
            pending = [ready for ready in self._ready.values() if not ready.done()]
            if pending:
                wait(pending, left_s, FIRST_COMPLETED)
            else:
                time.sleep(min(left_s, _AGAIN_S))
            self._admit()
        return self.size > len(self._helpers)

    def _admit(self) -> None:
        """Form a larger group when helpers have become ready."""
        failed = [helper for helper, ready in self._ready.items() if ready.done() and ready.exception() is not None]
        if failed and time.monotonic() > self._asked_s + _AGAIN_S:  # what cannot start must not be started in a loop
            self._asked_s = time.monotonic()
            self._ready |= {helper: helper.submit("ready") for helper in failed}
        new = [helper for helper, ready in self._ready.items() if ready.done() and ready.exception() is None]
        if not new:
            return
        self.settle()
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
        """End the group, with its shards; those that answer soon are ready for the next one."""
        self._close_group()
        self._ready |= {helper: helper.submit("ready") for helper in self._members}
        self._members = []
        wait(list(self._ready.values()), _ANSWER_S)

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._copied, self.working = None, (-1, -1), self._learner

    def close(self) -> None:
        """End the helpers."""
        self._close_group()
        for helper in self._helpers:
            helper.close()
