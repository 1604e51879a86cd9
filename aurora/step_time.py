"""How long an engine step takes: linear in what the step computes, fitted online from the engine's own steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MEMORY = 1000.0  # steps after which an observation's weight has faded to 1/e
_PACE_MEMORY = 50.0  # the same for the machine's pace
_SPELL_MEMORY = 3.0  # the same for how much slower the very last steps were
_SPELL = 0.7  # most that it makes of one step, as a logarithm: twice the time
_LIKENESS_MEMORY = 100.0  # the same for how much that said of the step after them
_PULL = 0.1  # steps that the last fit counts for
_REFIT_EVERY = 8
_ON_PURPOSE = 10.0  # times that a step counts which was taken to measure it
_USUAL_NOISE = 0.1  # median difference of such steps from their fit, as a logarithm; noisier ones count for less
_ROUNDS = 20  # of a fit to many steps at once
_SETTLED = 32  # steps from which on the fit is believed more than a step that contradicts it
_SURPRISE = 0.3  # difference from the prediction, as the logarithm of the ratio, beyond which a step says no more
_FIRST_SURPRISE = 1.1  # the same before


@dataclass(frozen=True)
class StepWork:
    """What one engine step computes; the features of its time."""

    requests: int  # requests that decode
    drafts: int  # drafted tokens to verify
    prefill_tokens: float
    context_tokens: int  # tokens attended to, over all requests
    draft_first: int  # 1 if the drafter reads this step's tokens
    draft_more: int  # further drafter passes, one token a request each
    model_first: int = 0  # 1 if the draft model runs
    model_read: int = 0  # tokens that it reads, over all requests
    model_more: int = 0  # its further passes, one token a request each

    def vector(self) -> Floats:
        """One number for each cost of the model, in the order of COSTS."""
        read = self.draft_first * (self.requests + self.drafts + self.prefill_tokens)
        return np.array(
            [
                1.0,
                self.requests,
                self.drafts,
                self.prefill_tokens,
                self.context_tokens * 1e-3,
                self.draft_first,
                read,
                self.draft_more,
                self.model_first,
                self.model_read,
                self.model_more,
            ],
            dtype=np.float64,
        )


# Places in StepWork.vector and in StepTimeModel.now.
CONSTANT, REQUEST, DRAFT, PREFILL, CONTEXT, FIRST_PASS, READ, FURTHER_PASS = range(8)
MODEL_FIRST, MODEL_READ, MODEL_FURTHER = range(8, 11)
MODEL_COSTS = ("model_first_pass", "model_read_token", "model_further_pass")
COSTS = (
    "constant",
    "request",
    "draft",
    "prefill_token",
    "kilo_context_token",
    "first_pass",
    "read_token",
    "further_pass",
    *MODEL_COSTS,
)  # in the order of StepWork.vector

# Prior cost of each feature as a share of the plain step's constant, in the order of StepWork.vector. Longer drafts are
# guessed cheap, so that they are tried. The drafter's first pass is guessed dear: too dear is seen as soon as the pass
# is left out, too cheap never is while every step has it. So is what the draft model reads.
_PRIOR_SHARES = np.array([1.0, 0.03, 0.1, 0.02, 0.02, 0.25, 0.001, 0.05, 0.25, 0.003, 0.1])


@dataclass
class StepTimeModel:
    """Non-negative least squares of step time on StepWork, forgetting old steps. Times in seconds.

    A machine that others use is slower for a while, whatever the steps compute. So a step takes what its work costs at
    the machine's usual pace, times the pace of late: a short average of how much slower than that the steps were. What
    one cost is relative to another, which is all that a choice depends on, is thus not mistaken for the pace.

    Where slow steps do not come alone even so, a prediction goes by the last few as well, as far as such have said
    something of their next (a regression through the origin). The costs do not.

    A rule that acts on the fit decides what the fit sees: held to be free, drafts are always as long as possible, so
    that their cost cannot be told from that of requests. Therefore steps that were taken on purpose (`measured`) are
    never forgotten: they decide what the others do not.
    """

    _gram: Floats = field(default_factory=lambda: np.zeros((len(COSTS), len(COSTS))))
    _moment: Floats = field(default_factory=lambda: np.zeros(len(COSTS)))
    _costs: Floats | None = None  # at the usual pace
    _kept_gram: Floats = field(default_factory=lambda: np.zeros((len(COSTS), len(COSTS))))
    _kept_moment: Floats = field(default_factory=lambda: np.zeros(len(COSTS)))
    _pace: float = 0.0  # logarithm of how many times longer steps take of late
    _spell: float = 0.0  # the same of the very last ones, beside that
    _followed: float = 0.0  # sums of what a spell was and of what came next: of the product, of its own square
    _squares: float = 0.0
    _seen: int = 0
    _model_seen: bool = False  # whether a draft model ever ran
    _errors: list[float] = field(default_factory=list)

    @classmethod
    def known(cls, costs: Mapping[str, float]) -> "StepTimeModel":
        """A model with given costs, in seconds by the names of COSTS; MODEL_COSTS may be left out and are then guessed.

        Raises ValueError naming another one that is missing.
        """
        missing = [name for name in COSTS if name not in costs and name not in MODEL_COSTS]
        if missing:
            raise ValueError(f"no cost of {missing[0]}; there must be {', '.join(COSTS)}")
        guesses = dict(zip(COSTS, (_PRIOR_SHARES * costs["constant"]).tolist(), strict=True))
        known = np.array([costs.get(name, guesses[name]) for name in COSTS], dtype=np.float64)
        seen = any(name in costs for name in MODEL_COSTS)
        return cls(_costs=known, _seen=_SETTLED, _model_seen=seen)

    @classmethod
    def measured(cls, steps: Sequence[tuple[StepWork, float]]) -> "StepTimeModel":
        """A model that never forgets these steps and their seconds, which were taken on purpose.

        They are fitted all at once, in rounds, since weights and clipped surprises depend on the fit. Raises ValueError
        without steps.
        """
        if not steps:
            raise ValueError("no steps to fit")
        x, seconds = np.array([work.vector() for work, _ in steps]), np.array([each for _, each in steps])
        predicted, costs = seconds, _PRIOR_SHARES * float(np.median(seconds / (x @ _PRIOR_SHARES)))
        model_seen = any(work.model_first for work, _ in steps)
        for _ in range(_ROUNDS):
            surprise = np.clip(np.log(seconds / predicted), -_SURPRISE, _SURPRISE)
            rows = x / predicted[:, None]
            gram, moment = rows.T @ rows, rows.T @ np.exp(surprise)
            costs = _solve(gram, moment, costs)
            predicted = np.maximum(x @ costs, 1e-9)
        off = float(np.median(np.abs(np.log(seconds / predicted))))
        weight = _ON_PURPOSE * min(1.0, _USUAL_NOISE / max(off, 1e-9)) ** 2
        gram, moment = weight * gram, weight * moment
        return cls(_costs=costs, _kept_gram=gram, _kept_moment=moment, _seen=_SETTLED, _model_seen=model_seen)

    @property
    def ready(self) -> bool:
        return self._costs is not None

    @property
    def costs(self) -> dict[str, float]:
        """Seconds by the names of COSTS, without MODEL_COSTS while no draft model ran; empty before any observation."""
        names = COSTS if self._model_seen else COSTS[: -len(MODEL_COSTS)]
        return dict(zip(names, self.now.tolist(), strict=False)) if self.ready else {}

    @property
    def now(self) -> Floats:
        """Seconds of each part of a step at the pace of late, [COSTS]. Raises ValueError before any observation."""
        if self._costs is None:
            raise ValueError("no step has been observed yet: call observe() first")
        return self._costs * float(np.exp(self._pace))

    def predict(self, work: StepWork) -> float:
        """Seconds that `work` will take as the next step. Raises ValueError before the first observation."""
        return float(self.now @ work.vector()) * self._spell_factor

    @property
    def _spell_factor(self) -> float:
        """How many times longer the next step will take because of the last few."""
        likeness = min(max(self._followed / self._squares, 0.0), 1.0) if self._squares else 0.0
        return float(np.exp(likeness * self._spell))

    def predict_plain(self, work: StepWork, emitted: int) -> float:
        """Seconds that the same prompts and the same `emitted` tokens would take without speculation.

        Where requests that decode got several tokens each, as many plain steps of the same requests are needed. Raises
        ValueError before the first observation.
        """
        plain = StepWork(work.requests, 0, 0, work.context_tokens, 0, 0)
        steps = emitted / work.requests if work.requests else 1.0
        return steps * self.predict(plain) + work.prefill_tokens * float(self.now[PREFILL]) * self._spell_factor

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a finished step."""
        x = work.vector()
        self._model_seen = self._model_seen or work.model_first > 0
        if self._costs is None:
            self._costs = _PRIOR_SHARES * seconds / float(_PRIOR_SHARES @ x)
        usual = max(float(self._costs @ x), 1e-9)
        predicted = usual * float(np.exp(self._pace)) * self._spell_factor
        self._errors = [*self._errors[-255:], abs(predicted - seconds) / seconds]
        difference = float(np.log(seconds / usual)) - self._pace
        settled = self._seen >= _SETTLED
        most = _SURPRISE if settled else _FIRST_SURPRISE
        surprise = min(max(difference, -most), most)
        if settled:
            self._pace += surprise / _PACE_MEMORY
            self._remember(min(max(difference, -_SPELL), _SPELL))
        weight = 1.0 / usual**2  # relative errors: a long prefill must not drown the decode steps
        fade = 1.0 - 1.0 / _MEMORY
        self._gram = fade * self._gram + weight * np.outer(x, x)
        self._moment = fade * self._moment + weight * usual * float(np.exp(surprise)) * x
        self._seen += 1
        if self._seen % _REFIT_EVERY == 0:
            self._costs = self._fit(self._costs)

    def _remember(self, difference: float) -> None:
        """How much slower than at the pace of late a step was: what the spell before said of it, and the spell now."""
        fade = 1.0 - 1.0 / _LIKENESS_MEMORY
        self._followed = fade * self._followed + self._spell * difference
        self._squares = fade * self._squares + self._spell**2
        self._spell += (difference - self._spell) / _SPELL_MEMORY

    def _fit(self, last: Floats) -> Floats:
        """What was seen, with a pull to the last fit."""
        return _solve(self._gram + self._kept_gram, self._moment + self._kept_moment, last)

    def median_error(self) -> float:
        """Median absolute relative error of the last 256 predictions, made before the step was seen; 0.0 before any."""
        return float(np.median(self._errors)) if self._errors else 0.0


def _solve(gram: Floats, moment: Floats, last: Floats) -> Floats:
    """Costs >= 0 that minimise the weighted squares plus a pull to `last`."""
    scale = np.maximum(last, 0.1 * last[0] * _PRIOR_SHARES)  # of a pull: one that is 0 must not stay there
    root = np.linalg.cholesky(gram * np.outer(scale, scale) + _PULL * np.eye(len(scale)))
    costs: Floats = nnls(root.T, np.linalg.solve(root, moment * scale + _PULL * last / scale))[0] * scale
    costs[0] = max(costs[0], 1e-6)
    return costs
