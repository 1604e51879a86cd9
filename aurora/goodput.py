"""Which drafter and which speculation length give the batch the most tokens a second?

Goodput (SmartSpec, arXiv 2406.14066) = expected emitted tokens of the batch / time of the step that emits them. The
step time is linear in what the step computes (`aurora.step_time`), which makes the best choice of all requests together
easy to find.

Prompts that are read in the same step are left out of its time, except for what the neural drafter would read of them:
they are read whatever is chosen, and no draft makes that shorter. If they counted, a second would look cheap in every
step with a prompt, and drafts would be bought that cost more than the plain steps that they save.

The inner loops are compiled by numba; `aurora.speculation_rules` simulates with the same.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aurora.compiled import compiled
from aurora.step_time import (
    CONSTANT,
    CONTEXT,
    COSTS,
    DRAFT,
    FIRST_PASS,
    FURTHER_PASS,
    MODEL_FIRST,
    MODEL_FURTHER,
    MODEL_READ,
    PREFILL,
    READ,
    REQUEST,
    Floats,
    Ints,
    StepTimeModel,
    StepWork,
)

Found = tuple[int, Ints, Ints, float, float, float]  # result of `most_goodput`

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
    base: the step without any draft and without drafting; of prompts what the neural drafter would pay for in it.
    caps: what the drafters with passes may be asked for; None: everything from nothing to the highest limits.
    unread: [requests] tokens that the draft model reads if the request takes its drafts; None: none.
    """

    gains: Floats
    limits: Ints
    base: StepWork
    model: StepTimeModel
    caps: Sequence[Caps] | None = None
    unread: Floats | None = None

    @property
    def asked(self) -> Sequence[Caps]:
        """The caps to choose from."""
        if self.caps is not None:
            return self.caps
        neural, drafted = (range(int(self.limits[:, drafter].max(initial=0)) + 1) for drafter in (NEURAL, MODEL))
        return [Caps(n, m) for n in neural for m in drafted]

    def arrays(self) -> "tuple[Floats, Ints, Floats, Step]":
        """Arguments of the compiled loops. Raises ValueError while `model` knows no costs."""
        unread = np.zeros(len(self.gains)) if self.unread is None else self.unread
        caps = np.array([(each.neural, each.model) for each in self.asked], np.int64)
        return self.gains, self.limits, unread, Step(self.model.now, self.base.vector(), caps)


class Step(NamedTuple):
    """What the compiled loops know of the step."""

    costs: Floats  # `StepTimeModel.now`
    base: Floats  # `StepWork.vector` of the step without drafts
    caps: Ints  # [caps, 2] of NEURAL and of MODEL


@dataclass(frozen=True)
class Choice:
    """Drafter and speculation length of every request in one step, and what is expected of them."""

    drafters: tuple[int, ...]  # NEURAL, TABLE or MODEL
    lengths: tuple[int, ...]
    caps: Caps  # what the two with passes must draft
    emitted: float  # expected tokens
    seconds: float  # expected time, without that of prompts
    merit: float  # what was maximised: goodput; with needs their worth / s; for latency 1 / (mean s a token)

    @property
    def goodput(self) -> float:
        """Expected emitted tokens / s."""
        return self.emitted / self.seconds


def choose(batch: Batch, needs: Floats | None = None) -> Choice:
    """The choice that maximises goodput, exactly.

    needs: [requests] tokens that each must emit to be on time; up to that number they count LATE times.
    """
    wanted = np.zeros(len(batch.gains)) if needs is None else needs
    return _choice(batch, most_goodput(*batch.arrays(), wanted))


def choose_latency(batch: Batch) -> Choice:
    """The choice with the least expected time a token, as a mean over the requests, exactly."""
    return _choice(batch, _least_latency(*batch.arrays()))


def _choice(batch: Batch, found: Found) -> Choice:
    c, drafters, lengths, emitted, seconds, merit = found
    return Choice(tuple(drafters.tolist()), tuple(lengths.tolist()), batch.asked[c], emitted, seconds, merit)


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


def compile_kernels(latency: bool) -> None:
    """Compile the loops of an objective now (seconds, once per machine) instead of in the first step that drafts."""
    costs = StepTimeModel.known(dict.fromkeys(COSTS, 1.0))
    one = Batch(np.ones((1, DRAFTERS, 1)), np.ones((1, DRAFTERS), np.int64), StepWork(1, 0, 0, 0, 0, 0), costs)
    (choose_latency if latency else choose)(one)


@compiled
def most_goodput(gains: Floats, limits: Ints, unread: Floats, step: Step, needs: Floats) -> Found:
    """`choose` on arrays: index of the caps, drafters, lengths, expected tokens, expected seconds, merit.

    Dinkelbach's method (1967): at a given price of a second each request's best option is its own affair, and the price
    at which the whole is worth nothing is the goodput. A round takes O(requests * k_max * caps).
    """
    requests = len(gains)
    drafters, lengths = np.zeros(requests, np.int64), np.zeros(requests, np.int64)
    best_c, best_drafters, best_lengths = 0, drafters.copy(), lengths.copy()
    best_tokens, best_seconds, worth = float(requests), start_seconds(step, 0), 0.0
    for request in range(requests):
        worth += _worth(1.0, needs[request])
    merit = worth / best_seconds
    while True:
        top, top_c, top_worth, top_tokens, top_seconds = -np.inf, 0, 0.0, 0.0, 1.0
        top_drafters, top_lengths = best_drafters, best_lengths
        for c in range(len(step.caps)):
            each, seconds = draft_seconds(step, c), start_seconds(step, c)
            tokens, worth = 0.0, 0.0
            for request in range(requests):
                its_tokens, its_seconds, its_worth = 1.0, 0.0, _worth(1.0, needs[request])
                drafters[request], lengths[request] = 0, 0
                for drafter in range(DRAFTERS):
                    gained, reading = 1.0, _reading(step, unread[request], drafter)
                    for j in range(_longest(limits[request, drafter], step.caps[c], drafter)):
                        gained += gains[request, drafter, j]
                        time, value = reading + each * (j + 1), _worth(gained, needs[request])
                        if value - merit * time > its_worth - merit * its_seconds:
                            its_tokens, its_seconds, its_worth = gained, time, value
                            drafters[request], lengths[request] = drafter, j + 1
                tokens += its_tokens
                worth += its_worth
                seconds += its_seconds
            if worth - merit * seconds > top:
                top, top_c, top_worth, top_tokens, top_seconds = worth - merit * seconds, c, worth, tokens, seconds
                top_drafters, top_lengths = drafters.copy(), lengths.copy()
        if top_worth <= merit * top_seconds * (1 + _SAME):
            return best_c, best_drafters, best_lengths, best_tokens, best_seconds, merit
        best_c, best_drafters, best_lengths = top_c, top_drafters, top_lengths
        best_tokens, best_seconds, merit = top_tokens, top_seconds, top_worth / top_seconds


@compiled
def _least_latency(gains: Floats, limits: Ints, unread: Floats, step: Step) -> Found:
    """`choose_latency` on arrays; arguments and result as in `most_goodput`.

    A request's time a token is the step's, divided by what the request is expected to emit. So the mean is a product of
    two sums over requests, seconds and tokens to the power of -1, whose minimum is a corner of the convex hull of what
    can be had (the product is quasi-concave). Each request's own corners, taken in the order of their slopes, give
    those of all together: O(requests * k_max * log) for each of the caps.
    """
    requests, k_max = len(gains), gains.shape[2]
    drafters, lengths = np.zeros(requests, np.int64), np.zeros(requests, np.int64)
    best_c, best_seconds = 0, start_seconds(step, 0)
    merit = 1.0 / best_seconds if requests else 0.0
    way = np.zeros((requests * DRAFTERS * k_max, 5))
    for c in range(len(step.caps)) if requests else range(0):
        moves = 0
        for request in range(requests):
            mine = _corners(gains[request], limits[request], unread[request], step, c)
            way[moves : moves + len(mine), 1:] = mine
            way[moves : moves + len(mine), 0] = request
            moves += len(mine)
        order = np.argsort(way[:moves, 1])
        seconds, slowness = start_seconds(step, c), float(requests)
        taken, least, least_seconds = 0, seconds * slowness, seconds
        for i in range(moves):
            seconds += way[order[i], 3]
            slowness += way[order[i], 4]
            if seconds * slowness < least:
                taken, least, least_seconds = i + 1, seconds * slowness, seconds
        if requests / least > merit * (1 + _SAME):
            best_c, best_seconds, merit = c, least_seconds, requests / least
            drafters[:], lengths[:] = 0, 0
            for i in order[:taken]:
                request, option = int(way[i, 0]), int(way[i, 2])
                drafters[request], lengths[request] = option // (k_max + 1), option % (k_max + 1)
    tokens = float(requests)
    for request in range(requests):
        tokens += gains[request, drafters[request], : lengths[request]].sum()
    return best_c, drafters, lengths, tokens, best_seconds, merit


@compiled
def _corners(gains: Floats, limits: Ints, unread: float, step: Step, c: int) -> Floats:
    """One request's way along the hull, from no draft on: [moves, (slope, option, seconds, 1 / tokens)].

    Options are drafter * (k_max + 1) + length; seconds and 1 / tokens are what the move adds.
    """
    k_max = gains.shape[1]
    options = DRAFTERS * (k_max + 1)
    x, y = np.full(options, np.inf), np.full(options, np.inf)
    x[0], y[0] = 0.0, 1.0
    for drafter in range(DRAFTERS):
        tokens, reading = 1.0, _reading(step, unread, drafter)
        for j in range(_longest(limits[drafter], step.caps[c], drafter)):
            tokens += gains[drafter, j]
            x[drafter * (k_max + 1) + j + 1] = reading + draft_seconds(step, c) * (j + 1)
            y[drafter * (k_max + 1) + j + 1] = 1.0 / tokens
    way, moves, at = np.zeros((DRAFTERS * k_max, 4)), 0, 0
    while True:
        to, steepest = -1, 0.0
        for option in range(options):
            if y[option] < y[at]:
                dx, dy = x[option] - x[at], y[option] - y[at]
                slope = dy / dx if dx > 0 else -np.inf
                # Steepest; of what is free the best.
                if slope < steepest or (slope == steepest and y[option] < y[to]):
                    to, steepest = option, slope
        if to < 0:
            return way[:moves]
        way[moves, 0], way[moves, 1], way[moves, 2], way[moves, 3] = steepest, to, x[to] - x[at], y[to] - y[at]
        moves, at = moves + 1, to


@compiled
def start_seconds(step: Step, c: int) -> float:
    """Seconds of the step without verification and prompts."""
    costs, base, neural, drafted = step.costs, step.base, step.caps[c, 0], step.caps[c, 1]
    seconds = 0.0
    for part in (CONSTANT, REQUEST, CONTEXT):
        seconds += costs[part] * base[part]
    if neural:
        seconds += (
            costs[FIRST_PASS] + costs[READ] * (base[REQUEST] + base[PREFILL]) + costs[FURTHER_PASS] * (neural - 1)
        )
    if drafted:
        seconds += costs[MODEL_FIRST] + costs[MODEL_FURTHER] * (drafted - 1)
    return float(seconds)


@compiled
def draft_seconds(step: Step, c: int) -> float:
    """Seconds that a draft adds: its verification, and where the neural drafter runs its reading."""
    return float(step.costs[DRAFT] + step.costs[READ]) if step.caps[c, 0] else float(step.costs[DRAFT])


@compiled
def _reading(step: Step, unread: float, drafter: int) -> float:
    """Seconds that the draft model reads before it drafts for a request."""
    return float(step.costs[MODEL_READ] * unread) if drafter == MODEL else 0.0


@compiled
def _longest(limit: int, caps: Ints, drafter: int) -> int:
    """Longest draft of a drafter within the caps."""
    return limit if drafter == TABLE else min(limit, caps[0] if drafter == NEURAL else caps[1])


@compiled
def _worth(tokens: float, need: float) -> float:
    return tokens + (LATE - 1) * min(tokens, max(need, 0.0))
