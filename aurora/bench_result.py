"""What a bench came to: speeds and latencies of every arm in every round, as a table and as rows of results."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from aurora.results import Row, command_line, median_interval
from aurora.sender import Record

BASELINE = "no speculation"
_OVER = {BASELINE: "speedup_over_no_speculation", "vllm-ngram": "speedup_over_vllm_ngram"}
RowValue = float | str | None
_OURS = ("table", "portfolio", "learning")  # arms with a rule of ours


class Cell(NamedTuple):
    """What is compared among the arms."""

    dataset: str
    concurrency: int
    temperature: float

    def __str__(self) -> str:
        sampled = f", temperature {self.temperature:g}" if self.temperature else ""
        return f"{self.dataset}, {self.concurrency} at once{sampled}"


@dataclass(frozen=True)
class Measurement:
    """One arm in one round."""

    dataset: str
    concurrency: int
    temperature: float
    arm: str
    round: int
    tokens_per_s: float  # `full_throughput`
    tokens_per_step: float | None  # None without speculation
    tokens: int
    latency_s: tuple[float, ...]  # of each request

    @property
    def cell(self) -> Cell:
        return Cell(self.dataset, self.concurrency, self.temperature)

    @property
    def place(self) -> tuple[Cell, str, int]:
        return self.cell, self.arm, self.round


def full_throughput(records: Sequence[Record]) -> float:
    """Tokens/s until fewer requests are open than may be, of which there were enough until then.

    How long the last answers run down says how much they differ and not how fast they are served; without speculation
    they do not differ. A request's tokens count as if they came evenly from its first to its last.
    """
    begin, last = (pick(r.started_s for r in records) for pick in (min, max))
    end = min(r.started_s + r.latency_s for r in records if r.started_s + r.latency_s > last)
    tokens = 0.0
    for r in records:
        first = r.started_s + (r.latency_s if r.ttft_s is None else r.ttft_s)
        tokens += float(np.interp(end, (first, r.started_s + r.latency_s), (0.0, r.completion_tokens)))
    return tokens / (end - begin)


@dataclass
class BenchResult:
    measurements: list[Measurement] = field(default_factory=list)
    step_costs: dict[str, float] = field(default_factory=dict)  # seconds, as the last arm that has a rule fitted them
    baseline: str = BASELINE  # the arm that ratios are to

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> "BenchResult":
        """From what `aurora bench --json` wrote. Raises KeyError, TypeError or ValueError for something else."""
        found = [Measurement(**each | {"latency_s": tuple(each["latency_s"])}) for each in kept["rounds"]]
        return cls(found, dict(kept["step_costs"]), str(kept.get("baseline", BASELINE)))

    @property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(m.cell for m in self.measurements))

    @property
    def arms(self) -> list[str]:
        """The baseline first; within a round the order of the measurements turns."""
        return sorted(dict.fromkeys(m.arm for m in self.measurements), key=lambda arm: arm != self.baseline)

    def of_arm(self, arm: str, cell: Cell) -> list[Measurement]:
        """Its rounds, in the order in which they were measured."""
        return [m for m in self.measurements if (m.arm, m.cell) == (arm, cell)]

    def ratios(self, arm: str, cell: Cell, over: str = "") -> list[float]:
        """Tokens/s of `arm` over those of another, round by round; empty where one of them was not measured.

        over: the baseline unless it is given.
        """
        over = over or self.baseline
        speed = {(m.arm, m.round): m.tokens_per_s for m in self.measurements if m.cell == cell}
        rounds = sorted({r for a, r in speed if a == arm} & {r for a, r in speed if a == over})
        return [speed[arm, r] / speed[over, r] for r in rounds]

    def published(self, experiment: str, name: str = "") -> Iterator[Row]:
        """The medians as rows of results; name: of the prompts, default that of their data set."""
        for cell in self.cells:
            mine = [m for m in self.measurements if m.cell == cell]
            speeds = {a: float(np.median([m.tokens_per_s for m in mine if m.arm == a])) for a in {m.arm for m in mine}}
            place = str(cell._replace(dataset=name or cell.dataset))
            best = max((arm for arm in speeds if arm not in _OURS), key=speeds.__getitem__)
            for arm, speed in speeds.items():
                policy = arm.replace(" ", "_").replace("-", "_")
                yield Row(experiment, place, policy, "tokens_per_s", speed, speeds.get(self.baseline), command_line())
                for share in (50, 99):
                    plain, latency = (_percentile(mine, a, share) for a in (self.baseline, arm))
                    yield Row(experiment, place, policy, f"latency_p{share}_s", latency, plain, command_line())
                for over, metric in ((best, "ratio_to_best_fixed"), *_OVER.items()):
                    ratios = self.ratios(arm, cell, over) if arm not in (over, self.baseline) else []
                    if ratios:
                        value = float(np.median(ratios))
                        yield Row(experiment, place, policy, metric, value, speeds[over], command_line())

    def rows(self) -> Iterator[dict[str, RowValue]]:
        """One for each cell and arm: medians over the rounds, and interval and range of the ratio.

        The interval is the 95 % confidence interval of the median over the rounds; None with a single round.
        """
        for cell in self.cells:
            for arm in self.arms:
                mine = self.of_arm(arm, cell)
                steps = [m.tokens_per_step for m in mine if m.tokens_per_step is not None]
                ratios = self.ratios(arm, cell)
                if not ratios:  # a run that was cut off
                    continue
                low, high = median_interval(ratios) or (None, None)
                yield {
                    **cell._asdict(),
                    "arm": arm,
                    "tokens_per_s": float(np.median([m.tokens_per_s for m in mine])),
                    "tokens_per_step": float(np.median(steps)) if steps else None,
                    "latency_p50_s": _percentile(mine, arm, 50),
                    "latency_p99_s": _percentile(mine, arm, 99),
                    "ratio": float(np.median(ratios)),
                    "ratio_low": low,
                    "ratio_high": high,
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                }


def _percentile(measurements: Sequence[Measurement], arm: str, share: float) -> float:
    """Of the latencies of one arm's requests over all rounds."""
    return float(np.percentile([s for m in measurements if m.arm == arm for s in m.latency_s], share))


def show(result: BenchResult) -> None:
    """Print the table."""
    table = Table(*heads(result))
    for row in result.rows():
        table.add_row(*cells_of(row))
    wide_console().print(table)


def wide_console() -> Console:
    """One that cuts no table where the output is a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def heads(result: BenchResult) -> tuple[str, ...]:
    """The table's columns."""
    ratio = f"ratio to {result.baseline}"
    return ("prompts", "arm", "tokens/s", "tokens/step", "p50, s", "p99, s", ratio, "95 % interval", "range")


def cell_of(row: Mapping[str, RowValue]) -> Cell:
    """What a row of the table is of."""
    return Cell(str(row["dataset"]), int(row["concurrency"] or 0), float(row["temperature"] or 0))


def cells_of(row: Mapping[str, RowValue]) -> tuple[str, ...]:
    """A row's cells as text."""
    return (
        str(cell_of(row)),
        str(row["arm"]),
        f"{row['tokens_per_s']:.1f}",
        "-" if row["tokens_per_step"] is None else f"{row['tokens_per_step']:.2f}",
        f"{row['latency_p50_s']:.2f}",
        f"{row['latency_p99_s']:.2f}",
        f"{row['ratio']:.3f}",
        "-" if row["ratio_low"] is None else f"{row['ratio_low']:.3f} - {row['ratio_high']:.3f}",
        f"{row['ratio_min']:.3f} - {row['ratio_max']:.3f}",
    )
