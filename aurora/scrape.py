"""What a server's /metrics page says of speculation, and what happened between two looks at it.

Aurora's own counters are read where the page has them; else vLLM's. The page lags the engine by the server's collection
interval, so a difference over a few requests is approximate.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from prometheus_client.parser import text_string_to_metric_families

from aurora.trace import TABLE_VERSION

_VLLM_VERSION = -1  # vLLM's counters tell no version
_Key = TypeVar("_Key")
Labels = tuple[tuple[str, str], ...]  # names and values, ascending by name
Samples = dict[str, dict[Labels, float]]  # by the sample's name


@dataclass(frozen=True)
class Scrape:
    """Running totals; dicts are by drafter version."""

    draft_steps: dict[int, float] = field(default_factory=dict)
    accepted: dict[int, float] = field(default_factory=dict)
    request_steps: float = 0.0
    emitted: float = 0.0  # the first token of each answer included
    live_version: int | None = None
    step_costs: dict[str, float] = field(default_factory=dict)  # seconds, by the names of `aurora.step_time.COSTS`


def parse_samples(page: str) -> Samples:
    """Every sample of a Prometheus text page. Raises ValueError if it is none."""
    samples: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    return dict(samples)


def parse_scrape(page: str) -> Scrape:
    """Read a Prometheus text page. Raises ValueError if it is none."""
    totals: dict[str, float] = defaultdict(float)
    costs: dict[str, float] = {}
    live: int | None = None
    by_version: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            totals[sample.name] += sample.value
            if sample.name == "aurora_drafter_version":  # of several replicas the newest
                live = int(sample.value) if live is None else max(live, int(sample.value))
            if sample.name == "aurora_step_cost_seconds":
                costs[sample.labels["part"]] = sample.value
            if sample.labels.get("version", "").lstrip("-").isdigit():
                by_version[sample.name][int(sample.labels["version"])] += sample.value
    if not any(name.startswith("aurora_") for name in totals):
        return _vllm_scrape(totals)
    return Scrape(
        dict(by_version["aurora_draft_steps_total"]),
        dict(by_version["aurora_accepted_tokens_total"]),
        totals["aurora_request_steps_total"],
        totals["aurora_emitted_tokens_total"],
        live,
        costs,
    )


def _vllm_scrape(totals: dict[str, float]) -> Scrape:
    return Scrape(
        {_VLLM_VERSION: totals.get("vllm:spec_decode_num_drafts_total", 0.0)},
        {_VLLM_VERSION: totals.get("vllm:spec_decode_num_accepted_tokens_total", 0.0)},
    )


def grown(before: Mapping[_Key, float], after: Mapping[_Key, float]) -> dict[_Key, float]:
    """Growth of counters, by version or labels; one that fell began again at 0 (the server restarted)."""
    return {key: _increase(before.get(key, 0.0), total) for key, total in after.items()}


def _increase(before: float, after: float) -> float:
    return after - before if after >= before else after


def acceptance_length(before: Scrape | None, after: Scrape | None) -> float | None:
    """1 + accepted / verification steps with drafts between two scrapes; None if unknown or nothing was drafted."""
    if before is None or after is None:
        return None
    steps = sum(grown(before.draft_steps, after.draft_steps).values())
    return 1 + sum(grown(before.accepted, after.accepted).values()) / steps if steps else None


def tokens_per_step(before: Scrape | None, after: Scrape | None) -> float | None:
    """1 + accepted / decode steps of a request, undrafted ones included; None if unknown."""
    if before is None or after is None:
        return None
    steps = _increase(before.request_steps, after.request_steps)
    return 1 + sum(grown(before.accepted, after.accepted).values()) / steps if steps else None


def versions_seen(scrapes: Sequence[Scrape | None]) -> list[int]:
    """Neural drafter versions that were live at a scrape or drafted between two, ascending; empty where unknown."""
    known = [s for s in scrapes if s is not None]
    seen = {s.live_version for s in known if s.live_version is not None}
    for before, after in pairwise(known):
        seen |= {v for v, growth in grown(before.draft_steps, after.draft_steps).items() if growth > 0}
    return sorted(version for version in seen if version > TABLE_VERSION)
