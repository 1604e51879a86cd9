"""What `aurora bench` measures: its options, and the flags of each arm's server."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aurora.bench_result import BASELINE
from aurora.config import DEFAULT_MODEL, UserError, require_positive, require_writable

ARMS = {
    "fixed-3": "neural drafter, three drafts for all; any other number likewise",
    "table-3": "n-gram table, three drafts for all; any other number likewise",
    "vllm-ngram": "vLLM's own prompt lookup",
    "vllm-batch-table": "the same with a length for each number of requests (--batch-table)",
    "table": "n-gram table alone",
    "portfolio": "both drafters, chosen by goodput",
    "learning": "the same with a trainer beside it",
}
_FIXED = re.compile(r"(fixed|table)-([1-9]|1[0-6])")
_LOOKUP_K = 3  # drafts of vLLM's prompt lookup


class Load(NamedTuple):
    """How the prompts of a data set are sent."""

    concurrency: int
    temperature: float = 0.0

    def __str__(self) -> str:
        """As --concurrency takes it."""
        return f"{self.concurrency}@{self.temperature:g}" if self.temperature else str(self.concurrency)


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; `aurora bench` has a flag for each. Raises UserError for values that make no sense."""

    model: str = DEFAULT_MODEL
    datasets: tuple[str, ...] = ()  # none: a dozen prompts of our own
    variant: str | None = None
    drafter: Path | None = None  # None: the untrained one of day 0
    loads: tuple[Load, ...] = (Load(1), Load(4))
    rounds: int = 5
    requests: int = 4  # per arm, round and unit of concurrency
    max_tokens: int = 64
    arms: tuple[str, ...] = ("fixed-3", "vllm-ngram", "portfolio")  # keys of ARMS, beside the baseline
    batch_table: tuple[tuple[int, int], ...] = ((1, 4), (2, 3), (4, 2), (8, 1), (12, 0))  # (from requests, length)
    urls: tuple[tuple[str, str], ...] = ()  # (name, URL) of endpoints to compare instead; the baseline first
    json_file: Path | None = None
    html: Path | None = None  # report
    results: Path | None = None  # file of rows (`aurora.results`)
    experiment: str = "live"  # name of these rows
    cell: str = ""  # what the prompts are, in these rows; default: the data set's name
    vllm_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "rounds", "requests", "max_tokens")
        for load in self.loads:
            if load.concurrency < 1 or load.temperature < 0:
                raise UserError(f"--concurrency {load.concurrency}@{load.temperature:g}: at least 1, at 0 or above")
        unknown = sorted(arm for arm in set(self.arms) - set(ARMS) if not _FIXED.fullmatch(arm))
        if unknown:
            raise UserError(f"--arms {unknown[0]}: no such arm; choose from {', '.join(ARMS)}")
        if any(flag.startswith("--fixed-k") for flag in self.vllm_args):
            raise UserError("--fixed-k: every arm would have it; name arms instead, such as --arms fixed-1,fixed-3")
        begins = [begin for begin, _ in self.batch_table]
        lengths = [k for _, k in self.batch_table]
        if begins[:1] != [1] or sorted(set(begins)) != begins or min(lengths) < 0 or not max(lengths):
            given = ",".join(f"{begin}:{k}" for begin, k in self.batch_table)
            raise UserError(f"--batch-table {given}: must rise from 1, with lengths of 0 or more, one of them above 0")
        names = [Path(name).stem for name in self.datasets]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"--dataset: {twice[0]} names two data sets; rename one, so that their cells differ")
        if self.cell and len(self.datasets) > 1:
            raise UserError(f"--cell {self.cell}: names one data set; there are {len(self.datasets)}")
        self._check_urls()
        require_writable("--json", self.json_file)
        require_writable("--html", self.html)
        require_writable("--results", self.results)

    def _check_urls(self) -> None:
        if not self.urls:
            return
        names = [name for name, _ in self.urls]
        if len(set(names)) < max(len(names), 2):
            raise UserError(f"--url {', '.join(names)}: give two endpoints or more, each with a name of its own")
        for name, url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"--url {name}={url}: no URL; give one such as http://127.0.0.1:8000")
        if self.drafter is not None or self.vllm_args:
            given = "--drafter" if self.drafter is not None else self.vllm_args[0]
            raise UserError(f"{given}: nothing is started with --url; leave it out, or give it to the server")

    @property
    def names(self) -> list[str]:
        """Of the arms, the baseline first."""
        return [name for name, _ in self.urls] or list(arms(self))


def arms(options: BenchOptions) -> dict[str, tuple[str, ...]]:
    """Name and flags of each arm; the baseline first."""
    drafter = (f"--drafter={options.drafter.expanduser().resolve()}",) if options.drafter is not None else ()
    lookup = {"method": "ngram", "num_speculative_tokens": _LOOKUP_K, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    by_batch = lookup | _by_batch(options.batch_table)
    numbers = {arm: (found[1], int(found[2])) for arm in options.arms if (found := _FIXED.fullmatch(arm))}
    drafters = {"fixed": "eagle3", "table": "ngram"}
    fixed = {
        arm: (f"--fixed-k={k}", f"--k-max={max(k, 4)}", f"--drafters={drafters[kind]}", "--no-learning", *drafter)
        for arm, (kind, k) in numbers.items()
    }
    flags = fixed | {
        "vllm-ngram": ("--no-speculation", f"--speculative-config={json.dumps(lookup)}"),
        "vllm-batch-table": ("--no-speculation", f"--speculative-config={json.dumps(by_batch)}"),
        "table": ("--drafters=ngram", "--no-learning", *drafter),
        "portfolio": ("--no-learning", *drafter),
        "learning": drafter,
    }
    common = ("--set=reporter.mode=disabled", *options.vllm_args)
    chosen = {BASELINE: ("--no-speculation", *common)}
    return chosen | {arm: (*flags[arm], *common) for arm in options.arms}


def _by_batch(table: Sequence[tuple[int, int]]) -> dict[str, object]:
    """vLLM's settings for lengths by number of requests: (first, last, length), each good until the next begins."""
    rows = [(begin, begin, k) for begin, k in table]
    return {"num_speculative_tokens": max(k for _, k in table), "num_speculative_tokens_per_batch_size": rows}
