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
from trainer.verify import NOTHING

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
def greedy_text(model: DraftModel, sequence: Sequence, k: int) -> npt.NDArray[np.int64]:
    """`trainer.verify.greedy_drafts` for a draft model: greedy drafts up to the first wrong one; [starts, k].

    As long as its drafts are right the model reads the recorded text, so its predictions along the text are its drafts.
    """
    starts = range(sequence.first_start, sequence.end_start)
    drafts = np.full((len(starts), k), NOTHING, np.int64)
    if not starts:
        return drafts
    batch = build_text_batch([(sequence, starts)], device=str(model.inv_freq.device))
    said = model.draft_ids[predictions(model, batch).argmax(-1)].cpu().numpy()
    right = said == batch.truth.cpu().numpy()
    open_ = np.ones(len(starts), np.bool_)
    for depth in range(min(k, len(starts))):
        begins = np.flatnonzero(open_[: len(starts) - depth])
        drafts[begins, depth] = said[begins + depth]
        open_[begins] = right[begins + depth]
    return drafts
