"""Which drafter and which speculation length give the batch the most tokens a second?

Goodput (SmartSpec, arXiv 2406.14066) = expected emitted tokens of the batch / time of the step that emits them. The
step time is linear in what the step computes (`aurora.step_time`), which makes the best choice of all requests together
easy to find.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aurora.step_time import Floats, Ints, StepTimeModel, StepWork

LATE = 8.0  # times that a token counts without which a request misses its deadline
_SAME = 1e-9  # relative difference of merit that is none

# Drafters: tokens of the first cost drafter passes, those of the n-gram table are free to draft, those of the draft
# model cost its passes and the reading of what it has not read.
NEURAL, TABLE, MODEL = 0, 1, 2
DRAFTERS = 3


@dataclass(frozen=True)
class Caps:
    """Tokens that each drafter with passes drafts for every request; 0: it does not draft."""

    neural: int
    model: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """The requests that drafts may be chosen for, what drafts would bring and cost.

    gains: [requests, DRAFTERS, k_max] expected extra tokens of each draft position, by drafter.
    limits: [requests, DRAFTERS] longest draft that each request may have from each drafter.
    base: the step without any draft and without drafting.
    caps: what the drafters with passes may be asked for; None: everything from nothing to the highest limits.
    unread: [requests] tokens that the draft model reads if the request takes its drafts; None: none.
    """

    gains: Floats
    limits: Ints
    base: StepWork
    model: StepTimeModel
    caps: Sequence[Caps] | None = None
    unread: Floats | None = None


@dataclass(frozen=True)
class Choice:
    """Drafter and speculation length of every request in one step, and what is expected of them."""

    drafters: tuple[int, ...]  # NEURAL, TABLE or MODEL
    lengths: tuple[int, ...]
    caps: Caps  # what the two with passes must draft
    emitted: float  # expected tokens
    seconds: float  # expected time
    merit: float  # what was maximised: goodput; with needs their worth / s; for latency 1 / (mean s a token)

    @property
    def goodput(self) -> float:
        """Expected emitted tokens / s."""
        return self.emitted / self.seconds


def choose(batch: Batch, needs: Floats | None = None) -> Choice:
    """The choice that maximises goodput, exactly.

    needs: [requests] tokens that each must emit to be on time; up to that number they count LATE times.

    Dinkelbach's method (1967): at a given price of a second each request's best option is its own affair, and the
    price at which the whole is worth nothing is the goodput. Of one drafter's drafts the best within a cap is a running
    maximum over lengths, so a round takes O(requests * (k_max + caps)).
    """
    options = _Options.of(batch)
    worth = options.emitted
    if needs is not None:
        worth = worth + (LATE - 1) * np.minimum(worth, np.maximum(needs, 0.0)[:, None, None])
    best, merit = options.none, float(worth[:, NEURAL, 0].sum()) / options.start[0]
    while True:
        value = np.where(options.allowed, worth - merit * options.costs, -np.inf)  # [2, requests, DRAFTERS, k_max + 1]
        reach = np.maximum.accumulate(value, axis=3)
        offers = reach[options.runs[:, None], :, np.arange(DRAFTERS), options.within]  # [caps, DRAFTERS, requests]
        c = int((offers.max(axis=1).sum(axis=1) - merit * options.start).argmax())
        drafters = offers[c].argmax(axis=0)
        rows = np.arange(len(drafters))
        within = options.lengths <= options.within[c][drafters][:, None]  # [requests, k_max + 1]
        lengths = np.where(within, value[options.runs[c], rows, drafters], -np.inf).argmax(axis=1)
        better = float(worth[rows, drafters, lengths].sum()) / options.seconds(c, drafters, lengths)
        if better <= merit * (1 + _SAME):
            return options.choice(*best, merit)
        best, merit = (c, drafters, lengths), better


def choose_latency(batch: Batch) -> Choice:
    """The choice with the least expected time a token, as a mean over the requests, exactly.

    That time is the step's, divided by what the request is expected to emit. So it is a product of two sums over
    requests, seconds and tokens to the power of -1, whose minimum is a corner of the convex hull of what can be had
    (the product is quasi-concave). Each request's own corners, taken in the order of their slopes, give those of all
    together: O(requests * k_max * log) for each of the caps.
    """
    options, requests = _Options.of(batch), len(batch.gains)
    if not requests:
        return options.choice(*options.none, 0.0)
    best, merit = options.none, 1.0 / options.start[0]
    for c, start in enumerate(options.start):
        seconds, slowness, picks = _corners(options, c)
        product = (start + seconds) * slowness / requests
        at = int(product.argmin())
        if 1.0 / product[at] > merit * (1 + _SAME):
            picked = np.zeros(requests, np.int64)
            for request, option in picks[:at]:
                picked[request] = option
            best, merit = (c, *np.divmod(picked, len(options.lengths))), 1.0 / float(product[at])
    return options.choice(*best, merit)


def within(choice: Choice, gains: Floats, room: int) -> Choice:
    """The choice, cut to at most `room` drafts in all: those stay that are expected to bring the most.

    gains as in `Batch`; those of one drafter must not rise along a draft. Expected time and merit stay as they were.
    """
    lengths = np.array(choice.lengths, np.int64)
    if lengths.sum() <= room:
        return choice
    mine = gains[np.arange(len(lengths)), list(choice.drafters)]
    mine = np.where(np.arange(gains.shape[2]) < lengths[:, None], mine, -np.inf)
    best = np.argsort(-mine, axis=None, kind="stable")[:room]
    left = np.bincount(best // gains.shape[2], minlength=len(lengths))
    emitted = len(lengths) + float(mine.ravel()[best].sum())
    return dataclasses.replace(choice, lengths=tuple(left.tolist()), emitted=emitted)


@dataclass(frozen=True, eq=False)
class _Options:
    """What requests may take, what it brings and costs."""

    caps: list[Caps]
    start: Floats  # [caps] seconds of the step without verification
    runs: Ints  # [caps] 1 where the neural drafter drafts
    within: Ints  # [caps, DRAFTERS] longest draft
    lengths: Ints  # [k_max + 1]
    emitted: Floats  # [requests, DRAFTERS, k_max + 1] expected tokens, the one that comes anyway among them
    costs: Floats  # [2, requests, DRAFTERS, k_max + 1] seconds, without neural drafter and with it
    allowed: npt.NDArray[np.bool_]  # [requests, DRAFTERS, k_max + 1]

    @classmethod
    def of(cls, batch: Batch) -> "_Options":
        requests, _, k_max = batch.gains.shape
        base, model, unread = batch.base, batch.model, batch.unread
        asked = _all_caps(batch.limits) if batch.caps is None else list(batch.caps)
        neural, drafted = np.array([c.neural for c in asked]), np.array([c.model for c in asked])
        start = np.array([model.predict(with_drafts(base, 0, c)) for c in asked])
        # A draft costs more where the neural drafter reads it, too.
        each = [model.predict(with_drafts(base, 1, c)) - model.predict(with_drafts(base, 0, c)) for c in _PAIR]
        lengths = np.arange(k_max + 1)
        extra = np.zeros((requests, DRAFTERS, k_max + 1))  # seconds beside verification
        extra[:, MODEL, 1:] = model.reading * (np.zeros((requests, 1)) if unread is None else unread[:, None])
        return cls(
            caps=asked,
            start=start,
            runs=(neural > 0).astype(np.int64),
            within=np.stack([neural, np.full_like(neural, k_max), drafted], axis=1),
            lengths=lengths,
            emitted=1 + np.concatenate([np.zeros((requests, DRAFTERS, 1)), batch.gains.cumsum(axis=2)], axis=2),
            costs=np.array(each)[:, None, None, None] * lengths + extra,
            allowed=lengths <= batch.limits[..., None],
        )

    @property
    def none(self) -> "tuple[int, Ints, Ints]":
        """No drafts with the first of the caps."""
        nothing = np.zeros(len(self.emitted), np.int64)
        return 0, nothing, nothing

    def seconds(self, c: int, drafters: Ints, lengths: Ints) -> float:
        """Of the step in which each request takes `lengths` drafts of `drafters`."""
        rows = np.arange(len(drafters))
        return float(self.start[c] + self.costs[self.runs[c], rows, drafters, lengths].sum())

    def choice(self, c: int, drafters: Ints, lengths: Ints, merit: float) -> Choice:
        emitted = float(self.emitted[np.arange(len(drafters)), drafters, lengths].sum())
        seconds = self.seconds(c, drafters, lengths)
        return Choice(tuple(drafters.tolist()), tuple(lengths.tolist()), self.caps[c], emitted, seconds, float(merit))


def _corners(options: _Options, c: int) -> tuple[Floats, Floats, list[tuple[int, int]]]:
    """Seconds beside the start and sum of 1 / tokens at each corner, from no draft on; what is taken on the way there.

    That is one (request, drafter * (k_max + 1) + length) a corner after the first, in place of what it took before.
    """
    requests = len(options.emitted)
    usable = options.allowed & (options.lengths <= options.within[c][:, None])
    x = np.where(usable, options.costs[options.runs[c]], np.inf).reshape(requests, -1)
    y = np.where(usable, 1.0 / options.emitted, np.inf).reshape(requests, -1)
    at, rows, walk = np.zeros(requests, np.int64), np.arange(requests), []
    while len(rows):
        dx, dy = x[rows] - x[rows, at[rows]][:, None], y[rows] - y[rows, at[rows]][:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = np.where(dy < 0, np.where(dx > 0, dy / dx, -np.inf), np.inf)
        # Steepest; of what is free the best.
        steepest = slope.min(axis=1, keepdims=True)
        to = np.where(slope == steepest, dy, np.inf).argmin(axis=1)
        moves = np.flatnonzero(steepest[:, 0] < 0)
        rows, to = rows[moves], to[moves]
        walk += list(zip(steepest[moves, 0], rows, to, dx[moves, to], dy[moves, to], strict=True))
        at[rows] = to
    walk.sort(key=lambda move: move[0])
    seconds = np.cumsum([0.0, *(move[3] for move in walk)])
    slowness = np.cumsum([float(requests), *(move[4] for move in walk)])
    return seconds, slowness, [(int(move[1]), int(move[2])) for move in walk]


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
