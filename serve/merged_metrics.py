"""The /metrics pages of several replicas as one page: each sample says which replica it is of."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"
ROUTER = CollectorRegistry()
REQUESTS = Counter(
    "aurora_router_requests", "Requests by replica and outcome.", [LABEL, "outcome"], registry=ROUTER
)  # outcome: answered, handed_on, broken
UP = Gauge("aurora_router_replica_up", "Whether a replica answers.", [LABEL], registry=ROUTER)
OPEN = Gauge("aurora_router_open_requests", "Requests at a replica.", [LABEL], registry=ROUTER)


class _Pages(Collector):
    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        """Families of all pages, each once."""
        families: dict[str, Metric] = {}
        for name, page in self._pages.items():
            for family in text_string_to_metric_families(page):
                kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    kept.add_sample(sample.name, {**sample.labels, LABEL: name}, sample.value, sample.timestamp)
        yield from families.values()


def merged(pages: Mapping[str, str]) -> bytes:
    """One Prometheus text page of pages by replica, the router's own metrics first. A page that is none is left out."""
    registry = CollectorRegistry()
    sound = {name: page for name, page in pages.items() if _parses(page)}
    registry.register(_Pages(sound))
    return generate_latest(ROUTER) + generate_latest(registry)


def _parses(page: str) -> bool:
    try:
        return bool(list(text_string_to_metric_families(page)))
    except ValueError:
        return False
