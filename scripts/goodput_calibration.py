"""Predicted against measured: step times and goodput, by number of requests in the batch.

python scripts/goodput_calibration.py steps.jsonl --results docs/results.json --plot docs/goodput_calibration.png

Reads a log of steps (`aurora serve --set speculation.step_log=FILE`). Goodput is that of windows of steps that decode
the same number of requests and read no prompt: expected tokens / predicted seconds against tokens / measured seconds.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from aurora.results import Row, write_rows
from aurora.step_time import StepTimeModel, StepWork
from serve.step_log import LoggedStep, read_steps

WINDOW = 8  # steps
BUCKETS = (1, 2, 3, 5, 9, 17, 33, 65)  # numbers of requests at which a line of the table begins


@dataclass(frozen=True)
class Bucket:
    """Steps with a similar number of requests."""

    name: str
    steps: list[LoggedStep]

    @property
    def step_error(self) -> float:
        """Median absolute relative error of a step's time."""
        return float(np.median([abs(s.predicted_s - s.measured_s) / s.measured_s for s in self.steps]))

    @property
    def bias(self) -> float:
        """Predicted seconds over measured ones."""
        return sum(s.predicted_s for s in self.steps) / sum(s.measured_s for s in self.steps)

    @property
    def token_bias(self) -> float:
        """Expected tokens over emitted ones."""
        return sum(s.predicted_tokens for s in self.steps) / sum(s.emitted_tokens for s in self.steps)

    @property
    def goodput_error(self) -> float:
        """Median absolute relative error of a window's goodput; nan without a window."""
        errors = [abs(predicted - measured) / measured for predicted, measured in windows(self.steps)]
        return float(np.median(errors)) if errors else float("nan")


def windows(steps: Sequence[LoggedStep]) -> Iterator[tuple[float, float]]:
    """Predicted and measured goodput in tokens / s of each WINDOW of steps that decode equally many requests."""
    by_requests: dict[int, list[LoggedStep]] = {}
    for step in steps:
        if step.predicted_tokens and not step.prefill_tokens:
            by_requests.setdefault(step.requests, []).append(step)
    for mine in by_requests.values():
        for i in range(0, len(mine) - WINDOW + 1, WINDOW):
            part = mine[i : i + WINDOW]
            predicted = sum(s.predicted_tokens for s in part) / sum(s.predicted_s for s in part)
            yield predicted, sum(s.emitted_tokens for s in part) / sum(s.measured_s for s in part)


def buckets(steps: Sequence[LoggedStep]) -> Iterator[Bucket]:
    for low, high in zip(BUCKETS, (*BUCKETS[1:], None), strict=True):
        mine = [s for s in steps if s.requests >= low and (high is None or s.requests < high)]
        last = f"{high - 1}" if high is not None else "more"
        if mine:
            yield Bucket(f"{low}" if high == low + 1 else f"{low} to {last}", mine)
    yield Bucket("all", list(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="log of steps")
    parser.add_argument("--results", type=Path, help="put rows of results there")
    parser.add_argument("--plot", type=Path, help="picture to write, .png")
    parser.add_argument("--costs", type=Path, help="write the run's mean step costs there, for `aurora simulate`")
    options = parser.parse_args()
    try:
        steps = read_steps(options.log)
    except (OSError, ValueError) as error:
        sys.exit(f"goodput_calibration: error: {error}")
    known = [s for s in steps if s.predicted_s and s.requests and s.emitted_tokens]
    if not known:
        sys.exit(f"{options.log}: no step that decodes and whose time was predicted; let the server work longer")
    heads = ("requests", "steps", "error of a step", "predicted / measured s", "expected / emitted", "error of goodput")
    table, rows = Table(*heads), []
    for bucket in buckets(known):
        numbers = (bucket.step_error, bucket.bias, bucket.token_bias, bucket.goodput_error)
        table.add_row(bucket.name, str(len(bucket.steps)), *(f"{number:.3f}" for number in numbers))
        metrics = ("step_time_median_abs_error", "predicted_over_measured_s", "expected_over_emitted", "goodput_error")
        cell, command = f"{bucket.name} requests", shlex.join(["python", *sys.argv])
        known_numbers = [(m, n) for m, n in zip(metrics, numbers, strict=True) if not np.isnan(n)]
        rows += [Row("calibration", cell, "portfolio", metric, n, None, command) for metric, n in known_numbers]
    Console().print(table)
    if options.results is not None:
        write_rows(options.results, rows)
    if options.costs is not None:
        options.costs.write_text(json.dumps({"step_costs": mean_costs(known)}, indent=1))
    if options.plot is not None:
        _draw(known, options.plot)


def mean_costs(steps: Sequence[LoggedStep]) -> dict[str, float]:
    """Step costs that add up to what all the steps took, at whatever pace."""
    works = [
        StepWork(
            s.requests,
            s.drafts,
            s.prefill_tokens,
            s.context_tokens,
            draft_first=min(s.neural_passes, 1),
            draft_more=max(s.neural_passes - 1, 0),
        )
        for s in steps
    ]
    model = StepTimeModel.measured([(work, s.measured_s) for work, s in zip(works, steps, strict=True)])
    pace = sum(s.measured_s for s in steps) / sum(map(model.predict, works))
    return {name: pace * seconds for name, seconds in model.costs.items()}


def _draw(steps: list[LoggedStep], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    found = left.scatter(
        [s.measured_s * 1e3 for s in steps],
        [s.predicted_s * 1e3 for s in steps],
        s=4,
        c=[s.requests for s in steps],
        norm="log",
    )
    left.set(xscale="log", yscale="log", xlabel="measured, ms a step", ylabel="predicted, ms a step")
    figure.colorbar(found, ax=left, label="requests")
    pairs = np.array(list(windows(steps))).reshape(-1, 2)
    right.scatter(pairs[:, 1], pairs[:, 0], s=6)
    right.set(xlabel=f"measured goodput of {WINDOW} steps, tokens/s", ylabel="predicted goodput, tokens/s")
    for panel in (left, right):
        low, high = panel.get_xlim()
        panel.plot([low, high], [low, high], color="grey", linewidth=0.8)
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
