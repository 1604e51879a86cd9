"""Running a drafter over many rollouts at once: EAGLE-3's training-time test as a tree of nodes.

A context row is a position of a sequence whose target features are known; it gets depth-0 keys and values. A node
at depth 0 is a context row from which drafting starts. A node at depth j continues a node at depth j - 1 by one token:
the recorded one, or a draft that was rejected. It attends to the context rows up to its start and to its own ancestors
at depths 1..j, which is what a served drafter sees. Sequences are packed one after another; `bounds` keep them apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drafters.eagle3 import Eagle3


@dataclass(frozen=True, eq=False)
class Context:
    """Rows of S packed sequences, C in all."""

    next_ids: Tensor  # [C] int64: the token after each row
    aux: Tensor  # [C, 3H]: tapped target states, any float type
    positions: Tensor  # [C] int64
    bounds: tuple[int, ...]  # S + 1 offsets: sequence i owns rows bounds[i]..bounds[i + 1]


@dataclass(frozen=True, eq=False)
class Nodes:
    """The n nodes at one depth, in the order of their sequences."""

    parent: Tensor  # [n] int64: node of the previous depth; at depth 0 the context row
    tokens: Tensor  # [n] int64: the token read; at depth 0 it is `next_ids` of the row
    bounds: tuple[int, ...]  # S + 1 offsets


def run_rollouts(model: Eagle3, context: Context, depths: list[Nodes]) -> Iterator[Tensor]:
    """Yield the output states [n_j, H] of each depth's nodes in turn."""
    fused = model.fuse(context.aux.to(torch.float32))
    x = model.inputs(context.next_ids, fused)
    keys, values = model.keys_values(x, context.positions)
    root, state, own = depths[0].parent, fused, list[tuple[Tensor, Tensor]]()
    for depth, nodes in enumerate(depths):
        state = state[nodes.parent]
        if depth == 0:
            x = x[root]
        else:
            root = root[nodes.parent]
            x = model.inputs(nodes.tokens, state)
        positions = context.positions[root] + depth
        if depth > 0:
            own = [(k[nodes.parent], v[nodes.parent]) for k, v in own] + [model.keys_values(x, positions)]
        queries = model.queries(x, positions)
        attended = [
            _attend(queries[a:b], keys[c:d], values[c:d], root[a:b] - c, [(k[a:b], v[a:b]) for k, v in own])
            for a, b, c, d in _segments(nodes.bounds, context.bounds)
        ]
        state = model.finish(state, torch.cat(attended))
        yield state


def _segments(nodes: tuple[int, ...], rows: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """(first node, end node, first row, end row) of each sequence that has nodes."""
    for i in range(len(rows) - 1):
        if nodes[i] < nodes[i + 1]:
            yield nodes[i], nodes[i + 1], rows[i], rows[i + 1]


def _attend(q: Tensor, keys: Tensor, values: Tensor, root: Tensor, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention output [n, heads, D] of one sequence's nodes.

    q [n, heads, D] is scaled; keys, values [C, KV, D] are the context, visible up to row root [n]; `own` holds each
    node's ancestors and itself, [n, KV, D] a depth.
    """
    n, heads, dim = q.shape
    kv = keys.shape[1]
    grouped = q.view(n, kv, heads // kv, dim)
    flat = grouped.transpose(0, 1).reshape(kv, -1, dim)
    scores = (flat @ keys.permute(1, 2, 0)).view(kv, n, heads // kv, -1)
    hidden = torch.arange(len(keys), device=q.device) > root[:, None]  # [n, C]
    parts = [scores.masked_fill(hidden[None, :, None], float("-inf"))]
    parts += [(grouped * k[:, :, None]).sum(-1, keepdim=True).transpose(0, 1) for k, _ in own]
    weights = torch.cat(parts, dim=-1).softmax(-1)  # [KV, n, group, C + depth]
    past = weights[..., : len(keys)].reshape(kv, -1, len(keys)) @ values.transpose(0, 1)
    out = past.view(kv, n, heads // kv, dim).transpose(0, 1)
    for depth, (_, v) in enumerate(own):
        out = out + weights[..., len(keys) + depth, None].transpose(0, 1) * v[:, :, None]
    return out.reshape(n, heads, dim)
