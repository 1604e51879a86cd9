"""Placement: nothing is given out twice, and it is refused exactly where trying everything finds no way."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora.config import AuroraConfig, UserError
from aurora.model_size import ModelSize, drafter_parameters, target_parameters
from aurora.placement import Node, Placement, Wanted, as_configured, place, ray_nodes, usable

GIB = 1 << 30
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "model_type": "llama",
    "max_position_embeddings": 131072,
}
MODEL = ModelSize("m", 10 * GIB, 1 << 17, 32, 5 * GIB)  # a replica: 10 + 2 (KV) + 2 GiB; trainer: 6 GiB

NODES = st.lists(
    st.builds(
        Node,
        name=st.uuids().map(str),
        cpus=st.integers(0, 4),
        gpus=st.integers(0, 3),
        gpu_bytes=st.sampled_from([8, 15, 18, 24]).map(lambda g: g * GIB),
        memory_bytes=st.sampled_from([0, 16, 24, 40]).map(lambda g: g * GIB),
        serve=st.sampled_from([None, None, 1, 2]),
        train=st.sampled_from([None, None, 1]),
    ),
    min_size=1,
    max_size=3,
)
WANTED = st.builds(
    Wanted,
    replicas=st.integers(1, 4),
    tensor_parallel_size=st.sampled_from([1, 1, 2]),
    server_cpus=st.integers(1, 2),
    trainer=st.sampled_from(["auto", "auto", "gpu", "shared", "cpu", "none"]),
)


def _needs(nodes: list[Node], wanted: Wanted) -> tuple[int, int]:
    """Bytes of a replica on each GPU (or in memory) and of the trainer, said anew."""
    size = 10 * GIB + wanted.room_tokens * (1 << 17)
    on_gpus = any(node.gpus for node in nodes)
    return 2 * GIB + (size // wanted.tensor_parallel_size if on_gpus else size), 6 * GIB


def _possible(nodes: list[Node], wanted: Wanted) -> bool:
    """Every trainer's place with every way to spread the replicas."""
    on_gpus = any(node.gpus for node in nodes)
    kinds = ("gpu", "shared", "cpu") if wanted.trainer == "auto" else (wanted.trainer,)
    places = [(kind, i) for kind in kinds for i in range(len(nodes)) if on_gpus or kind in ("cpu", "none")]
    for kind, trainer in places:
        for spread in product(range(len(nodes)), repeat=wanted.replicas):
            count = Counter(spread)
            if all(_fits(nodes, i, count[i], kind if i == trainer else "none", wanted) for i in range(len(nodes))):
                return True
    return False


def _fits(nodes: list[Node], i: int, replicas: int, trains: str, wanted: Wanted) -> bool:
    """Whether a node bears so many replicas and, unless "none", the trainer in that way."""
    node, (server, trainer) = nodes[i], _needs(nodes, wanted)
    on_gpus = any(n.gpus for n in nodes)
    if trains != "none" and any(n.train is not None for n in nodes) and not node.train:
        return False
    if replicas and any(n.serve is not None for n in nodes) and replicas > (node.serve or 0):
        return False
    if node.cpus < replicas * wanted.server_cpus + (wanted.trainer_cpus if trains != "none" else 0):
        return False
    if not on_gpus:
        taken = replicas * server + (trainer if trains == "cpu" else 0)
        return not node.memory_bytes or taken <= node.memory_bytes
    loads = [server] * (replicas * wanted.tensor_parallel_size)
    if trains == "gpu":
        loads.append(trainer)
    if trains == "shared":
        if not loads:
            return False
        loads[0] += trainer
    if trains == "cpu" and node.memory_bytes and trainer > node.memory_bytes:
        return False
    return len(loads) <= node.gpus and all(load <= 0.95 * node.gpu_bytes for load in loads)


def _within(placement: Placement, nodes: list[Node]) -> None:
    on_gpus = any(node.gpus for node in nodes)
    for node in nodes:
        here = [seat for seat in placement.seats if seat.node == node.name]
        assert sum(seat.cpus for seat in here) <= node.cpus
        for gpu in {g for seat in here for g in seat.gpus}:
            assert gpu < node.gpus
            assert sum(seat.bytes_each for seat in here if gpu in seat.gpus) <= usable(node)
            assert sum(gpu in seat.gpus for seat in here if seat.part != "trainer") <= 1, "a replica has its GPUs alone"
        if not on_gpus and node.memory_bytes:
            assert sum(seat.bytes_each for seat in here) <= node.memory_bytes


@given(NODES, WANTED)
@settings(max_examples=400, deadline=None)
def test_it_is_refused_only_where_there_is_no_way_and_nothing_is_given_out_twice(nodes, wanted):
    if not _possible(nodes, wanted):
        with pytest.raises(UserError, match=r"give |raise "):
            place(nodes, MODEL, wanted)
        return
    placement = place(nodes, MODEL, wanted)
    _within(placement, nodes)
    replicas = [seat for seat in placement.seats if seat.part != "trainer"]
    assert len(replicas) == wanted.replicas
    assert (len(placement.seats) > wanted.replicas) == (wanted.trainer != "none")
    if any(node.gpus for node in nodes):
        assert all(len(seat.gpus) == wanted.tensor_parallel_size for seat in replicas)
    if wanted.trainer in ("gpu", "shared"):
        trainer = placement.seats[-1]
        taken = {gpu for seat in replicas if seat.node == trainer.node for gpu in seat.gpus}
        assert bool(taken & set(trainer.gpus)) == (wanted.trainer == "shared")


@pytest.mark.parametrize(
    ("nodes", "wanted", "kind"),
    [
        ([Node("a", 4, memory_bytes=32 * GIB)], Wanted(), "CPUs"),
        ([Node("a", 4, 1, 24 * GIB)], Wanted(), "shared GPU"),
        ([Node("a", 4, 2, 24 * GIB)], Wanted(), "GPUs split"),
        ([Node("a", 4, 2, 24 * GIB), Node("b", 4, 1, 24 * GIB)], Wanted(tensor_parallel_size=2), "nodes split"),
        ([Node("a", 4, 1, 16 * GIB)], Wanted(), "GPUs and a trainer on CPUs"),
        ([Node("a", 4, 1, 24 * GIB, serve=1), Node("b", 4, 1, 24 * GIB, train=1)], Wanted(), "nodes split"),
        ([Node("a", 4, 1, 24 * GIB)], Wanted(trainer="none"), "no trainer"),
    ],
)
def test_kinds_of_placement(nodes: list[Node], wanted: Wanted, kind: str):
    placement = place(nodes, MODEL, wanted)
    assert placement.kind == kind
    assert placement.why


def test_a_shared_gpu_says_what_the_server_may_use():
    placement = place([Node("a", 4, 1, 24 * GIB)], MODEL, Wanted(duty=0.25))
    said = " ".join(placement.why)
    assert "it takes 6.0 GiB of 24.0 GiB: replica 0 gets --gpu-memory-utilization 0.70" in said
    assert "25% of the time" in said


def test_replicas_on_cpus_share_what_the_trainer_leaves():
    seats = place([Node("a", 16)], MODEL, Wanted(replicas=2, trainer_cpus=2)).seats
    assert [seat.cpus for seat in seats] == [7, 7, 2]


@pytest.mark.parametrize(
    ("node", "fields", "said"),
    [
        (
            Node("a", 4, 1, 24 * GIB),
            {"tensor_parallel_size": 2},
            "--tensor-parallel-size 2: the largest node has 1",
        ),
        (Node("a", 4, 1, 12 * GIB), {}, "m: a replica needs 14.0 GiB of each GPU, the largest gives 11.4 GiB"),
        (Node("a", 4, 2, 24 * GIB), {"replicas": 3}, "--replicas 3: there is room for 2; give at most that, or add"),
        (Node("a", 4), {"trainer": "gpu"}, "--trainer gpu: no node has a GPU; give --trainer cpu"),
        (Node("a", 2), {"replicas": 2}, "no node has room for the trainer (1 CPUs, 6.0 GiB) beside them; give at most"),
    ],
)
def test_a_refusal_names_reason_and_remedy(node: Node, fields: dict, said: str):
    with pytest.raises(UserError) as refused:
        place([node], MODEL, Wanted(**fields))
    assert said in str(refused.value)


def test_values_that_make_no_sense_are_refused():
    for fields, said in (
        ({"replicas": 0}, "--replicas 0: must be above 0"),
        ({"trainer": "x"}, "--trainer x: give one"),
    ):
        with pytest.raises(UserError, match=said):
            Wanted(**fields)


@pytest.mark.parametrize(
    ("server", "trainer", "kind"),
    [(1, 1, "GPUs split"), (1, 0.25, "shared GPU"), (1, 0, "GPUs and a trainer on CPUs"), (0, 0, "CPUs")],
)
def test_a_configuration_says_what_is_wanted(server: float, trainer: float, kind: str):
    config = AuroraConfig(server={"num_gpus": server}, trainer={"num_gpus": trainer})
    assert as_configured(config, [Node("a", 8, 2, 24 * GIB)], MODEL).kind == kind


def test_a_configuration_that_finds_no_room_is_refused():
    config = AuroraConfig(server={"num_gpus": 1}, trainer={"enabled": False}, cluster={"replicas": 3})
    with pytest.raises(UserError, match="--replicas 3: there is room for 2"):
        as_configured(config, [Node("a", 8, 2, 24 * GIB)], MODEL)


def test_sizes_come_from_the_configuration(tmp_path: Path):
    from drafters.config import Eagle3Config

    assert target_parameters(LLAMA_8B) == 8_030_261_248  # as published
    size = ModelSize.of("llama", LLAMA_8B)
    assert size.kv_token_bytes == 131072
    assert size.weight_bytes == 2 * 8_030_261_248
    assert drafter_parameters(LLAMA_8B) == 327_172_096
    shapes = Eagle3Config.for_target(LLAMA_8B, 8192).shapes()
    trained = [shape for name, shape in shapes.items() if name not in ("d2t", "t2d")]
    assert drafter_parameters(LLAMA_8B) == sum(a * b for a, b in (s if len(s) == 2 else (s[0], 1) for s in trained))
    with pytest.raises(UserError, match="give a model directory"):
        ModelSize.read(tmp_path)


def test_rays_nodes_are_read():
    resources = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:L4": 1.0, "serve": 1.0, "memory": 3e10}
    listed = [
        {"Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 4.0, "head": 1.0}},
        {"Alive": True, "NodeManagerAddress": "10.0.0.2", "Resources": resources},
        {"Alive": False, "NodeManagerAddress": "10.0.0.3", "Resources": resources},
    ]
    assert ray_nodes(listed) == [Node("10.0.0.2", 8, 2, 24 * GIB, 30_000_000_000, serve=1)]
    unknown = [{"Alive": True, "NodeManagerAddress": "x", "Resources": {"CPU": 1.0, "GPU": 1.0}}]
    with pytest.raises(UserError, match="give --gpu-gib"):
        ray_nodes(unknown)
    assert ray_nodes(unknown, 16)[0].gpu_bytes == 16 * GIB
