"""How wrong is the fit's cost of a draft, on a machine whose pace changes, when drafts are chosen by that very fit?

python scripts/step_time_fit.py

Simulated steps with known costs: pace drifts, every other phase of 300 steps is slower by half, one step in twenty
stalls. The calibration before them is as noisy as told, or there is none. Root mean square of (fitted / true - 1) of a
draft's cost over a plain step's, after the first 150 steps.
"""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from aurora.step_time import CONSTANT, CONTEXT, DRAFT, REQUEST, StepTimeModel, StepWork

TRUE = np.array([0.072, 0.004, 0.0026, 0.0023, 0.0027, 0.0062, 0.0001, 0.004, 0.0, 0.0, 0.0])  # two cores, 135M
K_MAX, CONTEXT_TOKENS, STEPS, SEEDS = 4, 150, 1500, 6
LOADS: dict[str, Sequence[int]] = {"1, 4 and 16 requests": (1, 4, 16), "always 4": (4,), "always 1": (1,)}
NOISES = ((0.05, 0.02), (0.2, 0.1), (0.4, 0.3))  # spread of a step's time, share of steps that stall


def seconds(work: StepWork, rng: np.random.Generator, spread: float, stalls: float) -> float:
    noise = np.exp(rng.normal(0, spread)) * (1 + (rng.random() < stalls) * rng.exponential())
    return float(TRUE @ work.vector() * noise)


def calibrated(seed: int, spread: float, stalls: float) -> StepTimeModel:
    """After a drill like the one at start-up."""
    rng, steps = np.random.default_rng(seed), []
    for requests in (1, 2, 4, 8, 16):
        for step in range(21):
            passes = int(rng.integers(1, K_MAX + 1)) if rng.random() < 0.6 else 0
            drafts = int(rng.integers(K_MAX + 1, size=requests).sum()) if step and rng.random() < 2 / 3 else 0
            prompts = 0 if step else int(rng.integers(16, 192)) * requests
            context = requests * (100 + step)
            work = StepWork(requests if step else 0, drafts, prompts, context, int(passes > 0), max(passes - 1, 0))
            steps.append((work, seconds(work, rng, spread, stalls)))
    return StepTimeModel.measured(steps)


def error(model: StepTimeModel, batches: Sequence[int], seed: int) -> float:
    """Of the model while it learns from steps whose drafts it chose."""
    rng, pace, drafts, wrong = np.random.default_rng(1000 + seed), 0.0, 0, []
    for step in range(STEPS):
        if step % 60 == 0:
            requests = int(rng.choice(batches))
        pace = 0.99 * pace + rng.normal(0, 0.02)
        slower = 1.5 if step // 300 % 2 else 1.0
        prompts = int(rng.integers(50, 300)) if step % 15 == 0 else 0
        work = StepWork(requests, drafts, prompts, requests * CONTEXT_TOKENS, 0, 0)
        model.observe(work, seconds(work, rng, 0.15, 0.05) * float(np.exp(pace)) * slower)
        price = requests * 1.3 / (model.now[CONSTANT] + requests * model.now[REQUEST])
        chances = rng.random(requests)[:, None] ** np.arange(1, K_MAX + 1)
        drafts = int((chances > price * model.now[DRAFT]).sum())
        if step >= 150:
            wrong += [_relative(model.now, n) / _relative(TRUE, n) - 1 for n in batches]
    return float(np.sqrt(np.mean(np.square(wrong))))


def _relative(costs: np.ndarray, requests: int) -> float:
    """A draft's cost over that of a plain step."""
    each = costs[REQUEST] + CONTEXT_TOKENS * 1e-3 * costs[CONTEXT]
    return float(costs[DRAFT] / (costs[CONSTANT] + requests * each))


def main() -> None:
    heads = [f"calibrated with {spread:g}, {stalls:g}" for spread, stalls in NOISES]
    table = Table("requests", "not calibrated", *heads)
    for name, batches in LOADS.items():
        plain = np.mean([error(StepTimeModel(), batches, seed) for seed in range(SEEDS)])
        found = [np.mean([error(calibrated(s, *n), batches, s) for s in range(SEEDS)]) for n in NOISES]
        table.add_row(name, *(f"{each:.2f}" for each in (plain, *found)))
    Console().print(table)


if __name__ == "__main__":
    main()
