"""Which drafter and which speculation length give the batch the most tokens a second?

Goodput (SmartSpec, arXiv 2406.14066) = expected emitted tokens of the batch / time of the step that emits them. The
step time is linear in what the step computes (`aurora.step_time`), which makes the best choice of all requests together
easy to find.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aurora.step_time import Floats, Ints, StepTimeModel, StepWork

_SAME = 1e-9  # relative difference of goodput that is none

# Drafters: tokens of the first cost drafter passes, those of the n-gram table are free to draft, those of the draft
# model cost its passes and the reading of what it has not read.
NEURAL, TABLE, MODEL = 0, 1, 2
DRAFTERS = 3


@dataclass(frozen=True)
class Caps:
    """Tokens that each drafter with passes drafts for every request; 0: it does not draft."""

    neural: int
    model: int = 0


@dataclass(frozen=True)
class Choice:
    """Drafter and speculation length of every request in one step, and what is expected of them."""

    drafters: tuple[int, ...]  # NEURAL, TABLE or MODEL
    lengths: tuple[int, ...]
    caps: Caps  # what the two with passes must draft
    emitted: float  # expected tokens
    seconds: float  # expected time

    @property
    def goodput(self) -> float:
        """Expected emitted tokens / s."""
        return self.emitted / self.seconds


def choose(
    gains: Floats,
    limits: Ints,
    base: StepWork,
    model: StepTimeModel,
    *,
    caps: Sequence[Caps] | None = None,
    unread: Floats | None = None,
) -> Choice:
    """The choice that maximises goodput, exactly.

    gains: [requests, DRAFTERS, k_max] expected extra tokens of each draft position, by drafter.
    limits: [requests, DRAFTERS] longest draft that each request may have from each drafter.
    base: the step without any draft and without drafting.
    caps: what the drafters with passes may be asked for; default: everything from nothing to the highest limits.
    unread: [requests] tokens that the draft model reads if the request takes its drafts; default: none.

    Dinkelbach's method (1967): at a given price of a second each request's best option is its own affair, and the
    price at which the whole is worth nothing is the goodput. Of one drafter's drafts the best within a cap is a running
    maximum over lengths, so a round takes O(requests * (k_max + caps)).
    """
    requests, _, k_max = gains.shape
    asked = _all_caps(limits) if caps is None else list(caps)
    neural, drafted = np.array([c.neural for c in asked]), np.array([c.model for c in asked])
    start = np.array([model.predict(with_drafts(base, 0, c)) for c in asked])
    # A draft costs more where the neural drafter reads it, too: [without neural drafter, with it].
    each = np.array([model.predict(with_drafts(base, 1, c)) - model.predict(with_drafts(base, 0, c)) for c in _PAIR])
    reading = model.reading * (np.zeros(requests) if unread is None else unread)
    lengths = np.arange(k_max + 1)
    emitted = np.concatenate([np.zeros((requests, DRAFTERS, 1)), gains.cumsum(axis=2)], axis=2)
    forbidden = np.where(lengths <= limits[..., None], 0.0, -np.inf)  # [requests, DRAFTERS, k_max + 1]
    extra = np.zeros((requests, DRAFTERS, k_max + 1))  # seconds beside verification
    extra[:, MODEL, 1:] = reading[:, None]
    costs = each[:, None, None, None] * lengths + extra  # [2, requests, DRAFTERS, k_max + 1]
    table = np.full_like(neural, k_max)
    within = np.stack([neural, table, drafted], axis=1)  # [caps, DRAFTERS] longest draft
    runs = (neural > 0).astype(int)
    best = Choice((NEURAL,) * requests, (0,) * requests, asked[0], float(requests), float(start[0]))
    while True:
        value = emitted + forbidden - best.goodput * costs
        reach = np.maximum.accumulate(value, axis=3)
        offers = reach[runs[:, None], :, np.arange(DRAFTERS), within]  # [caps, DRAFTERS, requests]
        profit = requests + offers.max(axis=1).sum(axis=1) - best.goodput * start
        c = int(profit.argmax())
        drafters = offers[c].argmax(axis=0)
        rows = np.arange(requests)
        allowed = lengths <= within[c][drafters][:, None]  # [requests, k_max + 1]
        taken = np.where(allowed, value[runs[c], rows, drafters], -np.inf).argmax(axis=1)
        better = Choice(
            tuple(drafters.tolist()),
            tuple(taken.tolist()),
            asked[c],
            requests + float(emitted[rows, drafters, taken].sum()),
            float(start[c] + costs[runs[c], rows, drafters, taken].sum()),
        )
        if better.goodput <= best.goodput * (1 + _SAME):
            return best
        best = better


_PAIR = (Caps(0), Caps(1))


def _all_caps(limits: Ints) -> list[Caps]:
    neural, drafted = (range(int(limits[:, drafter].max(initial=0)) + 1) for drafter in (NEURAL, MODEL))
    return [Caps(n, m) for n in neural for m in drafted]


def with_drafts(base: StepWork, drafts: int, caps: Caps, model_read: int = 0) -> StepWork:
    """The work of `base` when `drafts` tokens are verified and the drafters draft up to `caps` for each request.

    model_read: tokens that the draft model reads for it.
    """
    return dataclasses.replace(
        base,
        drafts=drafts,
        draft_first=int(caps.neural > 0),
        draft_more=max(caps.neural - 1, 0),
        model_first=int(caps.model > 0),
        model_read=model_read,
        model_more=max(caps.model - 1, 0),
    )
