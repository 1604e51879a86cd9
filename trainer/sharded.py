"""A learner whose weights, gradients and moments lie in shards over the workers (FSDP2): for large drafters.

All of the drafter is one FSDP unit: `Rollouts.forward` gathers the parameters, runs every depth of the batch with them
and frees them; the backward pass gathers them once more and leaves each worker the sum of its shard's gradients. A unit
for each part would gather the same weights once a depth. Adam then works on shards alone. The sums are the same as of
workers with whole copies (`trainer.parallel`): of losses, not means, and not divided by the number of workers.

A lost worker takes its shards along, so that training goes back to what was gathered last (`gather`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from drafters.eagle3 import Eagle3
from trainer.learner import Learner, StepMetrics, make_optimizer
from trainer.parallel import Group, PeerLost
from trainer.rollout import Batch
from trainer.shares import Place

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Summed:
    """The group of a sharded learner: FSDP adds the gradients up."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def total(self, values: Tensor) -> Tensor:
        return self._group.total(values)

    def add_gradients(self, model: nn.Module) -> None: ...


class ShardedLearner(Learner):
    """Made from learners that are the same on every worker of `group`; they are left as they are."""

    def __init__(self, whole: Learner, group: Group) -> None:
        model = Eagle3(whole.model.config, whole.target.embed_tokens)
        model.load_state_dict(whole.model.state_dict())
        super().__init__(model, whole.target, whole.config)
        self.steps, self.tokens, self.warm_from = whole.steps, whole.tokens, whole.warm_from
        mesh = init_device_mesh(whole.target.lm_head.device.type, (group.world,))
        sharded = fully_shard(self._rollouts, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        self.optimizer = make_optimizer(self.model, self.config)
        for mine, theirs in zip(self.model.parameters(), whole.model.parameters(), strict=True):
            state = whole.optimizer.state.get(theirs)
            if state:
                self.optimizer.state[mine] = {
                    **{name: _shard(state[name], cast("DTensor", mine)) for name in _MOMENTS},
                    "step": state["step"].clone(),
                }
        self.peers = _Summed(group)

    def step(self, batch: Batch, place: Place | None = None) -> StepMetrics:
        """As `Learner.step`; all workers must take it. After PeerLost the shards are of no more use."""
        with _lost_if_it_fails():
            return super().step(batch, place)

    def gather(self, whole: Learner | None) -> None:
        """Write weights, moments and counters to `whole`, or give them to those who do; all workers must call it.

        After PeerLost `whole` is as it was.
        """
        found: list[tuple[Tensor, dict[str, Tensor]]] = []
        with _lost_if_it_fails(), torch.no_grad():
            for mine in self.model.parameters():
                weight = _full(mine).clone()
                moments = {name: _full(value).clone() for name, value in self.optimizer.state.get(mine, {}).items()}
                found += [(weight, moments)] if whole is not None else []
        if whole is None:
            return
        for theirs, (weight, moments) in zip(whole.model.parameters(), found, strict=True):
            theirs.detach().copy_(weight)
            whole.optimizer.state[theirs] = moments
        whole.steps, whole.tokens, whole.warm_from = self.steps, self.tokens, self.warm_from


def _shard(tensor: Tensor, like: DTensor) -> Tensor:
    """This worker's shard of a tensor that all hold, placed as the parameter `like`."""
    return cast("Tensor", distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _lost_if_it_fails() -> Iterator[None]:
    """FSDP's collectives are inside of its hooks; want of memory is no want of workers."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(f"the shards: {' '.join(str(error).split())[:200]}") from error
