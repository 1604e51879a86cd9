"""`aurora plan --placement`: where replicas and trainer would go on a cluster's nodes, and why (`aurora.placement`)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aurora.config import DEFAULT_MODEL, UserError, cache_root, require_positive, require_writable
from aurora.model_size import ModelSize
from aurora.placement import Node, Placement, TrainerPlace, Wanted, gib, place, ray_nodes

_GIB = 1 << 30
_NODE = "NAME=CPUS[,GPUS,GPU_GIB][,serve|,train]"


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """What to place; `aurora plan --placement` has a flag for each. Raises UserError for values that make no sense."""

    model: str = DEFAULT_MODEL
    nodes: tuple[str, ...] = ()  # NAME=CPUS[,GPUS,GPU_GIB][,serve|,train]
    address: str | None = None  # of a running Ray cluster, whose nodes are taken instead
    gpu_gib: float | None = None  # of a GPU whose type Ray does not know
    replicas: int = 1
    tensor_parallel_size: int = 1
    room_tokens: int = 16384
    server_cpus: int = 1
    trainer_cpus: int = 1
    trainer: TrainerPlace = "auto"
    json_file: Path | None = None

    def __post_init__(self) -> None:
        require_positive(self, "gpu_gib")
        require_writable("--json", self.json_file)
        if bool(self.nodes) == (self.address is not None):
            raise UserError("--node, --address: give the nodes, or a running Ray cluster's address, and not both")

    @property
    def wanted(self) -> Wanted:
        names = ("replicas", "tensor_parallel_size", "room_tokens", "server_cpus", "trainer_cpus", "trainer")
        return Wanted(**{name: getattr(self, name) for name in names})


def run(options: PlaceOptions) -> int:
    """Print the placement. Raises UserError, with reason and remedy, where there is none."""
    from aurora.default_model import model_directory, resolve_model

    wanted = options.wanted
    nodes = [read_node(text) for text in options.nodes] or _cluster(options)
    model = ModelSize.read(model_directory(resolve_model(options.model, cache_root())))
    placement = place(nodes, model, wanted)
    _show(placement)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(asdict(placement), indent=1))
    return 0


def read_node(text: str) -> Node:
    """Of NAME=CPUS[,GPUS,GPU_GIB][,serve|,train]. Raises UserError."""
    name, _, rest = text.partition("=")
    fields = rest.split(",")
    role = fields.pop() if fields[-1] in ("serve", "train") else None
    roles = {} if role is None else {role: 1}
    try:
        cpus, gpus, size = int(fields[0]), *(float(each) for each in fields[1:] or (0, 0))
        node = Node(name, cpus, int(gpus), int(size * _GIB), **roles)
    except ValueError as error:
        raise UserError(f"--node {text}: give {_NODE}") from error
    if not name or min(node.cpus, node.gpus, node.gpu_bytes) < 0 or bool(node.gpus) != bool(node.gpu_bytes):
        raise UserError(f"--node {text}: give {_NODE}, each GPU with its memory")
    return node


def _cluster(options: PlaceOptions) -> Sequence[Node]:
    import ray

    try:
        ray.init(address=options.address, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--address {options.address}: no Ray cluster answers there ({error}); give --node") from error
    try:
        return ray_nodes(ray.nodes(), options.gpu_gib)
    finally:
        ray.shutdown()


def _show(placement: Placement) -> None:
    table = Table("part", "node", "CPUs", "GPUs", "takes at least", title=placement.kind, title_justify="left")
    for seat in placement.seats:
        gpus = ", ".join(map(str, seat.gpus))
        each = " each" if len(seat.gpus) > 1 else ""
        table.add_row(seat.part, seat.node, str(seat.cpus), gpus, gib(seat.bytes_each) + each)
    Console().print(table)
    for reason in placement.why:
        print(f"- {reason}")
