"""What one run of traffic came to: folded from its records, printed as a table, written as JSON."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from aurora.scrape import Scrape, acceptance_length, tokens_per_step, versions_seen
from aurora.sender import Record

SHOWN_ERRORS = 5


@dataclass(frozen=True)
class TrafficResult:
    """The numbers of a run; None where the server does not tell. Tenths are of the conversations as they finish."""

    requests: int
    failures: int
    tokens_per_s: float
    ttft_p50_s: float | None
    acceptance_length_first_tenth: float | None
    acceptance_length_last_tenth: float | None
    drafter_versions: list[int]
    duration_s: float
    completion_tokens: int
    latency_p50_s: float | None
    latency_p99_s: float | None
    ttft_p99_s: float | None
    acceptance_length: float | None
    acceptance_length_tenths: list[float | None]
    tokens_per_step_first_tenth: float | None
    tokens_per_step_last_tenth: float | None
    errors: dict[str, int]  # the most frequent messages and how often each came
    interrupted: bool


def boundaries(conversations: int) -> list[int]:
    """Finished conversations after which another tenth is done: ascending, distinct, the last is `conversations`."""
    return sorted({-(-conversations * tenth // 10) for tenth in range(1, 11)})


def summarise(
    records: Sequence[Record], scrapes: Sequence[Scrape | None], duration_s: float, interrupted: bool = False
) -> TrafficResult:
    """Fold a run. scrapes: one at the start and one at each of `boundaries`; None where there was none."""
    done = [r for r in records if r.error is None]
    ttfts = [r.ttft_s for r in done if r.ttft_s is not None]
    latencies = [r.latency_s for r in done]
    tokens = sum(r.completion_tokens for r in done)
    tenths = [acceptance_length(a, b) for a, b in pairwise(scrapes)]
    steps = [tokens_per_step(a, b) for a, b in pairwise(scrapes)]
    known = [s for s in scrapes if s is not None]
    return TrafficResult(
        requests=len(records),
        failures=len(records) - len(done),
        tokens_per_s=tokens / duration_s if duration_s > 0 else 0.0,
        ttft_p50_s=_percentile(ttfts, 50),
        acceptance_length_first_tenth=tenths[0] if tenths else None,
        acceptance_length_last_tenth=tenths[-1] if tenths else None,
        drafter_versions=versions_seen(scrapes),
        duration_s=duration_s,
        completion_tokens=tokens,
        latency_p50_s=_percentile(latencies, 50),
        latency_p99_s=_percentile(latencies, 99),
        ttft_p99_s=_percentile(ttfts, 99),
        acceptance_length=acceptance_length(known[0], known[-1]) if known else None,
        acceptance_length_tenths=tenths,
        tokens_per_step_first_tenth=steps[0] if steps else None,
        tokens_per_step_last_tenth=steps[-1] if steps else None,
        errors=dict(Counter(r.error for r in records if r.error is not None).most_common(SHOWN_ERRORS)),
        interrupted=interrupted,
    )


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def show(result: TrafficResult, console: Console) -> None:
    """Print the table and, below it, what went wrong."""
    table = Table(show_header=False)
    versions = ", ".join(map(str, result.drafter_versions))
    rows = {
        "requests": str(result.requests),
        "failures": str(result.failures),
        "tokens/s": _number(result.tokens_per_s),
        "time to first token p50 (s)": _number(result.ttft_p50_s),
        "acceptance length, first tenth": _number(result.acceptance_length_first_tenth),
        "acceptance length, last tenth": _number(result.acceptance_length_last_tenth),
        "drafter versions seen": versions or "-",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for error, count in result.errors.items():
        console.print(f"failed {count} x: {error}", markup=False, highlight=False)
    if result.interrupted:
        console.print("interrupted: the table covers what was done")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_json(result: TrafficResult, file: Path) -> None:
    """Write the result; readers see the old file or the whole new one."""
    descriptor, staging = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump(asdict(result), stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        Path(staging).replace(file)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise
