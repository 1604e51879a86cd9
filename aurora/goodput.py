"""Which speculation length gives the batch the most tokens a second?

Goodput (SmartSpec, arXiv 2406.14066) = expected emitted tokens of the batch / time of the step that emits them. The
step time is linear in what the step computes, so for each draft length cap the best lengths are a prefix of all
requests' draft positions in order of gain: a request's gains never rise with the position, hence the prefix is
feasible and exact.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MEMORY = 300.0  # steps after which an observation's weight has faded to 1/e
_PULL = 0.1  # steps that the last fit counts for
_REFIT_EVERY = 8
_OUTLIER = 3.0  # a step this many times slower than predicted is not the model's fault


@dataclass(frozen=True)
class StepWork:
    """What one engine step computes; the features of its time."""

    requests: int  # requests that decode
    drafts: int  # drafted tokens to verify
    prefill_tokens: int
    context_tokens: int  # tokens attended to, over all requests
    draft_first: int  # 1 if the drafter reads this step's tokens
    draft_more: int  # further drafter passes, one token a request each

    def vector(self) -> Floats:
        """One number for each cost of the model, [8]."""
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
            ],
            dtype=np.float64,
        )


# Prior cost of each feature as a share of the plain step's constant, in the order of StepWork.vector. Longer drafts are
# guessed cheap, so that they are tried. The drafter's first pass is guessed dear: too dear is seen as soon as the pass
# is left out, too cheap never is while every step has it.
_PRIOR_SHARES = np.array([1.0, 0.03, 0.1, 0.02, 0.02, 0.25, 0.001, 0.05])


@dataclass
class StepTimeModel:
    """Non-negative least squares of step time on StepWork, forgetting old steps. Times in seconds."""

    _gram: Floats = field(default_factory=lambda: np.zeros((8, 8)))
    _moment: Floats = field(default_factory=lambda: np.zeros(8))
    _costs: Floats | None = None
    _seen: int = 0
    _errors: list[float] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        return self._costs is not None

    def predict(self, work: StepWork) -> float:
        """Seconds that `work` will take. Raises ValueError before the first observation."""
        if self._costs is None:
            raise ValueError("no step has been observed yet: call observe() first")
        return float(self._costs @ work.vector())

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a finished step."""
        x = work.vector()
        if self._costs is None:
            self._costs = _PRIOR_SHARES * seconds / float(_PRIOR_SHARES @ x)
        predicted = float(self._costs @ x)
        self._errors = [*self._errors[-255:], abs(predicted - seconds) / seconds]
        if self._seen >= _REFIT_EVERY:
            seconds = min(seconds, _OUTLIER * predicted)
        weight = 1.0 / seconds**2  # relative errors: a long prefill must not drown the decode steps
        fade = 1.0 - 1.0 / _MEMORY
        self._gram = fade * self._gram + weight * np.outer(x, x)
        self._moment = fade * self._moment + weight * seconds * x
        self._seen += 1
        if self._seen % _REFIT_EVERY == 0:
            self._costs = self._fit(self._costs)

    def _fit(self, last: Floats) -> Floats:
        """Minimise the weighted squares plus a pull to the last fit, under costs >= 0."""
        scale = np.maximum(last, 1e-3 * last[0] * _PRIOR_SHARES)  # solve for costs / scale: well conditioned
        gram = self._gram * np.outer(scale, scale) + _PULL * np.eye(len(scale))
        root = np.linalg.cholesky(gram)
        moment = self._moment * scale + _PULL * last / scale
        costs: Floats = nnls(root.T, np.linalg.solve(root, moment))[0] * scale
        costs[0] = max(costs[0], 1e-6)
        return costs

    def median_error(self) -> float:
        """Median absolute relative error of the last 256 predictions, made before the step was seen; 0.0 before any."""
        return float(np.median(self._errors)) if self._errors else 0.0


@dataclass(frozen=True)
class Choice:
    """Speculation lengths of one step and what is expected of them."""

    lengths: tuple[int, ...]  # per request
    emitted: float  # expected tokens
    seconds: float  # expected time

    @property
    def goodput(self) -> float:
        """Expected emitted tokens / s."""
        return self.emitted / self.seconds

    @property
    def cap(self) -> int:
        return max(self.lengths, default=0)


def choose_lengths(gains: Floats, limits: Ints, base: StepWork, model: StepTimeModel) -> Choice:
    """The lengths that maximise goodput, exactly.

    gains: [requests, k_max] expected extra tokens of each draft position, not rising along a row.
    limits: [requests] longest draft each request may have.
    base: the step without any draft and without drafting; `draft_first` of it may be 1 when the drafter runs anyway.
    O(k_max * R log R), R = requests * k_max.
    """
    best = evaluate(np.zeros(len(gains), dtype=np.int64), gains, base, model)
    for cap in range(1, gains.shape[1] + 1):
        lengths = _best_under_cap(gains, np.minimum(limits, cap), cap, base, model)
        candidate = evaluate(lengths, gains, base, model)
        if candidate.goodput > best.goodput:
            best = candidate
    return best


def evaluate(lengths: Ints, gains: Floats, base: StepWork, model: StepTimeModel) -> Choice:
    """Goodput of given lengths."""
    cap = int(lengths.max(initial=0))
    emitted = len(lengths) + float(sum(gains[i, :k].sum() for i, k in enumerate(lengths) if k))
    seconds = model.predict(with_drafts(base, int(lengths.sum()), cap))
    return Choice(tuple(int(k) for k in lengths), emitted, seconds)


def with_drafts(base: StepWork, drafts: int, cap: int) -> StepWork:
    """The work of `base` when `drafts` tokens are verified and `cap` are drafted for each request."""
    return StepWork(
        requests=base.requests,
        drafts=drafts,
        prefill_tokens=base.prefill_tokens,
        context_tokens=base.context_tokens,
        draft_first=max(base.draft_first, int(cap > 0)),
        draft_more=max(cap - 1, 0),
    )


def _best_under_cap(gains: Floats, limits: Ints, cap: int, base: StepWork, model: StepTimeModel) -> Ints:
    allowed = np.arange(gains.shape[1])[None, :] < limits[:, None]
    rows = np.broadcast_to(np.arange(len(gains))[:, None], gains.shape)[allowed]
    order = np.argsort(-gains[allowed], kind="stable")
    emitted = len(gains) + np.concatenate([[0.0], np.cumsum(gains[allowed][order])])
    start = model.predict(with_drafts(base, 0, cap))
    each = model.predict(with_drafts(base, 1, cap)) - start
    taken = int(np.argmax(emitted / (start + each * np.arange(len(emitted)))))
    return np.bincount(rows[order][:taken], minlength=len(gains)).astype(np.int64)
