"""What counters grew by between looks at servers' /metrics pages: over restarts, and summed over replicas. Pure."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from aurora.metrics import METRICS
from aurora.scrape import Labels, Samples, grown

_START = "process_start_time_seconds"


@dataclass(frozen=True)
class Look:
    """One server's page at a time of the monotonic clock; `replica` is "" where there is one server only."""

    time_s: float
    samples: Samples
    replica: str = ""

    def value(self, name: str) -> float | None:
        """The sum over a metric's series, None where there are none."""
        series = self.samples.get(name)
        return sum(series.values()) if series else None


def split_replicas(look: Look) -> list[Look]:
    """One look for each server that a `replica` label tells apart; without that label the look itself."""
    found: dict[str, Samples] = defaultdict(lambda: defaultdict(dict))
    for name, series in look.samples.items():
        for labels, value in series.items():
            replica = dict(labels).get("replica")
            if replica is not None:
                found[replica][name][tuple(pair for pair in labels if pair[0] != "replica")] = value
    servers = {r: dict(samples) for r, samples in found.items() if any(name in METRICS for name in samples)}
    return [Look(look.time_s, samples, replica) for replica, samples in sorted(servers.items())] or [look]


@dataclass(frozen=True)
class Growth:
    """What counters grew by over some time, summed over servers."""

    seconds: float
    samples: Samples

    @classmethod
    def over(cls, pairs: Sequence[tuple[Look, Look]]) -> "Growth":
        """Between an earlier and a later look at each server."""
        total: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        for before, after in pairs:
            start = {} if restarted(before, after) else before.samples
            for name, series in after.samples.items():
                if name.endswith("_total"):
                    for labels, amount in grown(start.get(name, {}), series).items():
                        total[name][labels] += amount
        seconds = [after.time_s - before.time_s for before, after in pairs]
        return cls(sum(seconds) / len(seconds) if seconds else 0.0, dict(total))

    def total(self, name: str) -> float:
        return sum(self.samples.get(name, {}).values())

    def by(self, name: str, label: str) -> dict[str, float]:
        """The growth of a counter by one of its labels."""
        found: dict[str, float] = defaultdict(float)
        for labels, amount in self.samples.get(name, {}).items():
            found[dict(labels).get(label, "")] += amount
        return dict(found)

    def rate(self, name: str) -> float | None:
        return self.total(name) / self.seconds if self.seconds > 0 else None

    def ratio(self, above: str, below: str) -> float | None:
        return self.total(above) / self.total(below) if self.total(below) else None


def restarted(before: Look, after: Look) -> bool:
    """Whether the server's process began anew between two looks."""
    starts = before.value(_START), after.value(_START)
    return None not in starts and starts[0] != starts[1]


def gauge(lasts: Sequence[Look], name: str, fold: Callable[[Iterable[float]], float]) -> float | None:
    """A gauge over servers, folded by `sum` or `max`; None where none of them has it."""
    known = [value for value in (look.value(name) for look in lasts) if value is not None]
    return fold(known) if known else None
