"""Rules for speculation lengths, compiled for simulations: none, the same for all, by batch size, SmartSpec, goodput.

GOODPUT is what `aurora.controller` does with a single drafter: the same choice, the same estimates and the same
bursts of exploration (tested against it). HINDSIGHT knows
each answer's own acceptance rates from the start, ORACLE which drafts are right: no rule can beat it.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aurora.acceptance import OPTIMISM, REQUEST_MEMORY, REQUEST_PRIOR, SHARED_MEMORY, SHARED_PRIOR
from aurora.compiled import compiled
from aurora.controller import BURST, INVESTED_STEPS, WORTH_READING
from aurora.goodput import DRAFTERS, NEURAL, TABLE, Step, draft_seconds, most_goodput, start_seconds
from aurora.step_time import CONSTANT, CONTEXT, PREFILL, REQUEST

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FIXED, SMARTSPEC, GOODPUT, HINDSIGHT, ORACLE = range(5)
# Places in Rule.memory. RAN: the neural drafter ran in this step; AHEAD: prompt tokens that the step will read.
CREDIT, EXPLORING, RATE, RAN, AHEAD = range(5)
_SMARTSPEC_MEMORY = 0.9  # of the acceptance rate, at each verification


class Rule(NamedTuple):
    """A rule, what it knows, and what it remembers of all requests."""

    kind: int
    k_max: int
    by_batch: Ints  # [max_seqs + 1] of FIXED: length for each number of decoding requests
    costs: Floats  # seconds of `aurora.step_time.COSTS`; those of the draft model may be left out
    passes: bool  # whether drafts cost passes of a neural drafter
    exploration: float  # share of the steps
    right: npt.NDArray[np.uint8]  # [places] drafts that are right
    expected: npt.NDArray[np.float32]  # [places, k_max] acceptances; of HINDSIGHT, and where drafts cost no passes
    memory: Floats  # [5]
    hits: Floats  # [k_max] of all requests
    trials: Floats  # [k_max]


class Slots(NamedTuple):
    """The requests in the batch; arrays of [max_seqs]."""

    request: Ints
    to_read: Ints  # tokens of the prompt that are not read yet; 0: it decodes
    context: Ints  # tokens in the KV cache
    chunk: Ints  # tokens that it gets in this step
    place: Ints  # in the profile
    limit: Ints  # longest draft of use
    length: Ints  # drafts to verify in this step
    cold: npt.NDArray[np.bool_]  # the neural drafter has a hole in what it read
    hits: Floats  # [max_seqs, k_max]
    trials: Floats  # [max_seqs, k_max]

    @classmethod
    def empty(cls, max_seqs: int, k_max: int) -> "Slots":
        request, to_read, context, chunk, place, limit, length = np.zeros((7, max_seqs), np.int64)
        cold, (hits, trials) = np.zeros(max_seqs, np.bool_), np.zeros((2, max_seqs, k_max))
        return cls(request, to_read, context, chunk, place, limit, length, cold, hits, trials)


def new_memory() -> Floats:
    """What a rule remembers at first: a whole burst of exploration, and SmartSpec's rate."""
    return np.array([BURST, 1.0, OPTIMISM, 0.0, 0.0])


@compiled
def choose_lengths(slots: Slots, running: Ints, rule: Rule) -> int:
    """Write `slots.length` of the running slots that decode; returns the passes of the neural drafter."""
    decoding = running[slots.to_read[running] == 0]
    slots.length[running] = 0
    passes = 0
    if rule.kind == GOODPUT:
        passes = _goodput(slots, running, decoding, rule)
    elif rule.kind == HINDSIGHT:
        passes = _best_as_expected(slots, decoding, rule)
    elif rule.kind == ORACLE:
        gains = np.zeros((len(decoding), rule.k_max))
        for i, slot in enumerate(decoding):
            gains[i, : rule.right[slots.place[slot]]] = 1.0
        passes = _best(slots, decoding, gains, _usable(slots, decoding, rule), rule)
    else:
        k = _smartspec(slots, decoding, rule) if rule.kind == SMARTSPEC else rule.by_batch[len(decoding)]
        for slot in decoding:
            slots.length[slot] = min(k, _usable_in(slots, slot, rule))
            passes = max(passes, slots.length[slot]) if rule.passes else 0
    rule.memory[RAN] = passes > 0
    return passes


@compiled
def learn(slots: Slots, slot: int, accepted: int, rule: Rule) -> None:
    """`accepted` of the slot's drafts were right."""
    drafted = slots.length[slot]
    right = min(rule.right[slots.place[slot]], 1)
    if rule.memory[RAN] and drafted == 0 and not slots.cold[slot] and slots.limit[slot]:
        _observe(slots, slot, 1, right, rule)  # drafted, not verified, and known all the same
    elif drafted:
        _observe(slots, slot, drafted, accepted, rule)
        rate = rule.memory[RATE]
        for j in range(min(accepted + 1, drafted)):
            rate = _SMARTSPEC_MEMORY * rate + (1 - _SMARTSPEC_MEMORY) * (j < accepted)
        rule.memory[RATE] = rate


@compiled
def _observe(slots: Slots, slot: int, drafted: int, accepted: int, rule: Rule) -> None:
    """Decayed hits and trials of the request and of all (`aurora.acceptance`)."""
    for j in range(min(accepted + 1, drafted)):
        slots.hits[slot, j] = slots.hits[slot, j] * (1 - 1 / REQUEST_MEMORY) + (j < accepted)
        slots.trials[slot, j] = slots.trials[slot, j] * (1 - 1 / REQUEST_MEMORY) + 1
        rule.hits[j] = rule.hits[j] * (1 - 1 / SHARED_MEMORY) + (j < accepted)
        rule.trials[j] = rule.trials[j] * (1 - 1 / SHARED_MEMORY) + 1


@compiled
def _usable_in(slots: Slots, slot: int, rule: Rule) -> int:
    """Longest draft that the slot can have."""
    if rule.passes:
        return 0 if slots.cold[slot] and rule.kind == GOODPUT else int(slots.limit[slot])
    offered = 0
    while offered < slots.limit[slot] and rule.expected[slots.place[slot], offered] > 0:
        offered += 1
    return offered


@compiled
def _usable(slots: Slots, which: Ints, rule: Rule) -> Ints:
    limits = np.zeros(len(which), np.int64)
    for i, slot in enumerate(which):
        limits[i] = _usable_in(slots, slot, rule)
    return limits


@compiled
def _smartspec(slots: Slots, decoding: Ints, rule: Rule) -> int:
    """The length with the best goodput if every draft were accepted with the same probability (arXiv 2406.14066)."""
    requests, rate = len(decoding), min(rule.memory[RATE], 0.999)
    step = _step(slots, decoding, rule, rule.k_max, 0.0)
    best, best_goodput = 0, requests / start_seconds(step, 0)
    for k in range(1, rule.k_max + 1):
        c = k if rule.passes else 0
        emitted = requests * (1 - rate ** (k + 1)) / (1 - rate)
        seconds = start_seconds(step, c) + requests * k * draft_seconds(step, c)
        if emitted / seconds > best_goodput:
            best, best_goodput = k, emitted / seconds
    return best


@compiled
def _goodput(slots: Slots, running: Ints, decoding: Ints, rule: Rule) -> int:
    """The best length for each, and a burst of exploration where the drafter would never be seen otherwise."""
    memory = rule.memory
    if not rule.passes:
        passes: int = _best_as_expected(slots, decoding, rule)
        return passes
    memory[EXPLORING] = memory[CREDIT] > 0 if memory[EXPLORING] else memory[CREDIT] >= BURST
    memory[CREDIT] = min(memory[CREDIT] + rule.exploration, BURST)
    limits = _usable(slots, decoding, rule)
    passes = _best(slots, decoding, _expected(slots, decoding, rule), limits, rule)
    if passes:
        return passes
    for slot in running:
        if slots.to_read[slot]:
            slots.limit[slot] = rule.k_max
    if not _usable(slots, running, rule).any():
        slots.cold[running] = True
        return 0
    if _invests(slots, running, rule):
        return 1
    if memory[EXPLORING]:
        step = _step(slots, decoding, rule, 1, memory[AHEAD])
        memory[CREDIT] -= start_seconds(step, 1) / start_seconds(step, 0) - 1
        return 1
    slots.cold[running] = True
    return 0


@compiled
def _best_as_expected(slots: Slots, decoding: Ints, rule: Rule) -> int:
    """The best lengths by the expectations that the rule was given."""
    gains = np.zeros((len(decoding), rule.k_max))
    for i, slot in enumerate(decoding):
        gains[i] = rule.expected[slots.place[slot]]
    return int(_best(slots, decoding, gains, _usable(slots, decoding, rule), rule))


@compiled
def _invests(slots: Slots, running: Ints, rule: Rule) -> bool:
    """Whether the drafter would pay if no request were cold (`SpeculationController`)."""
    gains = _expected(slots, running, rule)
    passes, _, goodput = _optimal(slots, running, gains, slots.limit[running], rule)
    plain = len(running) / start_seconds(_step(slots, running, rule, 0, 0.0), 0)
    return bool(passes > 0 and goodput > WORTH_READING * plain)


@compiled
def _expected(slots: Slots, which: Ints, rule: Rule) -> Floats:
    """Expected extra tokens of each draft of the neural drafter, [requests, k_max] (`AcceptanceModel.gains`)."""
    shared = np.zeros(rule.k_max)
    before = OPTIMISM
    for j in range(rule.k_max):
        before = (rule.hits[j] + SHARED_PRIOR * before) / (rule.trials[j] + SHARED_PRIOR)
        shared[j] = before
    gains = np.zeros((len(which), rule.k_max))
    for i, slot in enumerate(which):
        chance = 1.0
        for j in range(rule.k_max):
            own = slots.hits[slot, j] + REQUEST_PRIOR * shared[j]
            chance *= own / (slots.trials[slot, j] + REQUEST_PRIOR)
            gains[i, j] = chance
    return gains


@compiled
def _ahead(rule: Rule) -> float:
    """Prompt tokens that the drafter pays for in a step that reads them. Who is never cold need not invest in them."""
    if rule.kind == GOODPUT:
        return float(rule.memory[AHEAD]) / INVESTED_STEPS
    return float(rule.memory[AHEAD]) if rule.kind in (HINDSIGHT, ORACLE) else 0.0


@compiled
def _best(slots: Slots, which: Ints, gains: Floats, limits: Ints, rule: Rule) -> int:
    """Write the lengths of the best goodput; returns the passes."""
    passes, lengths, _ = _optimal(slots, which, gains, limits, rule)
    slots.length[which] = lengths
    return int(passes)


@compiled
def _optimal(slots: Slots, which: Ints, gains: Floats, limits: Ints, rule: Rule) -> tuple[int, Ints, float]:
    """Passes, lengths and goodput of the best choice (`aurora.goodput.most_goodput`)."""
    requests, drafter = len(which), NEURAL if rule.passes else TABLE
    offered, allowed = np.zeros((requests, DRAFTERS, rule.k_max)), np.zeros((requests, DRAFTERS), np.int64)
    offered[:, drafter], allowed[:, drafter] = gains, limits
    longest = int(limits.max()) if requests and rule.passes else 0
    step, none = _step(slots, which, rule, longest, _ahead(rule)), np.zeros(requests)
    c, _, lengths, _, _, goodput = most_goodput(offered, allowed, none, step, none)
    return int(step.caps[c, 0]), lengths, goodput


@compiled
def _step(slots: Slots, decoding: Ints, rule: Rule, longest: int, prompts: float) -> Step:
    """A step of these requests in which a neural drafter makes 0 to `longest` passes and reads `prompts` tokens."""
    base = np.zeros(len(rule.costs))
    base[CONSTANT], base[REQUEST] = 1.0, len(decoding)
    base[PREFILL], base[CONTEXT] = prompts, slots.context[decoding].sum() * 1e-3
    caps = np.zeros((longest + 1, 2), np.int64)
    caps[:, 0] = np.arange(longest + 1)
    return Step(rule.costs, base, caps)
