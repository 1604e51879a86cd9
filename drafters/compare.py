"""How two versions of one drafter differ: how far each tensor moved, and which tokens can be drafted now."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from drafters.draft_files import FROZEN, TRAINED, VOCABULARY
from drafters.files import read_tensors

_HEAD = "lm_head.weight"  # one row for each token that can be drafted
_VOCABULARY_TENSORS = ("d2t", "t2d")


@dataclass(frozen=True)
class TensorChange:
    """One tensor: norms are Frobenius; `relative` is ||second - first|| / ||first||, None for a tensor of zeros."""

    name: str
    shape: tuple[int, ...]
    relative: float | None
    norm_first: float
    norm_second: float


@dataclass(frozen=True)
class Difference:
    """What changed from a first to a second drafter."""

    tensors: list[TensorChange]  # those that both have in one shape, most changed first
    odd: list[str]  # those that only one has, or in another shape
    vocabulary: int  # tokens that the second can draft
    added: list[int]  # ids
    removed: list[int]


def compare(first: Path, second: Path) -> Difference:
    """Compare two drafters' directories. The head is compared in the rows of the tokens that both can draft.

    Raises DrafterRefused for files that cannot be read.
    """
    before, ids_before = _read(first)
    after, ids_after = _read(second)
    old, new = set(ids_before.tolist()), set(ids_after.tolist())
    if _HEAD in before and _HEAD in after and old != new:
        before[_HEAD] = before[_HEAD][torch.isin(ids_before, ids_after)]
        after[_HEAD] = after[_HEAD][torch.isin(ids_after, ids_before)]
    shared = [name for name in before if name in after and before[name].shape == after[name].shape]
    changes = [_change(name, before[name], after[name]) for name in shared]
    return Difference(
        tensors=sorted(changes, key=lambda change: (-(change.relative or 0.0), change.name)),
        odd=sorted((before.keys() | after.keys()) - set(shared)),
        vocabulary=len(new),
        added=sorted(new - old),
        removed=sorted(old - new),
    )


def _read(directory: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The trained tensors and the ids that can be drafted, ascending. The target's tensors are left out."""
    if (directory / FROZEN).exists():
        return read_tensors(directory / TRAINED), torch.tensor(json.loads((directory / VOCABULARY).read_text()))
    tensors = read_tensors(directory / "model.safetensors")
    ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    return {name: tensor for name, tensor in tensors.items() if name not in _VOCABULARY_TENSORS}, ids


def _change(name: str, before: Tensor, after: Tensor) -> TensorChange:
    norm, moved = float(before.double().norm()), float((after.double() - before.double()).norm())
    relative = moved / norm if norm else None
    return TensorChange(name, tuple(before.shape), relative, norm, float(after.double().norm()))
