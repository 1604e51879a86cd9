"""Arrival traces: when requests came, how long their prompts and their answers were.

A trace is a JSONL or CSV file with columns for time, prompt tokens and output tokens. The names that public traces use
are known (Azure, BurstGPT, Mooncake); `columns` tells others. Times are seconds, milliseconds or dates.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aurora.config import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NAMES = {
    "time": ("t_s", "timestamp", "Timestamp", "TIMESTAMP", "arrival_time", "time"),
    "prompt": ("request_tokens", "prompt_tokens", "input_length", "ContextTokens", "Request tokens", "input_tokens"),
    "output": ("response_tokens", "output_tokens", "output_length", "GeneratedTokens", "Response tokens"),
}
_MILLISECONDS = {"timestamp", "input_length", "output_length"}  # Mooncake's columns


@dataclass(frozen=True, eq=False)
class ArrivalTrace:
    """Requests in order of arrival; arrays of [requests]."""

    seconds: Floats  # since the first one
    prompt: Ints  # tokens
    output: Ints  # tokens

    def __len__(self) -> int:
        return len(self.seconds)

    def first(self, count: int) -> "ArrivalTrace":
        return ArrivalTrace(self.seconds[:count], self.prompt[:count], self.output[:count])

    def repeated(self, count: int) -> "ArrivalTrace":
        """`count` requests: the trace over and over, each time after the last request and a mean gap."""
        if not 0 < len(self) < count:
            return self.first(count)
        length = self.seconds[-1] * (1 + 1 / max(len(self) - 1, 1))
        times = -(-count // len(self))
        seconds = np.concatenate([self.seconds + n * length for n in range(times)])
        return ArrivalTrace(seconds, np.tile(self.prompt, times), np.tile(self.output, times)).first(count)

    def faster(self, factor: float) -> "ArrivalTrace":
        """The same requests, `factor` times as many a second."""
        return ArrivalTrace(self.seconds / factor, self.prompt, self.output)


def read_arrivals(file: Path, columns: Mapping[str, str] | None = None) -> ArrivalTrace:
    """Read a trace; requests without prompt or answer (failed ones) are left out and counted on stderr.

    columns: name of the column for "time", "prompt" or "output" where it is not among NAMES.
    Raises UserError naming the file, and the column or row that cannot be used.
    """
    table = _read(file)
    names = {what: _column(file, table, what, (columns or {}).get(what)) for what in NAMES}
    seconds = _seconds(file, table, names)
    prompt, output = (_numbers(file, table, names[what]) for what in ("prompt", "output"))
    good = (prompt >= 1) & (output >= 1)
    if not good.any():
        raise UserError(f"{file}: no request has a prompt and an answer; check {names['prompt']} and {names['output']}")
    if not good.all():
        print(f"{file}: left out {int((~good).sum())} requests without prompt or answer", file=sys.stderr)
    order = np.argsort(seconds[good], kind="stable")
    times = seconds[good][order]
    return ArrivalTrace(times - times[0], prompt[good][order].astype(np.int64), output[good][order].astype(np.int64))


def write_arrivals(requests: Iterable[tuple[float, int, int]], file: Path) -> None:
    """Write (seconds, prompt tokens, output tokens) of requests in their order as a trace for `read_arrivals`."""
    requests = list(requests)
    start = requests[0][0] if requests else 0.0
    rows = [{"t_s": t - start, "request_tokens": prompt, "response_tokens": said} for t, prompt, said in requests]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read(file: Path) -> Any:
    import pandas as pd

    if file.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{file}: must end in .jsonl or .csv")
    try:
        table = pd.read_csv(file) if file.suffix == ".csv" else pd.read_json(file, lines=True, dtype=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a trace: {error}") from error
    if not len(table):
        raise UserError(f"{file}: holds no request")
    return table


def _column(file: Path, table: Any, what: str, told: str | None) -> str:
    names = (told,) if told else NAMES[what]
    found = [name for name in names if name in table.columns]
    if not found:
        have = ", ".join(map(str, table.columns))
        raise UserError(f"{file}: no column {' or '.join(names)} among {have}; give --columns {what}=NAME")
    return found[0]


def _seconds(file: Path, table: Any, names: Mapping[str, str]) -> Floats:
    import pandas as pd

    column = table[names["time"]]
    if pd.api.types.is_numeric_dtype(column):
        seconds = _numbers(file, table, names["time"])
        return seconds / 1e3 if set(names.values()) == _MILLISECONDS else seconds
    dates = pd.to_datetime(column, errors="coerce", utc=True)
    if dates.isna().any():
        bad = int(dates.isna().argmax())
        raise UserError(f"{file}: row {bad + 1}: {names['time']} {column[bad]!r} is neither a number nor a date")
    since: Floats = (dates - dates.iloc[0]).dt.total_seconds().to_numpy(np.float64)
    return since


def _numbers(file: Path, table: Any, name: str) -> Floats:
    import pandas as pd

    numbers: Floats = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise UserError(f"{file}: row {bad[0] + 1}: {name} {table[name][bad[0]]!r} is not a number")
    return numbers
