"""What the controller costs in a step: time of `Portfolio`'s calls by number of requests, as a share of the step.

python scripts/controller_cost.py --costs costs.json --results docs/results.json --plot docs/controller_cost.png

Requests decode along texts that repeat themselves, so that the table drafts at every step. Nothing computes them.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from aurora.config import SpeculationConfig
from aurora.controller import RequestView
from aurora.goodput import Caps, with_drafts
from aurora.results import Row, write_rows
from aurora.step_costs import read_costs
from aurora.step_time import StepTimeModel, StepWork
from serve.portfolio import Portfolio

K_MAX, PROMPT, STEPS, WARM_UP = 4, 200, 60, 10
REQUESTS = (1, 4, 16, 64, 256)


def seconds_a_step(requests: int, costs: StepTimeModel) -> Iterator[float]:
    """Seconds that the calls of one step take, for each step after the warm-up."""
    rng = np.random.default_rng(0)
    portfolio = Portfolio(SpeculationConfig(k_max=K_MAX), K_MAX)
    portfolio.controller.step_time = costs
    texts = {f"r{i}": np.resize(rng.integers(1000, size=50 + i % 7), PROMPT + STEPS + 1) for i in range(requests)}
    for name, text in texts.items():
        portfolio.begin(name, "", "", text[:PROMPT].tolist(), STEPS + 1)
    verified = dict.fromkeys(texts, 0)
    for step in range(STEPS):
        views = [RequestView(name, PROMPT + step, drafting=True, limit=K_MAX) for name in texts]
        start = time.perf_counter()
        plan = portfolio.plan(views)
        for name, text in texts.items():
            portfolio.observe(name, verified[name], [int(text[PROMPT + step])])
        drafts = portfolio.settle({name: [1] * plan.cap for name in texts}, dict.fromkeys(texts, K_MAX))
        if step >= WARM_UP:
            yield time.perf_counter() - start
        verified = {name: len(each.tokens) for name, each in drafts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--costs", type=Path, required=True, help="step costs: a file that `aurora bench --json` wrote")
    parser.add_argument("--results", type=Path, help="put rows of results there")
    parser.add_argument("--plot", type=Path, help="picture to write, .png")
    options = parser.parse_args()
    costs = read_costs(options.costs)
    table = Table("requests", "controller, ms", "step, ms", "share")
    found = []
    for requests in REQUESTS:
        mine = float(np.median(list(seconds_a_step(requests, read_costs(options.costs)))))
        plain = StepWork(requests, 0, 0, requests * (PROMPT + STEPS // 2), 0, 0)
        step = costs.predict(with_drafts(plain, 2 * requests, Caps(0)))
        table.add_row(str(requests), f"{mine * 1e3:.2f}", f"{step * 1e3:.1f}", f"{mine / step:.3%}")
        found.append((requests, mine, step))
    Console().print(table)
    if options.results is not None:
        command = shlex.join(["python", *sys.argv])
        for n, mine, step in found:
            place = "controller", f"{n} requests", "portfolio"
            share = Row(*place, "controller_share_of_step", mine / step, None, command)
            write_rows(options.results, [share, Row(*place, "controller_seconds_a_step", mine, step, command)])
    if options.plot is not None:
        _draw(found, options.plot)


def _draw(found: list[tuple[int, float, float]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for place, label in ((1, "controller"), (2, "step")):
        panel.loglog([each[0] for each in found], [each[place] * 1e3 for each in found], "o-", label=label)
    panel.set_xlabel("requests in the batch")
    panel.set_ylabel("ms")
    panel.legend()
    panel.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
