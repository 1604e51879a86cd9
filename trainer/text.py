"""Batches of text for the draft model: which tokens it reads, and which rows the target judges.

The draft model reads tokens only, so along a recorded text one causal pass gives its prediction at every row. Row i,
which has read `ids[i]`, predicts `ids[i + 1]`; the target's row i judges it. A start row t of `trainer.sequence`
drafts after token t + 1, so its first draft is the prediction of row t + 1.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafters.draft_model import DraftModel, attend_packed
from trainer.rollout import MAX_CONTEXT
from trainer.sequence import Sequence

_UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Parts of several sequences, packed: n tokens to read, m judged rows among them."""

    ids: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    bounds: tuple[int, ...]  # sequence i owns tokens bounds[i] .. bounds[i + 1]
    judged: Tensor  # [m] int64: rows whose prediction counts
    truth: Tensor  # [m] int64: the token that the target emitted there; -1 when not known
    target_hidden: Tensor  # [m, H] bf16: the target's states there

    @property
    def rows(self) -> int:
        """Judged rows."""
        return len(self.judged)


def build_text_batch(windows: Seq[tuple[Sequence, Seq[int]]], device: str = "cpu") -> TextBatch:
    """Pack what the drafts of the given start rows (ascending, below `end_start`) of each sequence rest on."""
    ids, positions, judged, truth, hidden, bounds = [], [], [], [], [], [0]
    for sequence, starts in windows:
        if not len(starts):
            continue
        first, rows = max(0, starts[0] - MAX_CONTEXT), np.asarray(starts) + 1
        end = int(rows[-1]) + 1
        said = np.append(sequence.ids, _UNKNOWN)
        ids.append(sequence.ids[first:end])
        positions.append(np.arange(first, end) + sequence.position)
        judged.append(rows - first + bounds[-1])
        truth.append(said[rows + 1])
        hidden.append(sequence.hidden[torch.from_numpy(rows)])
        bounds.append(bounds[-1] + end - first)
    packed = (torch.from_numpy(np.concatenate(parts)).to(device) for parts in (ids, positions, judged, truth))
    ids_, positions_, judged_, truth_ = packed
    return TextBatch(ids_, positions_, tuple(bounds), judged_, truth_, torch.cat(hidden).to(device))


def predictions(model: DraftModel, batch: TextBatch) -> Tensor:
    """Logits of the judged rows, [m, draft vocabulary]."""
    hidden = model(batch.ids, batch.positions, attend_packed(batch.bounds))
    return model.logits(hidden[batch.judged])


@torch.no_grad()
def right_text(model: DraftModel, sequence: Sequence, k: int) -> npt.NDArray[np.int64]:
    """`trainer.verify.right_drafts` for a draft model: leading right drafts, 0 to k, from each start row; [starts].

    As long as its drafts are right the model reads the recorded text, so a run of right predictions is a run of right
    drafts.
    """
    starts = range(sequence.first_start, sequence.end_start)
    if not starts:
        return np.zeros(0, np.int64)
    batch = build_text_batch([(sequence, starts)], device=str(model.inv_freq.device))
    right = model.draft_ids[predictions(model, batch).argmax(-1)] == batch.truth
    return _runs(right.cpu().numpy(), k)


def _runs(right: npt.NDArray[np.bool_], k: int) -> npt.NDArray[np.int64]:
    """How many of `right` hold in a row from each place on, up to k."""
    runs, alive = np.zeros(len(right), np.int64), np.ones(len(right), np.bool_)
    for depth in range(min(k, len(right))):
        alive = alive & np.append(right[depth:], np.zeros(depth, np.bool_))
        runs += alive
    return runs
