"""Workers that take each optimiser step together, over torch.distributed: Gloo between CPUs, NCCL between GPUs.

Every worker holds the whole drafter and its moments and computes its share of the batch (`trainer.shares`). Two sums
cross the group in a step: the tally, a vector of some hundred numbers that holds what the means divide by, before the
backward pass; and the gradients after it, flattened into buckets that are all in flight at once. Equal sums and equal
state give equal steps, so weights are sent only when a group forms or the leader changed them.

Why not DistributedDataParallel: it hooks one module's `forward` and divides by the number of workers, while a rollout
calls the drafter's parts several times and a mean here divides by weights that only the whole batch knows; a worker
without rows would hang it, and it has to be built anew whenever the group changes. Adding up by hand is 20 lines.

A collective that fails or exceeds the time limit raises `PeerLost`; this group is then of no more use, and `close`
frees the others from waiting. Rank 0, the leader, keeps the store where a new group meets. It listens on the one
address that it is given, and so do Gloo and NCCL.
"""

import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

log = logging.getLogger(__name__)

_BUCKET_BYTES = 8 * 2**20
_MEET_S = 10.0  # for all that are to form a group to show up


class PeerLost(Exception):
    """A worker of the group died, hangs or left."""


class Peers(Protocol):
    """What an optimiser step asks of the others."""

    def total(self, values: Tensor) -> Tensor: ...
    def add_gradients(self, model: nn.Module) -> None: ...


class Alone:
    """No others."""

    def total(self, values: Tensor) -> Tensor:
        return values

    def add_gradients(self, model: nn.Module) -> None: ...


ALONE = Alone()


@dataclass(frozen=True)
class Meeting:
    """Where and with how many a group forms; each meeting has a number of its own."""

    host: str
    port: int
    number: int
    world: int
    timeout_s: float  # of a collective


class Host:
    """The leader's store, on one address of this machine."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        listener.bind((address, 0))
        listener.listen()
        self._port = listener.getsockname()[1]
        self.store = TCPStore(
            address, self._port, None, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._meetings = 0

    def call(self, world: int) -> Meeting:
        """A new meeting."""
        self._meetings += 1
        return Meeting(self._address, self._port, self._meetings, world, self._timeout_s)


class Group:
    """One worker's place in a group that has formed. A process is in one group at a time."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def total(self, values: Tensor) -> Tensor:
        """Sum of all workers' `values`, a CPU tensor."""
        with _lost_if_it_fails("the tallies"):
            dist.all_reduce(values)
        return values

    def add_gradients(self, model: nn.Module) -> None:
        """Replace every parameter's gradient by the sum of all workers'."""
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with _lost_if_it_fails("the gradients"), torch.no_grad():
            flying = [(bucket, flat, dist.all_reduce(flat, async_op=True)) for bucket, flat in _buckets(gradients)]
            for bucket, flat, work in flying:
                work.wait()
                if flat is not bucket[0]:
                    parts = flat.split([gradient.numel() for gradient in bucket])
                    for gradient, part in zip(bucket, parts, strict=True):
                        gradient.copy_(part.view_as(gradient))

    def follow_leader(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` by the leader's, which gives its own in the same order."""
        with _lost_if_it_fails("the weights"), torch.no_grad():
            for tensor in tensors:
                plain = tensor.detach().contiguous()
                dist.broadcast(plain.view(torch.uint8) if plain.dtype == torch.bool else plain, src=0)
                if plain.data_ptr() != tensor.data_ptr():
                    tensor.copy_(plain)

    def close(self) -> None:
        """Leave; whoever waits for this worker is freed by an error."""
        if dist.is_initialized():
            try:
                dist.destroy_process_group()
            except RuntimeError as error:
                log.debug("left a broken group: %s", error)


def join(meeting: Meeting, rank: int, device: str, store: Store | None = None) -> Group:
    """Form the group of a meeting; the leader gives its own `store`. Raises PeerLost when not all come."""
    with _lost_if_it_fails("the others"):
        if store is None:
            store = TCPStore(meeting.host, meeting.port, timeout=timedelta(seconds=_MEET_S))
        place = PrefixStore(str(meeting.number), store)
        _meet(place, rank, meeting.world)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(
            backend, store=place, rank=rank, world_size=meeting.world, timeout=timedelta(seconds=meeting.timeout_s)
        )
    return Group(rank, meeting.world)


def _meet(place: Store, rank: int, world: int) -> None:
    """Wait until all are here: connecting to one that died would last as long as a collective may."""
    limit = timedelta(seconds=_MEET_S)
    place.set(f"here {rank}", "")
    place.wait([f"here {other}" for other in range(world)], limit)


def use_interface(address: str) -> None:
    """Let Gloo and NCCL of this process listen on the interface that has `address`; one the user named stays.

    NCCL's collectives are told to fail at their time limit instead of ending the process.
    """
    for name, held in psutil.net_if_addrs().items():
        if any(each.address == address for each in held):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")


@contextmanager
def _lost_if_it_fails(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the base of all that torch.distributed raises
        raise PeerLost(f"{what}: {' '.join(str(error).split())[:200]}") from error


def _buckets(tensors: list[Tensor]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Tensors in order, grouped up to some MiB, with each group as one flat tensor: itself where it is one alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > _BUCKET_BYTES:
            yield bucket, _flat(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket, _flat(bucket)


def _flat(bucket: list[Tensor]) -> Tensor:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        return bucket[0]
    return torch.cat([tensor.flatten() for tensor in bucket])
