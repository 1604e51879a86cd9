"""The gate: a candidate is published only if it drafts better than the live drafter on requests held back.

Both draft greedily along the same recorded responses, from every row, `k` tokens deep, and a draft counts up to its
first wrong token. Temperature plays no part: the measure is the one that decides speed, taken on the newest traffic.
"""

from dataclasses import dataclass
from typing import Any

import torch

from drafters.eagle3 import Eagle3
from drafters.rollout import run_rollouts
from trainer.learner import accepted_share
from trainer.rollout import Batch, build_batch
from trainer.sequence import Sequence

_STARTS = 64  # rows of each sequence that are judged, evenly spaced: bounds the cost on long responses
_PACKED = 8  # sequences in one forward pass


@dataclass(frozen=True)
class Acceptance:
    """How far a drafter's greedy drafts are right."""

    length: float  # emitted tokens a verification: 1 + sum of per_position
    per_position: tuple[float, ...]  # share of drafts right up to that position; over the rows that know the token
    rows: int

    @property
    def conditional(self) -> tuple[float, ...]:
        """Share of drafts right at each position among those right up to the one before it."""
        before = (1.0, *self.per_position[:-1])
        return tuple(p / b if b > 0 else 0.0 for p, b in zip(self.per_position, before, strict=True))


@dataclass(frozen=True)
class Verdict:
    """A candidate against the live drafter on the same rows."""

    candidate: Acceptance
    live: Acceptance
    passed: bool

    @property
    def numbers(self) -> dict[str, Any]:
        """What is reported of every judgement, passed or not."""
        return {
            "acceptance_length": self.candidate.length,
            "live_acceptance_length": self.live.length,
            "acceptance_per_position": list(self.candidate.per_position),
            "passed": self.passed,
        }

    def metadata(self, parent: int, steps: int, tokens: int) -> dict[str, Any]:
        """What a version that passed says of itself: child of `parent`, after so many trainer steps on `tokens`."""
        return {
            "parent": parent,
            "trainer_step": steps,
            "tokens_trained": tokens,
            "acceptance_length": self.candidate.length,
            "acceptance_per_position": list(self.candidate.per_position),
            "gated_rates": list(self.candidate.conditional),
            "parent_acceptance_length": self.live.length,
            "gate_rows": self.candidate.rows,
        }


def judge(candidate: Eagle3, live: Eagle3, sequences: list[Sequence], k: int, margin: float) -> Verdict:
    """Compare two drafters. The candidate passes above the live one, by `margin` tokens at least."""
    batches = _batches(sequences, k, str(candidate.inv_freq.device))
    new, old = measure(candidate, batches), measure(live, batches)
    return Verdict(new, old, passed=new.length > old.length and new.length >= old.length + margin)


def _batches(sequences: list[Sequence], k: int, device: str) -> list[Batch]:
    windows = [(s, _spread(s.first_start, s.end_start)) for s in sequences]
    windows = [(s, starts) for s, starts in windows if starts]
    return [build_batch(windows[i : i + _PACKED], k, device=device) for i in range(0, len(windows), _PACKED)]


def _spread(first: int, end: int) -> list[int]:
    """At most `_STARTS` rows of first .. end - 1, evenly spaced."""
    count = min(_STARTS, end - first)
    return [first + i * (end - first) // count for i in range(count)]


@torch.no_grad()
def measure(model: Eagle3, batches: list[Batch]) -> Acceptance:
    """Acceptance of one drafter over prepared batches."""
    right_sum: dict[int, float] = {}
    known_sum: dict[int, int] = {}
    for batch in batches:
        right = torch.ones(0)
        states = run_rollouts(model, batch.context, batch.nodes)
        for depth, (nodes, label, state) in enumerate(zip(batch.nodes, batch.labels, states, strict=True)):
            right, share = accepted_share(model, model.logits(state), label, right, nodes.parent)
            known = int((label.truth >= 0).sum())
            right_sum[depth] = right_sum.get(depth, 0.0) + share * known
            known_sum[depth] = known_sum.get(depth, 0) + known
    per_position = tuple(right_sum[d] / known_sum[d] for d in sorted(right_sum) if known_sum[d])
    return Acceptance(1.0 + sum(per_position), per_position, sum(batch.rows for batch in batches))
