"""Where the parts of a deployment go on a cluster's nodes, and why: replicas of the server and one trainer.

A replica has its GPUs to itself, `tensor_parallel` of one node; where no node has a GPU, it runs on CPUs. The trainer
gets a GPU of its own if one is left over, else a part of a replica's, in whose gaps it computes, else CPUs. Nodes of a
cluster that gives roles ("serve" and "train" among Ray's custom resources) take one part for each unit of its role.

Replicas are all alike, so that a placement exists if and only if the nodes' capacities beside the trainer add up.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from aurora.config import AuroraConfig, UserError, require_positive
from aurora.model_size import ModelSize

TrainerPlace = Literal["auto", "gpu", "shared", "cpu", "none"]
_MODES: Mapping[str, tuple[str, ...]] = {"auto": ("gpu", "shared", "cpu")}
_GIB = 1 << 30
_WORKING = 2 * _GIB  # of a GPU or of memory: a server's activations, graphs and libraries
_TRAINER_WORKING = 1 * _GIB  # the trainer's
_USED = 0.95  # share of a GPU's memory that is given out
_ACCELERATORS = {"T4": 16, "L4": 24, "A10G": 24, "V100": 16, "L40S": 48, "A100-40G": 40, "A100-80G": 80, "H100": 80}
_ACCELERATORS |= {"A100": 40, "H200": 141, "B200": 180}  # GiB, by Ray's names; of an A100 the smaller one


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has to give."""

    name: str
    cpus: int
    gpus: int = 0
    gpu_bytes: int = 0  # of each
    memory_bytes: int = 0  # 0: unknown
    serve: int | None = None  # replicas that its role lets it take; None: it has no such role
    train: int | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be placed. Raises UserError for values that make no sense."""

    replicas: int = 1
    tensor_parallel_size: int = 1
    room_tokens: int = 16384  # that each replica's KV cache must have room for, at least
    server_cpus: int = 1  # of each replica, at least
    trainer_cpus: int = 1
    trainer: TrainerPlace = "auto"
    duty: float = 0.5  # `trainer.duty`

    def __post_init__(self) -> None:
        require_positive(self, "replicas", "tensor_parallel_size", "room_tokens", "server_cpus", "trainer_cpus")
        if self.trainer not in get_args(TrainerPlace):
            raise UserError(f"--trainer {self.trainer}: give one of {', '.join(get_args(TrainerPlace))}")


@dataclass(frozen=True)
class Seat:
    """What one part gets."""

    part: str  # "replica 0", "trainer"
    node: str
    cpus: int
    gpus: tuple[int, ...]  # of the node, rank by rank
    bytes_each: int  # that it takes at least, of each GPU or, without one, of the node's memory


@dataclass(frozen=True)
class Placement:
    """Where everything goes."""

    kind: Literal["CPUs", "GPUs and a trainer on CPUs", "shared GPU", "GPUs split", "nodes split", "no trainer"]
    seats: tuple[Seat, ...]
    why: tuple[str, ...]


def place(nodes: Sequence[Node], model: ModelSize, wanted: Wanted) -> Placement:
    """The first possible way of the module's order. Raises UserError with reason and remedy when there is none."""
    problem = _Problem(nodes, model, wanted)
    for mode in problem.modes:
        for trainer in problem.trainer_nodes(mode):
            room = problem.capacities(mode, trainer)
            if sum(room) >= wanted.replicas and (mode != "shared" or room[trainer] >= 1):
                return problem.seated(mode, trainer, room)
    raise UserError(problem.refusal())


@dataclass(frozen=True)
class _Problem:
    """Nodes, and what is to go there."""

    nodes: Sequence[Node]
    model: ModelSize
    wanted: Wanted

    @property
    def on_gpus(self) -> bool:
        return any(node.gpus for node in self.nodes)

    @property
    def modes(self) -> tuple[str, ...]:
        """Of the trainer, best first."""
        modes = _MODES.get(self.wanted.trainer, (self.wanted.trainer,))
        return modes if self.on_gpus else tuple(mode for mode in modes if mode in ("cpu", "none"))

    @property
    def server_bytes(self) -> int:
        """Of each of a replica's GPUs, or of memory."""
        size = self.model.weight_bytes + self.wanted.room_tokens * self.model.kv_token_bytes
        return _WORKING + (-(-size // self.wanted.tensor_parallel_size) if self.on_gpus else size)

    @property
    def trainer_bytes(self) -> int:
        return self.model.trainer_bytes + _TRAINER_WORKING

    def trainer_nodes(self, mode: str) -> Iterator[int]:
        """Nodes that can take the trainer, those first that cost the fewest replicas; one place -1 for none."""
        if mode == "none":
            yield -1
            return
        roles = any(node.train is not None for node in self.nodes)
        able = [i for i, node in enumerate(self.nodes) if self._takes_trainer(node, mode, roles)]
        yield from sorted(able, key=lambda i: -sum(self.capacities(mode, i)))

    def _takes_trainer(self, node: Node, mode: str, roles: bool) -> bool:
        if node.cpus < self.wanted.trainer_cpus or (roles and not node.train):
            return False
        if mode == "cpu":
            return not node.memory_bytes or node.memory_bytes >= self.trainer_bytes
        return node.gpus > 0 and usable(node) >= self.trainer_bytes + (self.server_bytes if mode == "shared" else 0)

    def capacities(self, mode: str, trainer: int) -> list[int]:
        """Replicas that each node can take beside the trainer on node `trainer`."""
        return [self._capacity(node, mode if i == trainer else "none") for i, node in enumerate(self.nodes)]

    def _capacity(self, node: Node, mode: str) -> int:
        if any(each.serve is not None for each in self.nodes) and not node.serve:
            return 0
        cpus = node.cpus - (0 if mode == "none" else self.wanted.trainer_cpus)
        limits = [cpus // self.wanted.server_cpus, *([node.serve] if node.serve else [])]
        if self.on_gpus:
            fits = usable(node) >= self.server_bytes
            limits.append((node.gpus - (mode == "gpu")) // self.wanted.tensor_parallel_size if fits else 0)
        elif node.memory_bytes:
            limits.append((node.memory_bytes - (self.trainer_bytes if mode == "cpu" else 0)) // self.server_bytes)
        return max(min(limits), 0)

    def seated(self, mode: str, trainer: int, room: list[int]) -> Placement:
        """Replicas spread over the nodes with room, and the trainer."""
        count = [0] * len(room)
        if mode == "shared":
            count[trainer] = 1
        while sum(count) < self.wanted.replicas:
            count[max(range(len(room)), key=lambda i: (room[i] - count[i], -i))] += 1
        seats = list(self._replicas(count, mode, trainer))
        kind: Any = "no trainer"
        if mode != "none":
            node = self.nodes[trainer]
            gpus = {"gpu": (node.gpus - 1,), "shared": (0,), "cpu": ()}[mode]
            seats.append(Seat("trainer", node.name, self.wanted.trainer_cpus, gpus, self.trainer_bytes))
            on_gpu = "GPUs split" if count[trainer] else "nodes split"
            on_cpu = "GPUs and a trainer on CPUs" if self.on_gpus else "CPUs"
            kind = {"gpu": on_gpu, "shared": "shared GPU", "cpu": on_cpu}[mode]
        return Placement(kind, tuple(seats), tuple(self._why(mode, trainer)))

    def _replicas(self, count: list[int], mode: str, trainer: int) -> Iterator[Seat]:
        """On CPUs they share what their node has left."""
        tp = self.wanted.tensor_parallel_size
        places = [(i, j) for i, n in enumerate(count) for j in range(n)]
        for number, (i, j) in enumerate(places):
            node, cpus = self.nodes[i], self.wanted.server_cpus
            if not self.on_gpus:
                cpus = (node.cpus - (self.wanted.trainer_cpus if i == trainer and mode == "cpu" else 0)) // count[i]
            gpus = tuple(range(j * tp, (j + 1) * tp)) if self.on_gpus else ()
            yield Seat(f"replica {number}", node.name, cpus, gpus, self.server_bytes)

    def _why(self, mode: str, trainer: int) -> Iterator[str]:
        tp, need = self.wanted.tensor_parallel_size, gib(self.server_bytes)
        what = f"weights of {gib(self.model.weight_bytes)}, {self.wanted.room_tokens} tokens of KV cache"
        if self.on_gpus:
            yield f"a replica takes at least {need} of each of {tp} GPU{'s' if tp > 1 else ''} ({what})"
        else:
            yield f"no node has a GPU: a replica takes at least {need} of memory ({what}) and the CPUs that are left"
        if tp > 1:
            yield "tensor parallelism stays within a node; traces are captured on rank 0, where states are whole"
        duty = f"{self.wanted.duty:.0%} of the time (trainer.duty) while requests are open, all of it while none is"
        if mode in ("gpu", "none"):
            yield "there is a GPU left over for the trainer" if mode == "gpu" else "no trainer was asked for"
            return
        node = self.nodes[trainer]
        if mode == "shared":
            left = usable(node) - self.trainer_bytes
            yield f"no GPU is left over: the trainer computes in a replica's gaps, {duty}"
            yield (
                f"it takes {gib(self.trainer_bytes)} of {gib(node.gpu_bytes)}: replica 0 gets "
                f"--gpu-memory-utilization {left / node.gpu_bytes:.2f}"
            )
        else:
            yield f"the trainer computes on {self.wanted.trainer_cpus} CPU of {node.name} at idle priority, {duty}"

    def refusal(self) -> str:
        """What is missing, and what to do."""
        tp, most = self.wanted.tensor_parallel_size, max((node.gpus for node in self.nodes), default=0)
        if self.on_gpus and most < tp:
            return f"--tensor-parallel-size {tp}: the largest node has {most} GPUs; give at most {most}"
        largest = max((usable(node) for node in self.nodes), default=0)
        if self.on_gpus and largest < self.server_bytes:
            return (
                f"{self.model.name}: a replica needs {gib(self.server_bytes)} of each GPU, the largest gives "
                f"{gib(largest)}; raise --tensor-parallel-size {tp} or lower --room-tokens {self.wanted.room_tokens}"
            )
        without = sum(self.capacities("none", -1))
        if without < self.wanted.replicas:
            return f"--replicas {self.wanted.replicas}: there is room for {without}; give at most that, or add nodes"
        if not self.modes:
            return f"--trainer {self.wanted.trainer}: no node has a GPU; give --trainer cpu, or add one that has"
        beside = [sum(self.capacities(mode, i)) for mode in self.modes for i in self.trainer_nodes(mode)]
        fewer = f"give at most --replicas {max(beside)}, " if max(beside, default=0) > 0 else ""
        return (
            f"--replicas {self.wanted.replicas} --trainer {self.wanted.trainer}: no node has room for the trainer "
            f"({self.wanted.trainer_cpus} CPUs, {gib(self.trainer_bytes)}) beside them; {fewer}give --trainer auto or "
            "none, or add a node"
        )


def usable(node: Node) -> int:
    """Bytes of each of its GPUs that are given out."""
    return int(node.gpu_bytes * _USED)


def gib(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"


def ray_nodes(nodes: Iterable[Mapping[str, Any]], gpu_gib: float | None = None) -> list[Node]:
    """Nodes of `ray.nodes()`; gpu_gib: memory of a GPU whose type is not known. Raises UserError without it."""
    alive = [node for node in nodes if node["Alive"] and not node["Resources"].get("head")]
    return [_ray_node(node["NodeManagerAddress"], node["Resources"], gpu_gib) for node in alive]


def as_configured(config: AuroraConfig, nodes: Sequence[Node], model: ModelSize) -> Placement:
    """Where `aurora serve` finds room with this configuration. Raises UserError where it does not."""
    servers, trainer = config.server.num_gpus, config.trainer.num_gpus
    place_of_trainer: TrainerPlace = "gpu" if trainer >= 1 else "shared" if trainer > 0 else "cpu"
    wanted = Wanted(
        replicas=config.cluster.replicas,
        tensor_parallel_size=max(int(servers), 1),
        server_cpus=int(config.server.num_cpus or 1),
        trainer_cpus=config.trainer.threads,
        trainer=place_of_trainer if config.learning else "none",
        duty=config.trainer.duty,
    )
    return place([node if servers else replace(node, gpus=0) for node in nodes], model, wanted)


def _ray_node(name: str, resources: Mapping[str, float], gpu_gib: float | None) -> Node:
    gpus = int(resources.get("GPU", 0))
    types = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
    memory = gpu_gib or max((_ACCELERATORS.get(each, 0) for each in types), default=0)
    if gpus and not memory:
        raise UserError(f"node {name}: a GPU of unknown size ({', '.join(types) or 'no type'}); give --gpu-gib")
    roles = {role: int(resources[role]) if role in resources else None for role in ("serve", "train")}
    cpus, host = int(resources.get("CPU", 0)), int(resources.get("memory", 0))
    return Node(name, cpus, gpus, int(memory * _GIB) if gpus else 0, host, **roles)
