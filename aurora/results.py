"""Results as rows in one JSON file: which experiment, which cell of its table, which policy, what was measured.

A row is `{experiment, cell, policy, metric, value, baseline, command}`; the command wrote it and writes it again. Rows
of the same experiment, cell, policy and metric are replaced, all others are left alone.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from aurora.config import UserError


class Row(NamedTuple):
    """One measured number. `baseline` is what it compares with, None for nothing."""

    experiment: str
    cell: str
    policy: str
    metric: str
    value: float
    baseline: float | None
    command: str

    @property
    def place(self) -> tuple[str, str, str, str]:
        return self.experiment, self.cell, self.policy, self.metric


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean of at least two values (Student's t)."""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the median, by bootstrap; None for fewer than two values.

    With the handful of rounds that a bench has it says how much the rounds differ and little more: of two values it is
    their range.
    """
    return _interval((values,), lambda x, axis: np.median(x, axis=axis))


def change_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """The same of the median of `after` over that of `before`, which were measured apart; None if one has under two."""
    return _interval((after, before), lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis))


def _interval(samples: Sequence[Sequence[float]], statistic: Callable[..., Any]) -> tuple[float, float] | None:
    """Percentile bootstrap, with the same draws each time; a statistic that never varies is its own interval."""
    if min(map(len, samples)) < 2:
        return None
    arrays = tuple(np.asarray(sample, np.float64) for sample in samples)
    found = stats.bootstrap(arrays, statistic, method="percentile", vectorized=True, rng=0).confidence_interval
    return float(found.low), float(found.high)


def command_line() -> str:
    """The running command, as one would type it."""
    return shlex.join(["aurora", *sys.argv[1:]])


def read_rows(file: Path) -> list[Row]:
    """Rows of a file; none if it does not exist. Raises UserError naming the file when it holds something else."""
    if not file.exists():
        return []
    try:
        return [Row(**row) for row in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not a file of results ({error}); give another --results") from error


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Put rows into a file, which is replaced as a whole."""
    kept = {row.place: row for row in read_rows(file)} | {row.place: row for row in rows}
    lines = ",\n".join(json.dumps(kept[place]._asdict()) for place in sorted(kept))
    staging = file.with_suffix(".part")
    staging.write_text(f"[\n{lines}\n]\n")
    staging.replace(file)
