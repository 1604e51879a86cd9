"""Arrival traces: when requests came, how long their prompts and their answers were.

A trace is a JSONL or CSV file with columns for time, prompt tokens and output tokens. The names that public traces use
are known (Azure, BurstGPT, Mooncake); `columns` tells others. Times are seconds, milliseconds or dates. Where there are
columns for it, a request also has a label, and its prompt hashes of its blocks (Mooncake's hash_ids) or a session: the
prompts of one begin alike.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
OPTIONAL = {
    "label": ("domain", "label"),
    "blocks": ("hash_ids",),
    "session": ("session_id", "conversation_id", "prefix_id", "session"),
}
HASHED_TOKENS = 512  # of a block of Mooncake's
SESSION_TOKENS = 64  # of the blocks that a session's prompts are cut into
_MILLISECONDS = {"timestamp", "input_length", "output_length"}  # Mooncake's columns


@dataclass(frozen=True, eq=False)
class ArrivalTrace:
    """Requests in order of arrival; arrays of [requests]."""

    seconds: Floats  # since the first one
    prompt: Ints  # tokens
    output: Ints  # tokens
    labels: tuple[str | None, ...] = ()  # of each request; empty: unknown
    blocks: tuple[tuple[int, ...], ...] = ()  # hashes of each prompt's blocks, of all before them, too; empty: unknown
    block_tokens: int = HASHED_TOKENS

    def __len__(self) -> int:
        return len(self.seconds)

    def first(self, count: int) -> "ArrivalTrace":
        return self.only(np.arange(min(count, len(self))))

    def only(self, which: npt.NDArray[np.intp]) -> "ArrivalTrace":
        """Some of the requests, by their places in order."""
        return replace(
            self,
            seconds=self.seconds[which],
            prompt=self.prompt[which],
            output=self.output[which],
            labels=tuple(self.labels[i] for i in which) if self.labels else (),
            blocks=tuple(self.blocks[i] for i in which) if self.blocks else (),
        )

    def repeated(self, count: int) -> "ArrivalTrace":
        """`count` requests: the trace over and over, each time after the last request and a mean gap.

        What was said before the trace began anew is not said again: prompts of two rounds have no block in common.
        """
        if not 0 < len(self) < count:
            return self.first(count)
        length = self.seconds[-1] * (1 + 1 / max(len(self) - 1, 1))
        times = -(-count // len(self))
        seconds = np.concatenate([self.seconds + n * length for n in range(times)])
        blocks = tuple(tuple(hash((n, b)) for b in of) for n in range(times) for of in self.blocks)
        return replace(
            self,
            seconds=seconds,
            prompt=np.tile(self.prompt, times),
            output=np.tile(self.output, times),
            labels=self.labels * times,
            blocks=blocks,
        ).first(count)

    def faster(self, factor: float) -> "ArrivalTrace":
        """The same requests, `factor` times as many a second."""
        return replace(self, seconds=self.seconds / factor)


def read_arrivals(file: Path, columns: Mapping[str, str] | None = None) -> ArrivalTrace:
    """Read a trace; requests without prompt or answer (failed ones) are left out and counted on stderr.

    columns: name of the column for "time", "prompt", "output", "label", "blocks" or "session" where it is not among
    NAMES and OPTIONAL.
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
    kept = np.flatnonzero(good)[order]
    blocks, block_tokens = _blocks(file, table, prompt, kept, columns or {})
    return ArrivalTrace(
        times - times[0],
        prompt[kept].astype(np.int64),
        output[kept].astype(np.int64),
        _labels(file, table, kept, columns or {}),
        blocks,
        block_tokens,
    )


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


def _optional(file: Path, table: Any, what: str, columns: Mapping[str, str]) -> list[Any] | None:
    """Values of a column that a trace need not have; None where it has none."""
    if what in columns:
        return list(table[_column(file, table, what, columns[what])])
    found = [name for name in OPTIONAL[what] if name in table.columns]
    return list(table[found[0]]) if found else None


def _labels(file: Path, table: Any, kept: npt.NDArray[np.intp], columns: Mapping[str, str]) -> tuple[str | None, ...]:
    values = _optional(file, table, "label", columns)
    return () if values is None else tuple(values[i] if isinstance(values[i], str) else None for i in kept)


def _blocks(
    file: Path, table: Any, prompt: Floats, kept: npt.NDArray[np.intp], columns: Mapping[str, str]
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Hashes of each kept prompt's blocks, and the tokens of a block."""
    hashed = _optional(file, table, "blocks", columns)
    if hashed is not None:
        bad = next((i for i in kept if not isinstance(hashed[i], list)), None)
        if bad is not None:
            raise UserError(f"{file}: row {bad + 1}: blocks {hashed[bad]!r} are not a list of numbers")
        return tuple(tuple(hashed[i]) for i in kept), HASHED_TOKENS
    sessions = _optional(file, table, "session", columns)
    if sessions is None:
        return (), HASHED_TOKENS
    numbers = {name: i for i, name in enumerate(dict.fromkeys(sessions))}
    named = [session is not None and session == session for session in sessions]  # noqa: PLR0124 (NaN is none)
    long = (prompt // SESSION_TOKENS).astype(np.int64) * named
    return tuple(tuple((numbers[sessions[i]] << 32) + b for b in range(long[i])) for i in kept), SESSION_TOKENS


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
