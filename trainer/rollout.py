"""Batches of rollouts: which rows of which sequences are drafted from, and what judges each draft.

Main rollouts follow the tokens that the target emitted. Where it rejected a draft, the rejected path forks off the main
rollout at the first wrong token: up to there both read the same tokens, so only the depths beyond it are added. Both
are nodes of one tree (`drafters.rollout`) and go through one forward pass.

Drafted tokens that the target judged are actions of the drafter: token j of a draft was chosen where the main rollout
of its start has depth j - 1, the first rejected one included. What came after that had no effect and is no action.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aurora.trace import TABLE_VERSION
from drafters.rollout import Context, Nodes
from trainer.sequence import Draft, Sequence

MAX_CONTEXT = 1024  # rows before a window's first start that drafting attends to: bounds a step's cost on long requests
_UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known of the n nodes at one depth."""

    target: Tensor  # [n] int64: row of `Batch.target_hidden` that judges the node's prediction
    truth: Tensor  # [n] int64: the token that the target emitted there; -1 when not known or on a rejected path
    rejected: Tensor  # [n] bool: on a rejected path


@dataclass(frozen=True, eq=False)
class Actions:
    """The m verified tokens of neural drafts that were chosen at nodes of one depth."""

    node: Tensor  # [m] int64
    token: Tensor  # [m] int64: target id
    q: Tensor  # [m] float32: probability with which it was drafted, as logged
    temperature: Tensor  # [m] float32: of the drafter when it was
    accepted: Tensor  # [m] int64: tokens of the draft accepted from this one on; 0: this one was rejected
    left: Tensor  # [m] int64: tokens of the draft from this one on


@dataclass(frozen=True, eq=False)
class Batch:
    """Rollouts of several sequences, packed."""

    context: Context
    nodes: list[Nodes]  # one entry a depth
    labels: list[Labels]
    actions: list[Actions]
    target_hidden: Tensor  # [R, H] bf16

    @property
    def rows(self) -> int:
        """Rollout starts."""
        return len(self.nodes[0].parent)


class _Action(NamedTuple):
    """One entry of `Actions`; its node is local to the sequence."""

    node: int
    token: int
    q: float
    temperature: float
    accepted: int
    left: int


@dataclass(eq=False)
class _Depth:
    """The nodes of one sequence at one depth while they are collected; indices are local to the sequence."""

    parent: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    truth: list[int] = field(default_factory=list)
    rejected: list[bool] = field(default_factory=list)
    actions: list[_Action] = field(default_factory=list)

    def add(self, parent: int, token: int, target: int, truth: int, rejected: bool) -> int:
        """Append a node and return its index."""
        self.parent.append(parent)
        self.tokens.append(token)
        self.target.append(target)
        self.truth.append(truth)
        self.rejected.append(rejected)
        return len(self.parent) - 1


@dataclass(eq=False)
class _Part:
    """One sequence's share of a batch: context rows `first` .. `end - 1`; targets from `judges` on, then branches'."""

    sequence: Sequence
    first: int
    end: int
    judges: int  # row that judges depth 0 of the first start: no target before it is asked
    depths: list[_Depth]
    hidden: list[Tensor]  # [*, H]: target states, in the order that `_Depth.target` counts
    node_of: list[dict[int, int]] = field(default_factory=list)  # start row -> main node, one entry a depth


def build_batch(
    windows: Seq[tuple[Sequence, Seq[int]]],
    depths: int,
    *,
    oldest_version: int | None = None,
    rejected: bool = True,
    device: str = "cpu",
    max_context: int | None = None,
) -> Batch:
    """Pack rollouts of `depths` depths from the given start rows (ascending) of each sequence.

    Drafts older than `oldest_version` do not count, and none does when it is None; `rejected`: add their rejected
    paths. Drafts of the n-gram table have such paths but are no actions. Drafting attends to `max_context` rows before
    the first start of a sequence, by default MAX_CONTEXT.
    """
    reach = MAX_CONTEXT if max_context is None else max_context
    parts = [_main_part(sequence, starts, depths, reach) for sequence, starts in windows if len(starts)]
    if oldest_version is not None:
        for part in parts:
            _add_drafts(part, oldest_version, rejected)
    row_bounds = _offsets([p.end - p.first for p in parts])
    target_bounds = _offsets([sum(map(len, p.hidden)) for p in parts])
    nodes, labels, actions = [], [], []
    parent_bounds = row_bounds
    for depth in range(depths):
        levels = [p.depths[depth] for p in parts]
        bounds = _offsets([len(level.parent) for level in levels])
        if bounds[-1] == 0:
            break
        parent = _shifted([level.parent for level in levels], parent_bounds, device)
        nodes.append(Nodes(parent, _joined([level.tokens for level in levels], device), bounds))
        target = _shifted([level.target for level in levels], target_bounds, device)
        on_rejected = _joined([level.rejected for level in levels], device).bool()
        labels.append(Labels(target, _joined([level.truth for level in levels], device), on_rejected))
        actions.append(_actions([level.actions for level in levels], bounds, device))
        parent_bounds = bounds
    hidden = torch.cat([h for p in parts for h in p.hidden]).to(device)
    return Batch(_context(parts, row_bounds, device), nodes, labels, actions, hidden)


def _main_part(sequence: Sequence, starts: Seq[int], depths: int, max_context: int) -> _Part:
    first = max(0, starts[0] - max_context)
    end_target = min(starts[-1] + 1 + depths, len(sequence.hidden))
    levels = [_Depth() for _ in range(depths)]
    judges = starts[0] + 1
    part = _Part(sequence, first, starts[-1] + 1, judges, levels, [sequence.hidden[judges:end_target]])
    part.node_of += [_main_nodes(part, starts, depth) for depth in range(depths)]
    return part


def _add_drafts(part: _Part, oldest_version: int, rejected: bool) -> None:
    """Add actions and rejected paths of the drafts that are new enough and begin at a start of this batch."""
    for draft in part.sequence.drafts:
        if draft.version < oldest_version:
            continue
        if draft.version > TABLE_VERSION:  # the neural drafter's
            _add_actions(part, draft)
        # Tells whether the fork's main node is in this batch: its start is drafted from, its depth is reached.
        fork = part.node_of[draft.accepted].get(draft.start) if draft.accepted < len(part.depths) else None
        if rejected and fork is not None:
            _add_path(part, draft, fork)


def _main_nodes(part: _Part, starts: Seq[int], depth: int) -> dict[int, int]:
    """Add the main nodes of one depth; returns start row -> node. They come first, so parents keep their order."""
    ids, rows = part.sequence.ids, len(part.sequence.hidden)
    node_of: dict[int, int] = {}
    for order, start in enumerate(starts):
        judge = start + 1 + depth
        if judge >= rows:
            break
        parent = start - part.first if depth == 0 else order
        truth = int(ids[judge + 1]) if judge + 1 < len(ids) else _UNKNOWN
        node_of[start] = part.depths[depth].add(parent, int(ids[judge]), judge - part.judges, truth, rejected=False)
    return node_of


def _add_actions(part: _Part, draft: Draft) -> None:
    """Label the main nodes where the accepted tokens of a draft and its first rejected one were chosen."""
    k = len(draft.path)
    for depth in range(min(draft.accepted + 1, k, len(part.depths))):
        node = part.node_of[depth].get(draft.start)
        if node is None:
            return
        token, q = int(draft.path[depth]), float(draft.q[depth])
        action = _Action(node, token, q, draft.temperature, draft.accepted - depth, k - depth)
        part.depths[depth].actions.append(action)


def _add_path(part: _Part, draft: Draft, fork: int) -> None:
    """Add the judged depths of a rejected path behind the main node `fork` at depth `draft.accepted`."""
    last = min(draft.accepted + len(draft.hidden), len(part.depths) - 1)
    judged = sum(map(len, part.hidden))
    parent = fork
    for depth in range(draft.accepted + 1, last + 1):
        token = int(draft.path[depth - 1])
        target = judged + depth - draft.accepted - 1
        parent = part.depths[depth].add(parent, token, target, _UNKNOWN, rejected=True)
    if last > draft.accepted:
        part.hidden.append(draft.hidden[: last - draft.accepted])


def _actions(lists: Seq[Seq[_Action]], bounds: tuple[int, ...], device: str) -> Actions:
    placed = [a._replace(node=a.node + first) for first, found in zip(bounds, lists, strict=False) for a in found]
    node, token, q, temperature, accepted, left = zip(*placed, strict=True) if placed else [()] * 6
    return Actions(
        node=torch.tensor(node, dtype=torch.int64, device=device),
        token=torch.tensor(token, dtype=torch.int64, device=device),
        q=torch.tensor(q, dtype=torch.float32, device=device),
        temperature=torch.tensor(temperature, dtype=torch.float32, device=device),
        accepted=torch.tensor(accepted, dtype=torch.int64, device=device),
        left=torch.tensor(left, dtype=torch.int64, device=device),
    )


def _context(parts: list[_Part], bounds: tuple[int, ...], device: str) -> Context:
    next_ids = np.concatenate([p.sequence.ids[p.first + 1 : p.end + 1] for p in parts])
    positions = np.concatenate([np.arange(p.first, p.end) + p.sequence.position for p in parts])
    return Context(
        torch.from_numpy(next_ids).to(device),
        torch.cat([p.sequence.aux[p.first : p.end] for p in parts]).to(device),
        torch.from_numpy(positions).to(device),
        bounds,
    )


def _offsets(lengths: list[int]) -> tuple[int, ...]:
    return (0, *np.cumsum(lengths).tolist())


def _joined(lists: Seq[Seq[int]], device: str) -> Tensor:
    return torch.tensor([value for values in lists for value in values], dtype=torch.int64, device=device)


def _shifted(lists: list[list[int]], bounds: tuple[int, ...], device: str) -> Tensor:
    shifted = [[value + offset for value in values] for values, offset in zip(lists, bounds, strict=False)]
    return _joined(shifted, device)
